"""Loading a checkpoint changes everything or nothing: whichever write of a tier fails, and whenever an interrupt comes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import slower_tier
from support.training import apply

from hps_numba import CapacityError, TierError
from hps_numba.training import replacement
from hps_numba.training.checkpoints import load_trained, save_trained
from hps_numba.training.replacement import TableContent, replace_tables
from hps_numba.training.trainer import Adagrad, RowTrainer

DIM = 4
KEYS = np.arange(-20, 400)


class Bench:
    """Two trained tables in host memory and a slower tier, their checkpoint, and what is in them by now."""

    def __init__(self, workshop: Workshop, folder: Path) -> None:
        entry = workshop.model((range(300), DIM), (range(250), DIM))
        self.server = workshop.open(
            entry, volatile_db={"type": "hash_map"}, persistent_db={"type": "support.fakes:WatchedWritesTier"}
        )
        self.tier = slower_tier(self.server)
        self.trainers = [RowTrainer(self.server, "m", table, Adagrad(0.1)) for table in (0, 1)]
        self.path = folder / "c.npz"
        self.step(100, 1.0)
        save_trained(self.path, self.trainers)
        self.saved = self.state()
        self.step(150, 2.0)
        for table in (0, 1):
            self.server.erase(range(40, 60), "m", table)
            self.server.insert(range(350, 370), np.ones((20, DIM)), "m", table)
        self.before = self.state()
        assert self.before != self.saved
        self.tier.writes = 0

    def step(self, count: int, gradient: float) -> None:
        for trainer in self.trainers:
            trainer.step(np.arange(-5, count), np.full((count + 5, DIM), gradient, np.float32))

    def state(self) -> list[Any]:
        """Rows in every tier, steps and states."""
        seen: list[Any] = []
        for number, trainer in enumerate(self.trainers):
            content = self.tier.content[trainer.spec.tag].rows
            seen += [
                self.server.lookup(KEYS, "m", number).tobytes(),
                self.server.contains(KEYS, "m", number).tobytes(),
                {key: row.tobytes() for key, row in content.items()},
                trainer.steps,
                trainer.read_states(KEYS).tobytes(),
            ]
        return seen

    def load(self) -> None:
        load_trained(self.path, self.trainers)


@pytest.fixture
def bench(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(replacement, "_CHUNK_ROWS", 64)  # so that a table takes several writes
    return Bench(workshop, tmp_path)


def failing(number: int, error: type[BaseException]) -> Callable[[int], None]:
    def fail(write: int) -> None:
        if write == number:
            raise error(f"write {number}")

    return fail


@pytest.mark.parametrize("moment", ["before_write", "after_write"])
@pytest.mark.parametrize("error", [TierError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 20], ids=["notes in a file", "notes in memory"])
def test_whichever_write_fails_the_old_rows_stay(
    bench: Bench, moment: str, error: type[BaseException], memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replacement, "_MEMORY_BYTES", memory_bytes or 1)
    raised = KeyboardInterrupt if error is KeyboardInterrupt else TierError
    number = 0
    while True:
        number += 1
        bench.tier.writes = 0
        setattr(bench.tier, moment, failing(number, error))
        try:
            bench.load()
        except raised as problem:
            assert not getattr(problem, "__notes__", [])
        else:
            break
        assert bench.state() == bench.before, f"write {number}"
    assert number > 10 and bench.state() == bench.saved


def test_rows_that_a_tier_does_not_take_back_are_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def fail(write: int) -> None:
        if write > 3:
            raise TierError("gone for good")

    bench.tier.before_write = fail
    with pytest.raises(TierError, match="gone for good") as caught:
        bench.load()
    expected = "keys could not be brought back to their old rows"
    assert any(expected in note for note in caught.value.__notes__) and expected in caplog.text
    assert [trainer.steps for trainer in bench.trainers] == [2, 2]
    bench.tier.before_write = lambda number: None
    bench.load()
    assert bench.state() == bench.saved


def test_a_tier_that_fails_now_and_then_takes_the_old_rows(bench: Bench) -> None:
    def fail(write: int) -> None:
        if write == 4 or (write > 4 and write % 2):
            raise TierError("now and then")

    bench.tier.before_write = fail
    with pytest.raises(TierError, match="now and then") as caught:
        bench.load()
    assert not getattr(caught.value, "__notes__", []) and bench.state() == bench.before


def test_without_room_for_the_old_rows_nothing_changes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacement, "_MEMORY_BYTES", 1)
    monkeypatch.setattr(replacement.tempfile, "tempdir", str(bench.path / "not a folder"))
    with pytest.raises(CapacityError, match=r"no room in memory or in .* for the rows that are to be replaced"):
        bench.load()
    assert bench.state() == bench.before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_at_any_write_leaves_the_old_rows(bench: Bench) -> None:
    """A real signal while a tier writes, and a second one while rows are written back."""
    number = 0
    while True:
        number += 1
        bench.tier.writes = 0

        def interrupt(write: int, number: int = number) -> None:
            if write in (number, number + 1):
                signal.raise_signal(signal.SIGINT)

        bench.tier.after_write = interrupt
        try:
            bench.load()
        except KeyboardInterrupt:
            assert bench.state() == bench.before, f"write {number}"
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        else:
            break
    assert number > 10 and bench.state() == bench.saved


def test_what_is_called_last_may_refuse(bench: Bench) -> None:
    def refuse(answer: Any) -> None:
        assert answer == 7 and bench.state() != bench.before
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_trained(bench.path, bench.trainers, lambda file: 7, refuse)
    assert bench.state() == bench.before


def test_chunks_that_end_early_and_keys_that_come_twice(bench: Bench) -> None:
    keys = np.array([5, 1000, 5, 6, 1000])

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in (0, 2):
            yield keys[start : start + 3], np.full((3, DIM), start, np.float32)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        replace_tables([TableContent(bench.server, "m", 0, keys, chunks())])
    assert bench.state() == bench.before and not bench.server.contains([1000], "m", 0).any()


def test_rows_of_another_width_are_refused_and_the_old_ones_stay(bench: Bench) -> None:
    keys = np.arange(100)
    chunks = [(keys[:50], np.zeros((50, DIM), np.float32)), (keys[50:], np.zeros((50, DIM + 1), np.float32))]
    with pytest.raises(ValueError, match="rows"):
        replace_tables([TableContent(bench.server, "m", 1, keys, chunks)])
    assert bench.state() == bench.before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("moment", ["before_write", "after_write"])
def test_an_interrupted_step_is_taken_whole(bench: Bench, moment: str) -> None:
    """Before, rows had taken the step and their optimizer states had not."""
    trainer, keys = bench.trainers[0], np.arange(-50, 40)
    setattr(bench.tier, moment, lambda number: signal.raise_signal(signal.SIGINT))
    expected, rows, states = trainer.steps, bench.server.lookup(keys, "m", 0), trainer.read_states(keys)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(keys, np.ones((90, DIM), np.float32))
    after = bench.server.lookup(keys, "m", 0)
    apply(trainer.rule, rows, states, np.ones((90, DIM), np.float32), expected + 1)
    assert np.array_equal(after, rows) and np.array_equal(trainer.read_states(keys), states) and trainer.steps == expected + 1
