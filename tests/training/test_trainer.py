"""Optimizer steps on rows of a server: what they read, write, keep and create, without any framework."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.oracles import rows_of
from support.waiting import join_all

from hps_numba import ArrayError, ClosedError, ConfigError, ReentryError, TierError
from hps_numba.training.initializers import Normal, Uniform, Zeros, initial_rows
from hps_numba.training.trainer import Adagrad, Adam, RowTrainer, Rule, Sgd, create_rows

DIM = 17  # as in tests/cache, so that kernels are compiled once for both
RULES: list[Rule] = [Sgd(0.1), Adagrad(0.1, initial_accumulator_value=0.5), Adam(0.1)]


def naive_step(rule: Rule, row: np.ndarray, gradient: np.ndarray, state: dict[str, Any], steps: int) -> np.ndarray:
    """One row, in float64."""
    if isinstance(rule, Sgd):
        return row - rule.lr * gradient
    if isinstance(rule, Adagrad):
        state["sum"] = state.get("sum", rule.initial_accumulator_value) + np.mean(gradient**2)
        return row - rule.lr * gradient / (np.sqrt(state["sum"]) + rule.eps)
    assert isinstance(rule, Adam)
    state["mean"] = rule.beta1 * state.get("mean", 0.0) + (1 - rule.beta1) * gradient
    state["square"] = rule.beta2 * state.get("square", 0.0) + (1 - rule.beta2) * gradient**2
    mean, square = state["mean"] / (1 - rule.beta1**steps), state["square"] / (1 - rule.beta2**steps)
    return row - rule.lr * mean / (np.sqrt(square) + rule.eps * (1 / np.sqrt(1 - rule.beta2**steps)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("cached", [False, True])
def test_steps_equal_the_formula(workshop: Workshop, rule: Rule, cached: bool) -> None:
    """Rows of a table larger than its cache, some of them new, one of them erased meanwhile."""
    server = workshop.open(workshop.model((range(100), DIM), gpucacheper=0.2), cache_on_cpu=cached)
    trainer = RowTrainer(server, "m", 0, rule, Zeros())
    table = {key: rows_of(key, DIM).astype(np.float64) for key in range(100)}
    states: dict[int, dict[str, Any]] = {}
    random = np.random.default_rng(0)
    for steps in range(1, 30):
        keys = np.unique(random.integers(0, 110, 40))
        gradients = random.normal(size=(len(keys), DIM)).astype(np.float32)
        trainer.step(keys, gradients)
        for key, gradient in zip(keys.tolist(), gradients.astype(np.float64)):
            row = table.get(key, np.zeros(DIM))
            table[key] = naive_step(rule, row, gradient, states.setdefault(key, {}), steps)
        some = random.integers(0, 110, 50)
        expected = np.array([table.get(key, np.full(DIM, -7.5)) for key in some.tolist()])
        np.testing.assert_allclose(server.lookup(some, "m", 0), expected, rtol=1e-4, atol=1e-4)
        if steps == 15:
            server.erase([keys[0]], "m", 0)
            del table[keys[0]], states[keys[0]]
    assert trainer.steps == 29 and set(trainer.state_keys()) <= (set() if isinstance(rule, Sgd) else set(table) | {keys[0]})


def test_a_step_may_have_other_settings_of_the_same_rule(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(3), 2)))
    trainer = RowTrainer(server, "m", 0, Sgd(0.0))
    trainer.step(np.array([1]), np.ones((1, 2), np.float32), Sgd(2.0))
    assert np.array_equal(server.lookup([1], "m", 0), rows_of([1], 2) - 2)
    with pytest.raises(ConfigError, match="expected sgd, by which this table is trained, got adam"):
        trainer.step(np.array([1]), np.ones((1, 2), np.float32), Adam(0.1))
    for wrong in (-1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(ConfigError, match="lr: expected a number of at least 0, got"):
            Sgd(wrong)


def test_read_modify_write_is_atomic(workshop: Workshop) -> None:
    """Eight threads add 1 to the same rows, beside lookups that see whole rows."""
    server = workshop.open(workshop.model((range(50), DIM), gpucacheper=0.2), cache_on_cpu=True)
    server.insert(np.arange(50), np.zeros((50, DIM)), "m", 0)
    torn, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            rows = server.lookup(np.arange(50), "m", 0)
            if (rows != rows[:, :1]).any():
                torn.append(rows)

    def add() -> None:
        for _ in range(25):
            assert server.read_modify_write(np.arange(50), lambda rows, found: rows + 1, "m", 0) == 0

    threads = [threading.Thread(target=add) for _ in range(8)]
    looking = threading.Thread(target=look)
    for thread in (looking, *threads):
        thread.start()
    join_all(*threads)
    stop.set()
    join_all(looking)
    assert not torn and (server.lookup(np.arange(50), "m", 0) == 200).all()


def test_read_modify_write_reads_every_tier(workshop: Workshop) -> None:
    server, tier = workshop.open_cold(volatile=KEEPING)
    seen = []

    def change(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
        seen.append((rows.copy(), found))
        return rows * 2

    assert server.read_modify_write([3, 100], change, "m", 0) == 2  # new to host memory, which is the fastest tier
    rows, found = seen[0]
    assert found.tolist() == [True, False] and np.array_equal(rows[0], rows_of(3, 3)) and (rows[1] == -7.5).all()
    assert np.array_equal(server.lookup([3, 100], "m", 0), rows * 2)
    found = tier.fetch("hps_et.m.sparse_embedding0", np.array([3]), out := np.zeros((1, 3), np.float32)).found
    assert not found.any() or np.array_equal(out, rows[:1] * 2)
    with server.locked_table("m", 0) as (keys, read):
        assert keys.tolist() == [*range(9), 100] and np.array_equal(read(np.array([4])), rows_of([4], 3))


def test_a_failed_step_changes_no_row(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(5), 2)))
    trainer = RowTrainer(server, "m", 0, Adagrad(0.1))
    with pytest.raises(ArrayError):
        server.read_modify_write([1], lambda rows, found: rows[:, :1], "m", 0)
    with pytest.raises(ZeroDivisionError):
        server.read_modify_write([1], lambda rows, found: 1 // 0, "m", 0)
    with pytest.raises(ConfigError, match=r"initializer: expected rows of shape \[1, 2\], got \[1, 1\]"):
        create_rows(server, "m", 0, np.array([70]), lambda keys, dim: np.zeros((1, 1)))
    assert np.array_equal(server.lookup(np.arange(5), "m", 0), rows_of(np.arange(5), 2)) and not trainer.steps
    with pytest.raises(ConfigError, match=r"expected state of shape \[3, 1\], got \[3, 2\]"):
        trainer.set_states(1, [(np.arange(3), np.zeros((3, 2), np.float32))])
    server.close()
    with pytest.raises(ClosedError):
        trainer.step(np.array([1]), np.ones((1, 2), np.float32))
    assert not trainer.steps and not len(trainer.state_keys())


def test_a_failing_tier_fails_the_step(workshop: Workshop) -> None:
    server, tier = workshop.open_cold("support.fakes:FlakyDictTier")
    trainer = RowTrainer(server, "m", 0, Adagrad(0.1))
    tier.fail_on = {"fetch"}
    with pytest.raises(TierError):
        trainer.step(np.array([3]), np.ones((1, 3), np.float32))
    assert not trainer.steps and not len(trainer.state_keys())


def test_states_of_erased_rows_are_dropped(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(4), 2)))
    trainer = RowTrainer(server, "m", 0, Adagrad(0.1))
    for start in range(0, 20_000, 2_000):
        keys = np.arange(start, start + 2_000)
        trainer.step(keys, np.ones((2_000, 2), np.float32))
        server.erase(keys[2:], "m", 0)
    assert len(trainer.state_keys()) < 7_000


def test_a_step_inside_a_locked_table_or_between_paused_steps_ends(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(4), DIM)))
    trainer = RowTrainer(server, "m", 0, Adagrad(0.1))
    ones = np.ones((1, DIM), np.float32)
    with trainer.paused(), pytest.raises(ReentryError):
        trainer.step(np.array([1]), ones)
    with server.locked_table("m", 0):
        trainer.step(np.array([1]), ones)
    trainer.step(np.array([1]), ones)
    assert trainer.steps == 2 and trainer.read_states(np.array([1]))[0, 0] == 2


# -- rows for new keys ---------------------------------------------------------------------


@pytest.mark.parametrize("initializer", [Normal(0.1, seed=4), Uniform(0.1, seed=4)])
def test_initial_rows_depend_on_seed_table_and_key_only(initializer: Any) -> None:
    keys = np.array([5, -(2**63), 2**63 - 1, 0, -1])

    def rows(some: Any, table: str = "t") -> np.ndarray:
        return initial_rows(initializer, np.asarray(some), DIM, table=table, default=0.0)

    once = rows(keys)
    assert np.array_equal(rows(keys[::-1]), once[::-1]) and np.array_equal(rows(keys[:1]), once[:1])
    assert len(np.unique(once)) == once.size
    assert not np.array_equal(rows(keys, "u"), once)
    other = type(initializer)(0.1, seed=5)
    assert not np.array_equal(initial_rows(other, keys, DIM, table="t", default=0.0), once)
    many = rows(np.arange(20_000)).astype(np.float64)
    expected = 0.1 if isinstance(initializer, Normal) else 0.1 / np.sqrt(3)
    assert abs(many.mean()) < 1e-3 and abs(many.std() - expected) < 1e-3
    assert abs(np.corrcoef(many[:, 0], many[:, 1])[0, 1]) < 0.03 and abs(np.corrcoef(many[1:, 0], many[:-1, 0])[0, 1]) < 0.03
    assert isinstance(initializer, Normal) or np.abs(many).max() <= 0.1


def test_create_rows_leaves_existing_rows(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(4), DIM)))
    keys = np.array([1, 9, 9, 10])
    assert create_rows(server, "m", 0, keys, Normal()) == 2
    made = server.lookup([9, 10], "m", 0)
    server.update([9], np.ones((1, DIM)), "m", 0)
    assert create_rows(server, "m", 0, keys, Normal()) == 0
    assert np.array_equal(server.lookup([9, 10, 1], "m", 0), [np.ones(DIM), made[1], rows_of(1, DIM)])
