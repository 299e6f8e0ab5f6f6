"""``cache_missed_embeddings``: rows of slower tiers enter host memory in the background, unless they were written since."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.fakes import DictTier
from support.internals import served_table, wait_for_background
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.config import PersistentDatabaseConfig
from hps_numba.errors import ClosedError, HpsError
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.storage.tier_stack import TierStack

DIM = 3
TAG = "hps_et.m.sparse_embedding0"
KEYS = list(range(9))


def stats_of(server: hps_numba.HPS) -> Any:
    return server.stats()["m"]["sparse_embedding0"]


def test_rows_found_in_slower_tiers_enter_host_memory_in_the_background(workshop: Workshop) -> None:  # D04
    server, tier = workshop.open_cold(volatile=KEEPING)
    assert_same_bits(server.lookup([3, 4, 3], "m", 0), rows_of([3, 4, 3], DIM))
    wait_for_background(server)
    assert stats_of(server).rows == 2
    tier.calls.clear()
    assert_same_bits(server.lookup([4, 3], "m", 0), rows_of([4, 3], DIM))
    assert not tier.calls
    assert (stats_of(server).host_hits, stats_of(server).tier_hits) == (2, 3)


def test_keys_in_no_tier_are_not_kept(workshop: Workshop) -> None:  # D04
    server, tier = workshop.open_cold(volatile=KEEPING)
    assert (server.lookup([50, 51, 50], "m", 0) == -7.5).all()
    server.lookup([1, 52], "m", 0)
    wait_for_background(server)
    assert stats_of(server).rows == 1
    tier.insert(TAG, np.array([50]), rows_of([50], DIM))
    assert_same_bits(server.lookup([50], "m", 0), rows_of([50], DIM))


@pytest.mark.parametrize("change", ["erase", "update", "insert", "load_dump", "replace_model"])
def test_a_row_written_after_its_fetch_does_not_come_back(workshop: Workshop, change: str) -> None:  # D04
    server, tier = workshop.open_cold("support.fakes:HeldTier", volatile=KEEPING)
    dump = workshop.folder / "new.bin"
    other = DictTier(PersistentDatabaseConfig())
    other.insert(TAG, np.array([3]), rows_of([3], DIM, 1))
    other.dump(TAG, dump)
    new_version = workshop.table("v2", [3], DIM, 1)
    old: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: old.append(server.lookup([3, 4], "m", 0)))
    reader.start()
    assert tier.fetched.wait(HANG_SECONDS)
    changes: dict[str, Any] = {
        "erase": lambda: server.erase([3], "m", 0),
        "update": lambda: server.update([3], rows_of([3], DIM, 1), "m", 0),
        "insert": lambda: server.insert([3], rows_of([3], DIM, 1), "m", 0),
        "load_dump": lambda: server.load_dump(dump, "m", 0),
        "replace_model": lambda: server.replace_model("m", [new_version]),
    }
    changes[change]()
    tier.go_on.set()
    join_all(reader)
    wait_for_background(server)
    assert_same_bits(old[0], rows_of([3, 4], DIM))  # the answer is that of the time of the lookup
    expected = np.full((1, DIM), -7.5, np.float32) if change == "erase" else rows_of([3], DIM, 1)
    assert_same_bits(server.lookup([3], "m", 0), expected)
    if change == "replace_model":
        assert (server.lookup([4], "m", 0) == -7.5).all()


def test_a_row_that_a_new_version_drops_is_not_kept(workshop: Workshop) -> None:  # D04
    server, tier = workshop.open_cold("support.fakes:HeldEraseTier", volatile=KEEPING)
    new_version = workshop.table("v2", [3], DIM, 1)
    writer = threading.Thread(target=lambda: server.replace_model("m", [new_version]))
    writer.start()
    assert tier.erasing.wait(HANG_SECONDS)
    server.lookup([4], "m", 0)  # finds the old row in the slower tier, just before it is dropped there
    tier.go_on.set()
    join_all(writer)
    wait_for_background(server)
    assert (server.lookup([4], "m", 0) == -7.5).all()


def test_keeping_rows_never_waits_for_a_write(workshop: Workshop) -> None:
    server, _ = workshop.open_cold(volatile=KEEPING)
    table = served_table(server)
    locked, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with table.writes.changing():  # as an insert does that waits for a slow tier
            locked.set()
            assert go_on.wait(HANG_SECONDS)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert locked.wait(HANG_SECONDS)
        server.lookup([3], "m", 0)
        wait_for_background(server)
        assert stats_of(server).rows == 0
        server.close()
    finally:
        go_on.set()
        join_all(writer)


def test_a_job_that_cannot_start_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    jobs = BackgroundJobs()
    ran: list[int] = []
    with monkeypatch.context() as broken:
        broken.setattr("threading.Thread.start", refuse)
        for _ in range(2 * jobs.LIMIT):
            jobs.submit(lambda: ran.append(0))
    done = threading.Event()
    jobs.submit(lambda: ran.append(1))
    jobs.submit(done.set)  # one thread: runs after it
    assert done.wait(HANG_SECONDS)
    jobs.close()
    assert ran == [1]


def look_up_during_close(server: hps_numba.HPS, tier: Any, outcome: list[Any]) -> threading.Thread:
    """A thread that is in the tier's fetch."""

    def look_up() -> None:
        try:
            outcome.append(server.lookup([3], "m", 0))
        except HpsError as problem:
            outcome.append(problem)

    reader = threading.Thread(target=look_up)
    reader.start()
    assert tier.fetched.wait(HANG_SECONDS)
    return reader


