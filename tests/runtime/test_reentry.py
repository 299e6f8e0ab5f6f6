"""A lock that notices its own thread, and the look at the stack that keeps a call from waiting for itself."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.children import in_child
from support.waiting import HANG_SECONDS, join_all

from hps_numba.errors import HpsError, ReentryError
from hps_numba.runtime import threads
from hps_numba.runtime.reentry import ExclusiveLock, refuse_inside
from hps_numba.storage.host.store import HostStore


def test_a_thread_that_is_inside_is_refused() -> None:
    lock = ExclusiveLock("the table")
    refused = pytest.raises(ReentryError, match=r"^the table: expected a call from outside, got one from inside a change")
    with lock.held():
        with refused, lock.held():
            raise AssertionError("it came in")
        with lock.mutex:
            pass
    with lock.held():
        pass


def test_the_error_is_ours_and_a_runtime_error() -> None:
    assert issubclass(ReentryError, HpsError) and issubclass(ReentryError, RuntimeError)


def test_an_error_inside_leaves_the_lock_free() -> None:
    lock = ExclusiveLock("the table")
    with pytest.raises(ZeroDivisionError), lock.held():
        raise ZeroDivisionError
    with lock.held(), lock.held_if_free() as free:
        assert not free
    with lock.held_if_free() as free:
        assert free


def test_other_threads_wait() -> None:
    lock, order = ExclusiveLock("the table"), []

    def enter() -> None:
        with lock.held_if_free() as free:
            order.append(free)
        with lock.held():
            order.append("other")

    with lock.held():
        thread = threading.Thread(target=enter)
        thread.start()
        while not order:
            pass
        order.append("first")
    join_all(thread)
    assert order == [False, "first", "other"]


def test_what_is_held_if_free_refuses_too() -> None:
    lock = ExclusiveLock("the table")
    with lock.held_if_free() as free:
        assert free
        with pytest.raises(ReentryError), lock.held():
            raise AssertionError("it came in")


def test_a_forked_child_has_a_free_lock() -> None:
    lock = ExclusiveLock("the table")
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.held():
            held.set()
            go_on.wait(HANG_SECONDS)

    def enter() -> bool:
        with lock.held():
            return True

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(HANG_SECONDS)
    try:
        assert in_child(enter) == 0
    finally:
        go_on.set()
        join_all(thread)


def test_a_call_from_inside_a_method_of_a_part_is_refused() -> None:
    store, other = HostStore(2), HostStore(2)
    seen = []

    def watch() -> None:
        refuse_inside("x", (other, None))
        with pytest.raises(ReentryError, match=r"x: .* from inside HostStore\.upsert of the same thread"):
            refuse_inside("x", (other, store))
        seen.append(True)

    store.watch_writes(watch)

    store.upsert(np.arange(2), np.ones((2, 2), np.float32))
    assert seen == [True]
    refuse_inside("x", (store,))


def test_a_thread_that_works_for_others_is_refused() -> None:
    me = threading.get_ident()
    refused: list[bool] = []
    ready = threading.Barrier(2)

    def work(start: int, stop: int) -> int:
        ready.wait(HANG_SECONDS)
        if threading.get_ident() != me:
            with pytest.raises(ReentryError):
                refuse_inside("the server", ())
            refused.append(True)
        return 0

    assert not threads.is_pool_thread()
    threads.run_ranges(work, [(0, 1), (1, 2)], 2)
    assert refused == [True]
