"""Eight processes read and write one table, and are killed at any moment: the others go on at once, with right rows.

``HPS_NUMBA_CRASHES=200`` kills so many of them, instead of the few that every run has time for. The test says how fast the
survivors went on (``pytest -s``): their steps a second after a kill beside those before it, when the killed one had its share
of the cores. It asserts nothing about that, as it depends on what else the machine does.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
from dataclasses import dataclass

import numpy as np
from support.shared_memory import MIB, new_name, open_tier, segment_file, started_child
from support.waiting import wait_until

from hps_numba.errors import CapacityError
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

WORKERS, DIM, TAG = 8, 16, "hps_et.m.crashes"
CRASHES = int(os.environ.get("HPS_NUMBA_CRASHES", "12"))
OWN = 256  # keys that each worker writes again and again
LASTING = 40  # batches of other keys that it keeps, so that the table grows, and loses entries


@dataclass
class Board:
    """What workers tell the test, in memory that they share: each has a column.

    Attributes:
        begun: version of its own keys that it began to write.   written: the one that it had an answer for.
        batches: number of its other batches so far.   steps: what it has done.   wrong: it saw a wrong row.
    """

    begun: np.ndarray
    written: np.ndarray
    batches: np.ndarray
    steps: np.ndarray
    wrong: np.ndarray

    @classmethod
    def new(cls) -> Board:
        words = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)
        return cls(*(words[16 * line : 16 * line + WORKERS] for line in range(5)))


def rows_for(keys: np.ndarray, versions: np.ndarray | int) -> np.ndarray:
    """Rows that can be checked by themselves: the version, then what only this key and this version have."""
    mixed = (keys * 2_654_435_761 + versions * 40_503) % 8_388_593
    rows = (mixed[:, None] + 7919 * np.arange(DIM)) % 8_388_593
    rows[:, 0] = versions
    return rows.astype(np.float32)


def own_keys(worker: int) -> np.ndarray:
    return np.arange(OWN, dtype=np.int64) + OWN * worker


def other_keys(worker: int, batch: int) -> np.ndarray:
    return np.arange(300, dtype=np.int64) + 1_000_000_000 * (worker + 1) + 300 * batch


def read(tier: MultiProcessHashMapTier, board: Board, keys: np.ndarray, least: np.ndarray | int) -> None:
    """Look at rows that must be there, whole, and not older than ``least``."""
    rows = np.zeros((len(keys), DIM), np.float32)
    found = tier.fetch(TAG, keys, rows).found
    versions = rows[:, 0].astype(np.int64)
    if not (found.all() and np.array_equal(rows, rows_for(keys, versions)) and (versions >= least).all()):
        raise AssertionError(f"expected whole rows of version {least} or later for {keys}, got {found} {versions}")


def insert(tier: MultiProcessHashMapTier, keys: np.ndarray, rows: np.ndarray) -> None:
    """Again while the segment is full: old rows stay as long as a process that the machine does not let run may read them."""
    while True:
        try:
            tier.insert(TAG, keys, rows)
            return
        except CapacityError:
            time.sleep(1e-3)


def work(tier: MultiProcessHashMapTier, board: Board, worker: int) -> None:
    """Write own keys and read those of all, until killed."""
    chance = random.Random(os.getpid())
    try:
        while True:
            kind = chance.random()
            if kind < 0.4:
                board.begun[worker] = version = int(board.begun[worker]) + 1
                keys = own_keys(worker)
                insert(tier, keys, rows_for(keys, version))
                board.written[worker] = version
            elif kind < 0.5:
                batch = int(board.batches[worker])
                insert(tier, other_keys(worker, batch), rows_for(other_keys(worker, batch), batch))
                board.batches[worker] = batch + 1
                if batch >= LASTING:
                    tier.erase(TAG, other_keys(worker, batch - LASTING))
            else:
                of = chance.randrange(WORKERS)
                least, batch = int(board.written[of]), int(board.batches[of]) - 1
                if least:
                    read(tier, board, own_keys(of), least)
                if batch >= 0 and of == worker:
                    read(tier, board, other_keys(of, batch), batch)
            board.steps[worker] += 1
    except BaseException as problem:
        board.wrong[worker] = 1
        sys.stderr.write(f"worker {worker}: {problem!r}\n")
        raise


class Survivors:
    """How fast the others went on, over all kills: steps and seconds before the kill and after it."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._steps, self._seconds = np.zeros(2), np.zeros(2)

    def watch(self, others: np.ndarray, seconds: float, *, after: bool) -> None:
        """Count what they do meanwhile."""
        steps, start = int(self._board.steps[others].sum()), time.perf_counter()
        time.sleep(seconds)
        self._steps[int(after)] += int(self._board.steps[others].sum()) - steps
        self._seconds[int(after)] += time.perf_counter() - start

    def report(self) -> str:
        """Steps a second of all survivors; the share is of what their share of busy cores lets expect."""
        before, after = self._steps / self._seconds
        cores = os.cpu_count() or 1
        expected = before * WORKERS / (WORKERS - 1) if cores < WORKERS else before
        return (
            f"survivors: {before:,.0f} steps/s before a kill, {after:,.0f} after it: {after / expected:.3f} of {expected:,.0f}"
        )


def test_processes_that_are_killed_at_any_moment_cost_no_row_and_no_time() -> None:  # D14
    name, board = new_name(), Board.new()
    tier = open_tier(name, 64 * MIB, max_batch_size=100)
    tier.insert(TAG, np.array([-1]), rows_for(np.array([-1]), 1))
    chance = random.Random(17)
    pids = [started_child(lambda worker=worker: work(tier, board, worker)) for worker in range(WORKERS)]  # type: ignore[misc]
    survivors, all_of_them = Survivors(board), np.ones(WORKERS, bool)
    before = board.steps.copy()

    def went_on(which: np.ndarray) -> bool:
        return bool((board.steps > before)[which].all() or board.wrong.any())

    try:
        for _ in range(CRASHES):
            wait_until(lambda: went_on(all_of_them))  # also the one that was started last
            victim = chance.randrange(WORKERS)
            others = np.arange(WORKERS) != victim
            survivors.watch(others, chance.random() * 0.03, after=False)
            os.kill(pids[victim], signal.SIGKILL)
            survivors.watch(others, chance.random() * 0.03, after=True)
            os.waitpid(pids[victim], 0)
            before = board.steps.copy()
            wait_until(lambda others=others: went_on(others))  # type: ignore[misc]
            assert not board.wrong.any()
            pids[victim] = started_child(lambda worker=victim: work(tier, board, worker))  # type: ignore[misc]
        wait_until(lambda: (board.written.all() and board.batches.all()) or board.wrong.any())
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
    sys.stderr.write(f"{survivors.report()}\n")
    assert not board.wrong.any()
    assert board.written.all() and board.batches.all()
    for worker in range(WORKERS):  # all that was acknowledged is there, also of those killed at the end
        read(tier, board, own_keys(worker), int(board.written[worker]))
        for batch in range(max(0, int(board.batches[worker]) - LASTING + 1), int(board.batches[worker])):
            read(tier, board, other_keys(worker, batch), batch)
    tier.insert(TAG, np.array([-1]), rows_for(np.array([-1]), 2))  # what the last ones left half-written is repaired
    keys = np.concatenate([some for some, _ in tier.scan(TAG)])
    assert len(keys) == len(np.unique(keys)) == tier.size(TAG)
    tier.close()
    assert not segment_file(name).exists()
