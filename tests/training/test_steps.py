"""Steps on many rows: the bits of a step on arrays, with any number of threads, cached or not; rows and states, or neither."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import served_table
from support.oracles import rows_of
from support.training import apply, sum_in_blocks
from support.waiting import join_all

from hps_numba import ArrayError, CapacityError
from hps_numba.runtime import threads as pool
from hps_numba.storage.host import bulk
from hps_numba.training import trainer as training
from hps_numba.training.initializers import Normal, initial_rows
from hps_numba.training.trainer import Adagrad, Adam, RowTrainer, Rule, Sgd, summed_rows

DIM = 17  # as in tests/cache, so that kernels are compiled once for both
N = 3000
RULES: list[Rule] = [Sgd(0.1), Adagrad(0.1, initial_accumulator_value=0.5), Adam(0.1)]


@pytest.fixture(params=[1, 16])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many threads, with ranges of a few keys each."""
    monkeypatch.setattr(pool._pool, "threads", request.param)
    for module in (bulk, training):
        monkeypatch.setattr(module, "ranges_of", lambda n, item_bytes: pool.ranges_of(n, 1, least=50))
    return int(request.param)


def test_sums_are_taken_in_blocks(threads: int) -> None:
    random = np.random.default_rng(0)
    counts = np.array([1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097, 9000, 1, 3])
    starts = np.concatenate([[0], np.cumsum(counts)])
    for dim in (1, 5, 16, 33, 150):
        rows = random.normal(size=(starts[-1], 2 * dim)).astype(np.float32)
        order = random.permutation(starts[-1])
        for view in (
            rows[:, :dim],
            rows[:, ::2],
            np.broadcast_to(rows[:1, :dim], (len(rows), dim)),
            rows[:, :1].repeat(dim, 1),
        ):
            expected = [sum_in_blocks(view[order[start:stop]]) for start, stop in itertools.pairwise(starts)]
            assert np.array_equal(summed_rows(view, order, starts), expected)
    assert np.array_equal(summed_rows(rows, order, np.array([0, 0, 1]))[0], np.zeros(300, np.float32))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", ["memory", "cached", "bounded"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_step_has_the_bits_of_one_on_arrays(workshop: Workshop, threads: int, rule: Rule, kind: str, overwrite: bool) -> None:
    check_steps(workshop, rule, kind, DIM, overwrite=overwrite)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("kind", ["memory", "bounded"])
def test_rows_written_past_the_caches_have_the_same_bits(workshop: Workshop, threads: int, rule: Rule, kind: str) -> None:
    """Those of a multiple of 64 bytes are, if the gradients may be overwritten."""
    check_steps(workshop, rule, kind, 32, overwrite=True)


def check_steps(workshop: Workshop, rule: Rule, kind: str, dim: int, *, overwrite: bool) -> None:
    top = {"volatile_db": {"type": "hash_map", "overflow_margin": 10 * N, "num_partitions": 1}} if kind == "bounded" else {}
    server = workshop.open(workshop.model((range(N), dim), gpucacheper=0.3), cache_on_cpu=kind == "cached", **top)
    trainer = RowTrainer(server, "m", 0, rule, Normal())
    new = np.arange(N, N + 500)
    first = initial_rows(Normal(), new, dim, table=trainer.spec.tag, default=0.0)
    rows = np.concatenate([rows_of(np.arange(N), dim), first])
    states = np.full((len(rows), rule.width(dim)), rule.fresh, np.float32)
    there = np.append(np.ones(N, bool), np.zeros(500, bool))
    random = np.random.default_rng(0)
    server.lookup(np.arange(N), "m", 0)
    for step in range(1, 6):
        keys = random.choice(N + 500, random.integers(1, N), replace=False)
        gradients = random.normal(size=(len(keys), dim)).astype(np.float32)
        some_rows, some_states = rows[keys], states[keys]
        apply(rule, some_rows, some_states, gradients, step)
        rows[keys], states[keys], there[keys] = some_rows, some_states, True
        given = gradients.copy()
        trainer.step(keys, given, overwrite=overwrite)
        assert np.array_equal(given, gradients) or overwrite
        looked = random.integers(0, N + 500, 4000)
        assert np.array_equal(server.lookup(looked, "m", 0), np.where(there[looked, None], rows[looked], np.float32(-7.5)))
    if rule.width(dim):
        assert np.array_equal(trainer.read_states(np.flatnonzero(there)), states[there])


def test_gradients_that_are_read_only_or_of_another_type_are_left_alone(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(9), DIM)), cache_on_cpu=True)
    trainer = RowTrainer(server, "m", 0, Sgd(1.0))
    fixed = np.broadcast_to(np.float32(1.0), (9, DIM))
    trainer.step(np.arange(9), fixed, overwrite=True)
    ones = np.ones((9, DIM), np.float32)
    ones.flags.writeable = False
    trainer.step(np.arange(9), ones, overwrite=True)
    assert (ones == 1).all() and np.array_equal(server.lookup(np.arange(9), "m", 0), rows_of(np.arange(9), DIM) - 2)


