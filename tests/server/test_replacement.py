"""Replacements of a model in service: every answer is of one version, no lookup waits, and nothing is left half done."""

from __future__ import annotations

import os
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.internals import bytes_held, served_model, slower_tier, wait_for_release
from support.interrupts import in_finalizer
from support.oracles import assert_same_bits, rows_of
from support.services import DIM, Service
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.errors import CapacityError, ClosedError, ConfigError

ROWS = 3000
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"gpucacheper": 0.3},
    "whole": {"gpucacheper": 1.0},
    "cold": {"gpucacheper": 0.3, "init_ec": False},
    "static": {"embedding_cache_type": "static"},
    "uvm": {"embedding_cache_type": "uvm", "gpucacheper": 0.4},
    "staged": {"gpucacheper": 0.3, "miss_path": "staged"},
    "counting": {"gpucacheper": 0.3, "cache_policy": "tinylfu"},
    "none": {"gpucache": False},
}
#: the long form: an interrupt at each line, instead of the first hundred and every fortieth part of the way further
EVERY_LINE = "HPS_NUMBA_EVERY_LINE" in os.environ


def versioned(folder: Any, version: int, tables: int, rows: int = ROWS) -> list[str]:
    """Sparse models in which every element of every row is the number of the version."""
    paths = []
    for table in range(tables):
        path = folder / f"v{version}_{table}"
        if not path.exists():
            hps_numba.write_model(path, DIM, [(np.arange(rows), np.full((rows, DIM), version, np.float32))])
        paths.append(str(path))
    return paths


def opened(service: Service, tables: int = 1, **entry: Any) -> hps_numba.HPS:
    server = service.open(*[(range(ROWS), DIM)] * tables, max_batch_size=ROWS, **entry)
    server.replace_model("m", versioned(service.workshop.folder, 1, tables))
    return server


def versions_in(rows: Any) -> set[float]:
    return set(np.unique(rows).tolist())