def test_close_waits_for_a_fetch_in_progress(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TierStack, "GRACE_SECONDS", HANG_SECONDS)
    server, tier = workshop.open_cold("support.fakes:HeldTier", volatile=KEEPING)
    outcome: list[Any] = []
    reader = look_up_during_close(server, tier, outcome)
    closer, stack = threading.Thread(target=server.close), server._loader.slower
    with caplog.at_level(logging.WARNING):
        closer.start()
        wait_until(lambda: stack._closed)
        assert not closer.join(0.05) and not tier.closed
        with pytest.raises(ClosedError):
            server.lookup([4], "m", 0)
        tier.go_on.set()
        join_all(closer)
    join_all(reader)
    assert tier.closed
    assert_same_bits(outcome[0], rows_of([3], DIM))
    assert not caplog.records


def test_a_lookup_that_ends_after_close_does_not_fail_in_the_background(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TierStack, "GRACE_SECONDS", 0.05)
    before = set(threading.enumerate())
    server, tier = workshop.open_cold("support.fakes:HeldTier", volatile=KEEPING)
    outcome: list[Any] = []

    reader = look_up_during_close(server, tier, outcome)
    server.close()
    assert tier.closed
    assert [r.getMessage() for r in caplog.records] == ["slower tiers: closed during 1 reads that took over 0.05 s"]
    tier.go_on.set()
    join_all(reader)
    if not isinstance(outcome[0], ClosedError):
        assert_same_bits(outcome[0], rows_of([3], DIM))
    made = set(threading.enumerate()) - before
    assert not [thread for thread in made if thread.name.startswith("hps_numba_background")]


_FORK = """
import os, signal, sys, threading
import numpy as np
from support.factories import KEEPING, Workshop
from support.internals import served_table, wait_for_background
from support.waiting import HANG_SECONDS, join_all
from pathlib import Path

shop = Workshop(Path(sys.argv[1]))
server, tier = shop.open_cold("support.fakes:HeldTier", volatile=KEEPING)
tier.fetched.set()                                    # the first fetch does not wait
server.lookup([0], "m", 0)
wait_for_background(server)                           # now there is a thread, which a child lacks
tier.fetched.clear()
reader = threading.Thread(target=server.lookup, args=([1], "m", 0))
reader.start()                                        # a read that never ends in a child
assert tier.fetched.wait(HANG_SECONDS)
locked, go_on = threading.Event(), threading.Event()

def write():
    with served_table(server).writes.changing():      # a lock that nobody releases in a child
        locked.set()
        go_on.wait(HANG_SECONDS)

writer = threading.Thread(target=write)
writer.start()
assert locked.wait(HANG_SECONDS)
child = os.fork()
if child == 0:
    signal.alarm(int(HANG_SECONDS))
    for key in (2, 3, 4):
        server.lookup([key], "m", 0)
        wait_for_background(server)
    kept = server.stats()["m"]["sparse_embedding0"].rows
    server.insert([5], np.ones((1, 3), np.float32), "m", 0)
    server.close()
    os._exit(0 if kept == 4 else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
go_on.set()
tier.go_on.set()
join_all(writer, reader)
server.close()
assert status == 0, f"child failed: {status}"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_keeps_rows_writes_and_closes(workshop: Workshop) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", _FORK, str(workshop.folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