def test_arrays_of_other_shapes_are_refused(workshop: Workshop) -> None:
    trainer = RowTrainer(workshop.open(workshop.model((range(9), DIM))), "m", 0, Adagrad(1.0))
    for keys, gradients in [((3,), (2, DIM)), ((3,), (3, DIM - 1)), ((3,), (DIM,)), ((3, 1), (3, DIM)), ((), (1, DIM))]:
        with pytest.raises(ArrayError, match=r"step: expected keys \[n\] and gradients \[n, 17\], got \["):
            trainer.step(np.zeros(keys, np.int64), np.zeros(gradients, np.float32))
    trainer.step(np.empty(0, np.int64), np.empty((0, DIM), np.float32))
    assert trainer.steps == 1 and not len(trainer.state_keys())


@pytest.mark.parametrize("moment", ["initializer", "kernel", "publish"])
def test_a_step_that_fails_leaves_rows_and_states_as_they_were(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    server = workshop.open(workshop.model((range(N), DIM), gpucacheper=0.3), cache_on_cpu=True)
    trainer = RowTrainer(server, "m", 0, Adagrad(1.0), Normal())
    keys, ones = np.arange(N + 50), np.ones((N + 50, DIM), np.float32)
    trainer.step(keys[:N], ones[:N])
    rows, states = server.lookup(keys, "m", 0), trainer.read_states(keys)

    def fails(*_: Any) -> Any:
        raise CapacityError("full")

    with monkeypatch.context() as patch:
        if moment == "initializer":
            patch.setattr(trainer, "initializer", fails)
        elif moment == "kernel":
            patch.setattr(training, "adagrad_rows", fails)
        else:
            patch.setattr(bulk.Rewrite, "publish", fails)
        with pytest.raises(CapacityError, match="full"):
            trainer.step(keys, ones.copy(), overwrite=True)
    assert np.array_equal(server.lookup(keys, "m", 0), rows) and np.array_equal(trainer.read_states(keys), states)
    assert trainer.steps == 1 and len(trainer.state_keys()) == N
    trainer.step(keys, ones)
    assert trainer.steps == 2 and (trainer.read_states(keys[:N]) == 2).all() and (trainer.read_states(keys[N:]) == 1).all()


def test_gradients_may_arrive_while_a_step_is_prepared(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(N), DIM), gpucacheper=0.3), cache_on_cpu=True)
    trainer = RowTrainer(server, "m", 0, Sgd(1.0))
    keys, gradients = np.arange(N), np.full((N, DIM), np.nan, np.float32)
    rows = server.lookup(keys, "m", 0)

    def lost() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.step(keys, gradients, overwrite=True, arrived=lost)
    assert np.array_equal(server.lookup(keys, "m", 0), rows) and trainer.steps == 0
    trainer.step(keys, gradients, overwrite=True, arrived=lambda: gradients.fill(1))
    assert np.array_equal(server.lookup(keys, "m", 0), rows - 1) and trainer.steps == 1


def test_a_step_where_memory_ends_goes_row_by_row(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    server = workshop.open(workshop.model((range(N), DIM)))
    trainer = RowTrainer(server, "m", 0, Adagrad(1.0))
    ones = np.ones((N, DIM), np.float32)
    refused: list[int] = []

    def no_memory(keys: np.ndarray) -> Any:
        refused.append(len(keys))
        raise CapacityError("no memory")

    monkeypatch.setattr(served_table(server).store, "rewriting", no_memory)
    trainer.step(np.arange(N), ones)
    assert refused == [N]
    assert np.array_equal(server.lookup(np.arange(N), "m", 0), rows_of(np.arange(N), DIM) - 1)
    assert (trainer.read_states(np.arange(N)) == 1).all()


def test_lookups_beside_steps_see_whole_rows_that_never_go_back(workshop: Workshop, threads: int) -> None:
    """Elements of a row are equal and fall by 1 with every step; the cache gets its rows from the gradients' memory."""
    server = workshop.open(workshop.model((range(N), DIM), gpucacheper=0.3), cache_on_cpu=True)
    server.insert(np.arange(N), np.zeros((N, DIM), np.float32), "m", 0)
    trainer = RowTrainer(server, "m", 0, Sgd(1.0))
    wrong: list[str] = []
    stop = threading.Event()

    def look() -> None:
        last = np.zeros(N, np.float32)
        while not stop.is_set():
            rows = server.lookup(np.arange(N), "m", 0)
            if (rows != rows[:, :1]).any() or (rows[:, 0] > last).any():
                wrong.append(f"torn or old: {rows}")
            last = rows[:, 0].copy()

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    try:
        for step in range(1, 41):
            trainer.step(np.arange(N), np.ones((N, DIM), np.float32), overwrite=bool(step % 2))
            assert (server.lookup(np.arange(N), "m", 0) == -step).all()
    finally:
        stop.set()
        join_all(*looking)
    assert not wrong, wrong[0]