@contextmanager
def in_threads(*works: Callable[[], object]) -> Iterator[threading.Event]:
    """Each ``work`` over and over on a thread of its own, until the block ends; what one raises fails the test."""
    stop, problems = threading.Event(), []

    def run(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as problem:
            problems.append(problem)
            stop.set()

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        join_all(*threads)
    assert not problems, problems[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


# --- one version ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_during_replacements_is_of_one_version(service: Service, kind: str) -> None:
    server = opened(service, **KINDS[kind])
    files = [versioned(service.workshop.folder, version, 1) for version in (1, 2)]
    random = [np.random.default_rng(number) for number in range(3)]
    offsets = np.array([0, 700, 1500])
    answers = [0, 0, 0]

    def look_up(number: int) -> None:
        keys = service.keys(random[number].integers(0, ROWS, 1500))
        if number == 2:
            rows = service.on_host(
                server.lookup_pooled(keys, service.keys(offsets), "m", 0, service.device or 0, combiner="mean")
            )
        else:
            rows = service.on_host(server.lookup(keys, "m", 0, service.device or 0))
        assert len(versions_in(rows)) == 1, versions_in(rows)
        answers[number] += 1

    with in_threads(*(lambda number=number: look_up(number) for number in range(3))) as stop:  # type: ignore[misc]
        wait_until(lambda: min(answers) > 0 or stop.is_set())  # all kernels are compiled, and every thread is at work
        for number in range(1, 41):
            if stop.is_set():
                break
            server.replace_model("m", files[number % 2])
            now = 1.0 + number % 2
            rows = service.on_host(server.lookup(service.keys(range(ROWS)), "m", 0, service.device or 0))
            assert versions_in(rows) == {now}
    assert min(answers) > 0


@pytest.mark.parametrize("kind", ["dynamic", "whole", "none"])
def test_lookup_many_during_replacements_is_of_one_version(service: Service, kind: str) -> None:
    server = opened(service, 4, **KINDS[kind])
    files = [versioned(service.workshop.folder, version, 4) for version in (1, 2)]
    random = [np.random.default_rng(number) for number in range(2)]

    def look_up(number: int) -> None:
        keys = [service.keys(random[number].integers(0, ROWS, 700)) for _ in range(4)]
        rows = [service.on_host(some) for some in server.lookup_many(keys, "m", service.device or 0)]
        assert len(versions_in(np.concatenate(rows))) == 1

    with in_threads(lambda: look_up(0), lambda: look_up(1)) as stop:
        for number in range(1, 31):
            if stop.is_set():
                break
            server.replace_model("m", files[number % 2])
    assert served_model(server).version == 32


def test_counts_add_up_after_replacements_beside_lookups(service: Service) -> None:
    server = opened(service, **KINDS["dynamic"])
    files = [versioned(service.workshop.folder, version, 1) for version in (1, 2)]
    asked: list[int] = []  # one entry a call: threads that add to one number lose some
    before = server.stats()["m"]["sparse_embedding0"].keys

    def look_up() -> None:
        service.on_host(server.lookup(service.keys(range(0, ROWS, 3)), "m", 0, service.device or 0))  # done, so counted
        asked.append(len(range(0, ROWS, 3)))

    with in_threads(look_up):
        for number in range(1, 11):
            server.replace_model("m", files[number % 2])
    stats = server.stats()["m"]["sparse_embedding0"]
    assert stats.keys - before == sum(asked)
    assert stats.keys == stats.cache_hits + stats.host_hits + stats.absent


# --- nobody waits -----------------------------------------------------------------------------------------------------


class Stopped:
    """Stops a thread where it calls a method, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def stopped(*args: Any, **named: Any) -> Any:
            self.reached.set()
            assert self.go.wait(HANG_SECONDS)
            return original(*args, **named)

        monkeypatch.setattr(owner, name, stopped)


@contextmanager
def replacing(server: hps_numba.HPS, files: list[str]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=server.replace_model, args=("m", files), daemon=True)
    thread.start()
    yield thread
    join_all(thread)
    assert not thread.is_alive()


STEPS = {
    "loading": ("hps_numba.server.replacement.new_version", False),
    "waiting for lookups": ("hps_numba.cache.workspace_set.WorkspaceSet.drain", True),
    "filling the caches": ("hps_numba.cache.warming.Warming.warm", True),
    "releasing old rows": ("hps_numba.storage.host.store.HostStore.retire", True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_lookup_waits_for_a_replacement(service: Service, monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    server = opened(service, 2, **KINDS[kind])
    path, turned = STEPS[step]
    owner, _, name = path.rpartition(".")
    stop = Stopped(monkeypatch, pkgutil.resolve_name(owner), name)
    expected = {2.0 if turned else 1.0}
    keys = service.keys(range(ROWS))
    with replacing(server, versioned(service.workshop.folder, 2, 2)):
        assert stop.reached.wait(HANG_SECONDS)
        for _ in range(2):
            assert versions_in(service.on_host(server.lookup(keys, "m", 0, service.device or 0))) == expected
            many = server.lookup_many([keys, keys], "m", service.device or 0)
            assert versions_in(np.concatenate([service.on_host(rows) for rows in many])) == expected
            offsets = service.keys([0, 10, ROWS])
            pooled = server.lookup_pooled(keys, offsets, "m", 1, service.device or 0, combiner="mean")
            assert versions_in(service.on_host(pooled)) == expected
            assert server.lookup([1], "m", 0)[0, 0] in expected
        stop.go.set()


# --- interrupts -------------------------------------------------------------------------------------------------------


class Interrupt(KeyboardInterrupt):
    """What the tests raise between two lines."""


def interrupted_after(lines: int, call: Callable[[], object]) -> bool:
    """Call, with an interrupt before the line of this package that the thread reaches after so many; whether it came."""
    left = [lines]

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_globals.get("__name__", "").startswith("hps_numba") or in_finalizer(frame):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("kind", ["dynamic", "none"])
def test_an_interrupt_at_any_line_of_replace_model_leaves_one_version(service: Service, kind: str) -> None:
    server = opened(service, 2, **KINDS[kind])
    files = [versioned(service.workshop.folder, version, 2, 300) for version in (3, 4)]
    server.replace_model("m", files[1])
    in_use, version, lines, last = bytes_held(server), served_model(server).version, 0, 4.0
    while True:
        lines += 1
        new = files[0 if last == 4.0 else 1]
        if not interrupted_after(lines, lambda new=new: server.replace_model("m", new)):  # type: ignore[misc]
            break
        rows = server.lookup_many([range(300), range(300)], "m")
        (found,) = versions_in(np.concatenate(rows))
        assert (found == last) == (served_model(server).version == version)
        last, version = found, served_model(server).version
    assert lines > 15
    wait_for_release(server, in_use, headers=8)
    server.replace_model("m", files[0])
    assert versions_in(server.lookup(range(300), "m", 1)) == {3.0}
    server.close()


def test_an_interrupt_at_any_line_of_load_model_and_unload_model_leaves_the_model_or_none(service: Service) -> None:
    server = opened(service, **KINDS["dynamic"])
    added = service.model((range(30), DIM), name="added", gpucacheper=1.0)
    in_use, lines = bytes_held(server), 0
    done = {True: False, False: False}
    while not all(done.values()):
        lines += 1
        for load in (True, False):
            if ("added" in server.models) == load:
                continue
            call = (lambda: server.load_model(added)) if load else (lambda: server.unload_model("added"))
            done[load] = not interrupted_after(lines, call) or done[load]
            if "added" in server.models:
                assert_same_bits(server.lookup(range(30), "added", 0), rows_of(range(30), DIM))
            else:
                wait_for_release(server, in_use, headers=8)
        if not EVERY_LINE and lines > 100:
            lines += lines // 40
    assert lines > 15
    server.lookup([1], "m", 0)


def test_close_after_an_interrupted_close_has_closed_everything(service: Service) -> None:
    lines, again = 0, True
    while again:
        lines += 1
        server = opened(service, persistent="support.fakes:DictTier", **KINDS["dynamic"])
        tier = slower_tier(server)
        again = interrupted_after(lines, server.close)
        server.close()
        assert tier.closed
        wait_for_release(server, 64, headers=8)
        with pytest.raises(ClosedError):
            server.lookup([1], "m", 0)
        if lines > 12:
            lines += lines // 6
    assert lines > 15


@pytest.mark.parametrize("step", ["loading", "making stand-ins", "holding", "turning"])
def test_a_problem_before_the_turn_leaves_the_old_version(service: Service, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    owner, name = {
        "loading": ("hps_numba.server.table_loading.TableLoading", "load_store"),
        "making stand-ins": ("hps_numba.server.table_caches.TableCaches", "stand_ins"),
        "holding": ("hps_numba.server.table_caches.TableCaches", "hold"),
        "turning": ("hps_numba.storage.host.store.HostStore", "switch_to"),
    }[step]
    server = opened(service, 3, **KINDS["dynamic"])
    in_use, keys = bytes_held(server), service.keys(range(ROWS))
    kind, calls = pkgutil.resolve_name(owner), []
    original = getattr(kind, name)

    def failing(*args: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 3:
            raise CapacityError("none for this test")
        return original(*args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(kind, name, failing)
        with pytest.raises(CapacityError, match="none for this test"):
            server.replace_model("m", versioned(service.workshop.folder, 2, 3))
    for expected in (1.0, 2.0):
        for table in range(3):
            assert versions_in(service.on_host(server.lookup(keys, "m", table, service.device or 0))) == {expected}
        if expected == 1.0:
            wait_for_release(server, in_use, headers=8)
            server.insert([1], np.full((1, DIM), 1.0), "m", 0)
            server.replace_model("m", versioned(service.workshop.folder, 2, 3))


# --- closing ----------------------------------------------------------------------------------------------------------


def test_close_ends_a_load_in_progress_and_refuses_others(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(service, **KINDS["dynamic"])
    stop = Stopped(monkeypatch, pkgutil.resolve_name("hps_numba.storage.host.content.TableContent"), "fill")
    problems: list[str] = []

    def replace() -> None:
        with pytest.raises(ClosedError) as caught:
            server.replace_model("m", versioned(service.workshop.folder, 2, 1))
        problems.append(str(caught.value))

    threads = [threading.Thread(target=replace, daemon=True) for _ in range(3)]
    threads[0].start()
    assert stop.reached.wait(HANG_SECONDS)
    for thread in threads[1:]:
        thread.start()
    closing = threading.Thread(target=server.close, daemon=True)
    closing.start()
    wait_until(lambda: server._loader.jobs.closing)
    with pytest.raises(ClosedError, match="the server is closed"):
        server.load_model(service.model((range(3), DIM), name="late"))
    stop.go.set()
    join_all(*threads, closing)
    assert len(problems) == 3
    wait_for_release(server, 64, headers=8)


def test_stats_beside_replacements_and_unloads_never_raise(service: Service) -> None:
    server = opened(service, **KINDS["dynamic"])
    files = [versioned(service.workshop.folder, version, 1) for version in (1, 2)]
    added = service.model((range(30), DIM), name="added")

    def change() -> None:
        server.load_model(added)
        server.unload_model("added")

    with in_threads(change, server.stats, lambda: server.host_bytes):
        for number in range(1, 21):
            server.replace_model("m", files[number % 2])


def test_a_recording_that_fills_during_load_model_does_not_wait(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(service, **KINDS["dynamic"])
    stop = Stopped(monkeypatch, pkgutil.resolve_name("hps_numba.storage.host.content.TableContent"), "fill")
    added = service.model((range(30), DIM), name="added")
    loading = threading.Thread(target=server.load_model, args=(added,), daemon=True)
    with server.record_trace(service.workshop.folder / "trace.npy", "m", 0, limit=1000) as recording:
        loading.start()
        assert stop.reached.wait(HANG_SECONDS)
        server.lookup(service.keys(range(ROWS)), "m", 0, service.device or 0)
        assert recording.done
        assert not stop.go.is_set()
        stop.go.set()
    join_all(loading)
    assert "added" in server.models


@pytest.mark.parametrize("files", [5, [5], [None], object()])
def test_files_that_are_no_paths_are_refused(service: Service, files: Any) -> None:
    server = opened(service)
    with pytest.raises(ConfigError, match="sparse_files"):
        server.replace_model("m", files)
