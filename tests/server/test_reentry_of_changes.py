"""Changes of models, refreshes and closes from where they would wait for themselves: refused with one error, or done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, join_all

import hps_numba
from hps_numba.errors import ReentryError

DIM, KEYS = 3, np.arange(10)
CHANGES: dict[str, Callable[[hps_numba.HPS], object]] = {
    "replace": lambda server: server.replace_model("m"),
    "unload": lambda server: server.unload_model("m"),
    "policy": lambda server: server.set_policy("fifo", "m"),
    "close": lambda server: server.close(),
    "refresh": lambda server: server.refresh("m"),
}


@pytest.fixture
def server(workshop: Workshop) -> hps_numba.HPS:
    model = workshop.model((np.arange(25), DIM), deployed_device_list=[0], gpucacheper=0.5, hit_rate_threshold=1.0)
    return workshop.open(
        model, cache_on_cpu=True, volatile_db=KEEPING, persistent_db={"type": "support.fakes:DictTier"}, allow_code=True
    )


def on_thread(name: str, call: Callable[[], object]) -> None:
    """Call on the main thread or on another one; what it raises is raised."""
    if name == "main":
        call()
        return
    problems: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=guarded)
    thread.start()
    join_all(thread)
    if problems:
        raise problems[0]


def assert_serves(server: hps_numba.HPS) -> None:
    """Whatever was refused, everything works on."""
    server.insert(KEYS, rows_of(KEYS, DIM, 9), "m", 0)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM, 9))
    server.replace_model("m")
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    server.close()
    assert server.closed


@pytest.mark.parametrize("thread", ["main", "other"])
@pytest.mark.parametrize("change", CHANGES)
def test_inside_a_step(server: hps_numba.HPS, change: str, thread: str) -> None:
    refused = []

    def step(rows: np.ndarray, found: np.ndarray) -> np.ndarray:
        with pytest.raises(ReentryError, match="expected a call from outside"):
            CHANGES[change](server)
        refused.append(change)
        return rows

    on_thread(thread, lambda: server.read_modify_write(KEYS, step, "m", 0))
    assert refused == [change]
    assert_serves(server)


@pytest.mark.parametrize("thread", ["main", "other"])
def test_inside_a_locked_table(server: hps_numba.HPS, thread: str) -> None:
    def call() -> None:
        with server.locked_table("m", 0) as (_, rows):
            with pytest.raises(ReentryError, match="from inside locked_table"):
                server.replace_model("m")
            server.refresh("m")
            server.set_policy("fifo", "m")
            server.insert([3], rows_of(np.array([3]), DIM, 5), "m", 0)
            assert_same_bits(rows(np.array([3])), rows_of(np.array([3]), DIM, 5))

    on_thread(thread, call)
    assert_serves(server)


@pytest.mark.parametrize("change", CHANGES)
def test_a_tier_that_changes_its_server_while_it_is_filled(
    server: hps_numba.HPS, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a replacement, on the thread that does it, which would go on with what the inner call had closed."""
    tier, refused = slower_tier(server), []
    insert = tier.insert

    def reentering(*given: Any) -> None:
        with pytest.raises(ReentryError, match="expected a call from outside"):
            CHANGES[change](server)
        refused.append(change)
        insert(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tier, "insert", reentering)
        server.replace_model("m")
    assert refused
    assert_serves(server)


@pytest.mark.parametrize("where", ["timer", "background"])
@pytest.mark.parametrize("change", ["replace", "unload", "close"])
def test_on_a_thread_that_a_close_waits_for(server: hps_numba.HPS, change: str, where: str) -> None:
    """As ``__del__`` and weakref callbacks run there when garbage is collected."""
    done, problems = threading.Event(), []

    def call() -> None:
        try:
            CHANGES[change](server)
        except ReentryError as problem:
            problems.append(problem)
        done.set()

    if where == "timer":
        server._loader.timer.add("here", call, delay=1e-3)
    else:
        assert server._catalog.model("m")._jobs.submit(call)
    assert done.wait(HANG_SECONDS) and len(problems) == 1
    assert_serves(server)


def test_recordings_of_a_signal_handler_inside_the_start_or_end_of_another(server: hps_numba.HPS, workshop: Workshop) -> None:
    recordings = server._recordings
    first = server.record_trace(workshop.folder / "first.npy", "m", 0)

    class Interrupted(dict[Any, Any]):
        """A handler comes when it has been iterated: the list of recordings was read and not yet published."""

        armed = True

        def __iter__(self) -> Any:
            now = list(super().__iter__())
            if self.armed:
                self.armed = False
                self["inner"] = server.record_trace(workshop.folder / "inner.npy", "m", 0)
                del self["inner"]
            return iter(now)

    recordings._tables = Interrupted(recordings._tables)
    second = server.record_trace(workshop.folder / "second.npy", "m", 0)
    assert len(recordings.active) == 3
    server.lookup(KEYS, "m", 0)
    assert (first.keys, second.keys) == (10, 10) and {recording.keys for _, recording in recordings.active} == {10}
    server.close()
    assert recordings.active == ()
