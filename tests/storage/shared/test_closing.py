"""Writes that wait for another process while a thread of their own closes the store: they end at once, and write nothing."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import new_name, open_tier, started_child
from support.tiers import TAG
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import ClosedError
from hps_numba.storage.shared import change_lock, file_locks
from hps_numba.storage.shared import segment as segments
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

DIM = 4
KEYS = np.arange(9)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for another process waits for ever."""
    for module in (segments, change_lock):
        monkeypatch.setattr(module, "LOCK_SECONDS", HANG_SECONDS)


@pytest.fixture
def tiers() -> Iterator[tuple[MultiProcessHashMapTier, MultiProcessHashMapTier]]:
    """Two users of one segment in this process."""
    name = new_name()
    both = open_tier(name), open_tier(name)
    both[0].insert(TAG, KEYS, rows_of(KEYS, DIM))
    yield both
    for tier in both:
        tier.close()


@contextmanager
def stopped_in(hold: Callable[[], Any]) -> Iterator[None]:
    """Another process is stopped inside a block."""

    def stop() -> None:
        with hold():
            os.kill(os.getpid(), signal.SIGSTOP)

    child = started_child(stop)
    os.waitpid(child, os.WUNTRACED)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def thread_in(hold: Callable[[], Any]) -> Iterator[None]:
    """Another thread is inside a block."""
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with hold():
            inside.set()
            leave.wait(HANG_SECONDS)

    thread = threading.Thread(target=stay)
    thread.start()
    assert inside.wait(HANG_SECONDS)
    try:
        yield
    finally:
        leave.set()
        join_all(thread)


WRITES: dict[str, Callable[[MultiProcessHashMapTier], object]] = {
    "insert": lambda tier: tier.insert(TAG, KEYS, rows_of(KEYS, DIM, 1)),
    "erase": lambda tier: tier.erase(TAG, KEYS),
    "erase all": lambda tier: tier.erase(TAG),
    "a new table": lambda tier: tier.insert("hps_et.m.other", KEYS, rows_of(KEYS, DIM)),
}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once somebody waits: for a byte of the file or a thread."""
    waits, pause = threading.Event(), file_locks.time.sleep

    def seen(seconds: float) -> None:
        waits.set()
        pause(seconds)

    monkeypatch.setattr(file_locks.time, "sleep", seen)
    return waits


def caught(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """A thread that makes a call, and what that returned or raised."""
    got: list[object] = []

    def run() -> None:
        try:
            got.append(call())
        except Exception as problem:
            got.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("holder", [stopped_in, thread_in], ids=["process", "thread"])
def test_a_write_that_waits_for_the_turn_ends_when_its_store_is_closed(
    tiers: tuple[MultiProcessHashMapTier, MultiProcessHashMapTier], holder: Any, write: str
) -> None:
    tier, other = tiers
    tier.size(TAG)
    segment = tier._tables.segment
    with holder(segment.turn):
        thread, got = caught(lambda: WRITES[write](tier))
        wait_until(lambda: not thread.is_alive() or _waits_in(thread, "segment.py"))
        tier.close()
        join_all(thread)
        assert isinstance(got[0], ClosedError), got
    rows = np.empty((len(KEYS), DIM), np.float32)
    assert other.fetch(TAG, KEYS, rows).found.all() and other.tables() == [TAG]
    assert_same_bits(rows, rows_of(KEYS, DIM))
    assert other.insert(TAG, KEYS, rows_of(KEYS, DIM, 2)) == 0


def _waits_in(thread: threading.Thread, file: str) -> bool:
    """Whether a thread is in a function of a file, or in one that it calls."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.endswith(file):
            return True
        frame = frame.f_back
    return False


def test_a_change_of_all_tiers_that_waits_ends_when_its_store_is_closed(
    tiers: tuple[MultiProcessHashMapTier, MultiProcessHashMapTier],
) -> None:
    tier, other = tiers

    def changes(of: MultiProcessHashMapTier) -> Any:
        return of.store(TAG, DIM).memory.alone()

    def change() -> None:
        with changes(tier):
            raise AssertionError("another process is in there")

    with stopped_in(lambda: changes(other)):
        thread, got = caught(change)
        wait_until(lambda: not thread.is_alive() or _waits_in(thread, "change_lock.py"))
        tier.close()
        join_all(thread)
    assert isinstance(got[0], ClosedError), got
    with changes(other):
        assert other.insert(TAG, KEYS, rows_of(KEYS, DIM, 2)) == 0


def test_who_waits_for_a_byte_of_a_file_that_is_closed_locks_no_byte_of_the_next_one(
    tmp_path: Path, waits: threading.Event
) -> None:
    """The next file that this process opens has the same number."""
    tier = open_tier(new_name(), auto_remove=False)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    segment, byte = tier._tables.segment, change_lock.CHANGE_LOCKS
    try:
        with stopped_in(lambda: held_byte(segment, byte)):
            thread, got = caught(lambda: segment.lock_byte(byte, HANG_SECONDS))
            assert waits.wait(HANG_SECONDS)
            number = segment._file
            tier.close()
            with (tmp_path / "next").open("wb") as file:
                assert file.fileno() == number
                join_all(thread)
    finally:
        segment.path.unlink()
    assert isinstance(got[0], ClosedError), got


@contextmanager
def held_byte(segment: Any, byte: int) -> Iterator[None]:
    assert segment.lock_byte(byte, 0.0)
    yield


@pytest.mark.parametrize("call", ["claim_block", "is_dead", "lock_byte"])
def test_calls_to_a_segment_that_was_left_say_so(call: str) -> None:
    tier = open_tier(new_name())
    segment = tier._tables.segment
    tier.close()
    given = {"claim_block": (), "is_dead": (1,), "lock_byte": (5, 0.0)}[call]
    with pytest.raises(ClosedError, match="has left the segment"):
        getattr(segment, call)(*given)
    segment.unlock_byte(5)
