"""Calls from inside a compilation, by a garbage collection or a callback: they wait for no thread that may compile too."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from support.waiting import join_all

from hps_numba.errors import ReentryError
from hps_numba.kernels.compiler.safely import compile_lock
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.runtime.shielded import hand_over
from hps_numba.runtime.threads import Ahead, Pool, ranges_of, run_ranges, works_alone


def first_call(start: int = 0, stop: int = 1) -> int:
    """A kernel that is compiled or loaded first."""
    with compile_lock:
        return stop - start


def inside_a_compilation(call: Callable[[], object]) -> list[object]:
    """What a call returned, on a thread that has numba's lock."""
    got: list[object] = []

    def compiles() -> None:
        with compile_lock:
            assert works_alone()
            got.append(call())

    thread = threading.Thread(target=compiles, daemon=True)
    thread.start()
    join_all(thread)
    return got


def test_ranges_of_a_large_batch_are_all_its_own() -> None:
    ranges = ranges_of(1000, 1 << 20, 4)
    assert len(ranges) > 4
    got = inside_a_compilation(lambda: run_ranges(first_call, ranges, 4, Pool(4)))
    assert got == [[stop - start for start, stop in ranges]]


def test_what_others_would_do_ahead_is_done_when_it_is_asked_for() -> None:
    assert inside_a_compilation(lambda: Ahead(first_call, name="ahead").result()) == [1]


def test_changes_are_handed_over_to_nobody() -> None:
    assert inside_a_compilation(lambda: hand_over(first_call, "a place")) == [False]  # type: ignore[arg-type]


def test_a_lock_that_another_thread_has_is_refused() -> None:
    lock, entered, leave = ExclusiveLock("a place"), threading.Event(), threading.Event()

    def change() -> None:
        with lock.held():
            entered.set()
            leave.wait()
            first_call()

    def nested() -> str:
        with pytest.raises(ReentryError, match=r"^a place: .* from inside a compilation"), lock.held():
            raise AssertionError
        return "refused"

    other = threading.Thread(target=change, daemon=True)
    other.start()
    entered.wait()
    assert inside_a_compilation(nested) == ["refused"]
    leave.set()
    join_all(other)
    with lock.held():
        assert not works_alone()


def test_a_free_lock_is_taken_and_left() -> None:
    lock = ExclusiveLock("a place")

    def change() -> str:
        with lock.held():
            assert lock.owned_here
        return "done"

    assert inside_a_compilation(change) == ["done"]
    assert inside_a_compilation(change) == ["done"], "another thread gets it"
