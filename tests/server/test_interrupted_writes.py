"""Ctrl-C during a write leaves every tier and every cache with the same rows: the old ones or the new ones."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.internals import slower_tier
from support.interrupts import interrupted_everywhere
from support.oracles import rows_of

import hps_numba
from hps_numba.errors import ReentryError

DIM = 3
KEYS = np.arange(40)
CALLERS = ("server/hps.py", "server/writes.py", "server/table_writes.py", "server/table_caches.py", "runtime/shielded.py")
ROUNDS = int(os.environ.get("HPS_NUMBA_LONG_TESTS", "0")) or 15


def open_server(workshop: Workshop, keys: Any = KEYS, **top: Any) -> hps_numba.HPS:
    entry = {"deployed_device_list": [0], "gpucacheper": 0.9, "max_batch_size": 64}
    return workshop.open(workshop.model((keys, DIM), **entry), cache_on_cpu=True, **top)


def write(server: hps_numba.HPS, verb: str, keys: np.ndarray, stamp: int) -> None:
    if verb == "insert":
        server.insert(keys, rows_of(keys, DIM, stamp), "m", 0)
    elif verb == "update":
        server.update(keys, rows_of(keys, DIM, stamp), "m", 0)
    elif verb == "erase":
        server.erase(keys, "m", 0)
    elif verb == "read_modify_write":
        server.read_modify_write(keys, lambda rows, found: rows_of(keys, DIM, stamp), "m", 0)
    else:
        server.refresh("m")


def everywhere(server: hps_numba.HPS, keys: np.ndarray) -> np.ndarray:
    """The rows as the cache answers, which are those of host memory and of the slower tier."""
    table = server._catalog.table("m", 0)
    served = server.lookup(keys, "m", 0)
    rows, found = table.writes.read(keys)
    assert np.array_equal(served, rows), "cache and host memory differ"
    assert np.array_equal(found, server.contains(keys, "m", 0))
    if table.slow_path is not None:
        fetched = np.full_like(rows, -7.5)
        answer = slower_tier(server).fetch(table.spec.tag, keys, fetched)
        assert np.array_equal(answer.found, found) and np.array_equal(fetched, rows), "tiers differ"
    return served


@pytest.mark.parametrize("tier", [False, True])
@pytest.mark.parametrize("verb", ["insert", "update", "erase", "read_modify_write", "refresh"])
def test_an_interrupt_at_any_bytecode_leaves_all_rows_old_or_new(workshop: Workshop, verb: str, tier: bool) -> None:
    top = {"volatile_db": {"type": "hash_map"}, "persistent_db": {"type": "support.fakes:DictTier"}} if tier else {}
    server = open_server(workshop, **top)
    some, stamp, states = KEYS[5:25], 1, {"old": 0, "new": 0}
    default = np.full((len(some), DIM), -7.5, np.float32)
    server.insert(KEYS, rows_of(KEYS, DIM, 0), "m", 0)

    def change() -> None:
        write(server, verb, some, stamp)

    for interrupt in interrupted_everywhere(change, *CALLERS, step=3):
        assert isinstance(interrupt, KeyboardInterrupt)
        server.insert(KEYS[:1], rows_of(KEYS[:1], DIM, 0), "m", 0)  # waits for a write that goes on
        rows = everywhere(server, KEYS)[5:25]
        new = default if verb == "erase" else rows_of(some, DIM, stamp)
        is_new = np.array_equal(rows, new)
        assert is_new or np.array_equal(rows, rows_of(some, DIM, 0))
        states["new" if is_new else "old"] += 1
        server.insert(some, rows_of(some, DIM, 0), "m", 0)
    assert states["old"] > 5 and (states["new"] > 5 or verb == "refresh")


class Interrupts:
    """Interrupts the main thread at a random moment of a call, as Ctrl-C does."""

    def __init__(self) -> None:
        self.armed, self.raised = False, 0
        self.rng = np.random.default_rng(5)

    def _on_signal(self, *_: object) -> None:
        if self.armed:
            self.armed = False
            self.raised += 1
            raise KeyboardInterrupt

    def during(self, call: Callable[[], object], seconds: float) -> None:
        before = signal.signal(signal.SIGUSR1, self._on_signal)
        main, delay = threading.main_thread().ident, float(self.rng.uniform(0, seconds))
        timer = threading.Timer(delay, lambda: signal.pthread_kill(main or 0, signal.SIGUSR1))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                try:
                    self.armed = True
                    timer.start()
                    call()
                finally:
                    self.armed = False
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, before)


# a signal may arrive inside a weakref callback, where Python reports what is raised and goes on
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals that reach one thread")
@pytest.mark.parametrize("verb", ["update", "insert", "erase", "read_modify_write", "refresh"])
def test_signals_at_random_moments_leave_cache_and_store_alike(workshop: Workshop, verb: str) -> None:  # I: 2 of 27
    keys = np.arange(20_000)
    server = open_server(workshop, keys)
    interrupts = Interrupts()
    for stamp in range(1, ROUNDS + 1):
        interrupts.during(lambda stamp=stamp: write(server, verb, keys, stamp), 0.01)
        server.insert(keys[:1], rows_of(keys[:1], DIM, 0), "m", 0)
        everywhere(server, keys)
        if verb == "erase":
            server.insert(keys, rows_of(keys, DIM, 0), "m", 0)
    server.close()


def test_a_write_inside_the_function_of_a_read_modify_write_is_refused(workshop: Workshop) -> None:
    server = open_server(workshop)
    before = everywhere(server, KEYS)

    def change(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
        server.insert(KEYS[:3], rows[:3], "m", 0)
        return rows + 1

    with pytest.raises(ReentryError):
        server.read_modify_write(KEYS, change, "m", 0)
    assert np.array_equal(everywhere(server, KEYS), before)


def test_writes_inside_a_locked_table_are_made_by_the_thread_that_locked_it(workshop: Workshop) -> None:
    server = open_server(workshop)
    with server.locked_table("m", 0) as (keys, _):
        server.update(keys, rows_of(keys, DIM, 4), "m", 0)
    assert np.array_equal(everywhere(server, KEYS), rows_of(KEYS, DIM, 4))
