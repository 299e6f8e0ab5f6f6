"""Replays of captured graphs beside replacements: each sees one version, and nothing waits for ever."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.internals import served_model, served_table
from support.interrupts import interrupted_everywhere
from support.oracles import assert_same_bits, rows_of
from support.services import DIM, Service
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.errors import ClosedError, DeviceError, HpsError, ReentryError, UnknownModelError
from hps_numba.server import replays as module
from hps_numba.server.replays import ReplayedWork, Replaying, Replays

ROWS = 3000
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"gpucacheper": 0.3},
    "whole": {"gpucacheper": 1.0},
    "static": {"embedding_cache_type": "static"},
    "uvm": {"embedding_cache_type": "uvm", "gpucacheper": 0.4},
    "counting": {"gpucacheper": 0.3, "cache_policy": "tinylfu"},
}


class PlayedDevice:
    """A backend whose streams do their work when the test says so."""

    ordinal = 41

    def __init__(self) -> None:
        self.capturing: set[int] = set()
        self.queued: dict[int, int] = {}  # work on each stream that is not done
        self.events: dict[int, dict[int, int]] = {}  # streams that each event waits for

    def launch(self, stream: int) -> None:
        self.queued[stream] = self.queued.get(stream, 0) + 1

    def finish(self) -> None:
        self.queued.clear()

    def current(self) -> Any:
        return nullcontext()

    def is_capturing(self, stream: int) -> bool:
        return stream in self.capturing

    def new_event(self) -> int:
        event = 1000 + len(self.events)
        self.events[event] = {}
        return event

    def wait(self, stream: int, event: int) -> None:
        if not self.event_done(event):
            self.queued[stream] = self.queued.get(stream, 0) + 1

    def record(self, event: int, stream: int) -> None:
        self.events[event] = {stream: self.queued.get(stream, 0)}

    def event_done(self, event: int) -> bool:
        return not any(self.queued.get(stream, 0) for stream in self.events[event])

    def destroy_event(self, event: int) -> None:
        del self.events[event]


class Rig:
    """The replays of a model on a played device."""

    def __init__(self) -> None:
        self.device, self.replays = PlayedDevice(), Replays("m")
        self.work = ReplayedWork(0, self.device, ())  # type: ignore[arg-type]
        self.replays._works[0] = self.work

    def replaying(self, stream: int = 7) -> Replaying:
        def explain(problem: ClosedError) -> Any:
            raise problem

        return Replaying(self.replays, self.work, stream, explain)

    def is_held(self) -> bool:
        return self.replays._asked


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(module, "_LIMIT_SECONDS", HANG_SECONDS)
    monkeypatch.setattr(module, "_CLOSE_SECONDS", HANG_SECONDS)
    return Rig()


@contextmanager
def thread_of(work: Callable[[], object]) -> Iterator[threading.Event]:
    """``work`` on a thread, which has ended after the block; gives what is set when it ends."""
    ended, problems = threading.Event(), []

    def run() -> None:
        try:
            work()
        except BaseException as problem:
            problems.append(problem)
        ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield ended
    join_all(thread)
    assert not problems, problems[0]


# --- who waits for whom -----------------------------------------------------------------------------------------------


def test_a_change_waits_for_an_open_block_and_then_for_its_work(rig: Rig) -> None:
    with rig.replaying():
        rig.device.launch(7)
        with thread_of(rig.replays.hold_back) as held:
            wait_until(rig.is_held)
            rig.replays.let_in()  # the block below is nested, and waits for nothing in any case
            with rig.replaying():
                assert not held.is_set()
            leave = ExitStack()
            leave.enter_context(rig.replaying(8))
            leave.close()
            assert not held.is_set()
            rig.replays.leave(next(iter(rig.replays._open)))
            assert not held.wait(0.05), "its work is not done"
            rig.device.finish()
            assert held.wait(HANG_SECONDS)


@pytest.mark.parametrize("stop", [False, True])
def test_a_block_waits_until_the_change_is_done(rig: Rig, monkeypatch: pytest.MonkeyPatch, stop: bool) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", HANG_SECONDS)
    rig.replays.hold_back(stop=stop)

    def enter() -> None:
        with rig.replaying():
            pass

    with thread_of(enter) as entered:
        assert not entered.wait(0.05)
        rig.replays.let_in()
        assert entered.wait(HANG_SECONDS)


def test_a_stopped_block_waits_however_long_it_takes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.0)
    rig.replays.hold_back(stop=True)
    with thread_of(lambda: rig.replaying().__enter__()) as entered:
        assert not entered.wait(0.1)
        rig.replays.let_in()
        assert entered.wait(HANG_SECONDS)


def test_a_block_is_let_in_if_the_one_that_is_waited_for_needs_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of one replay waits for another one, as a collective operation of two devices does."""
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LIMIT_SECONDS", HANG_SECONDS)
    first = rig.replaying(7)
    with first:
        rig.device.launch(7)

    def second() -> None:
        with rig.replaying(8):
            rig.device.finish()

    with thread_of(rig.replays.hold_back) as held:
        wait_until(rig.is_held)
        with thread_of(second):
            pass
        assert held.wait(HANG_SECONDS)
    assert rig.is_held(), "and then blocks are held back again"


def test_a_block_that_stays_open_fails_the_change_by_its_name(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT_SECONDS", 0.05)
    leave = threading.Event()

    def stay() -> None:
        with rig.replaying():
            leave.wait(HANG_SECONDS)

    with thread_of(stay):
        wait_until(lambda: rig.replays._open)
        with pytest.raises(DeviceError, match=r"test_replays.py, in .*stay by thread \d+ is open"):
            rig.replays.hold_back()
        assert not rig.is_held()
        leave.set()
    rig.replays.hold_back()
    rig.replays.let_in()
    with rig.replaying():
        rig.device.launch(7)
    with pytest.raises(DeviceError, match="the device is at work"):
        rig.replays.hold_back(stop=True)
    assert not rig.replays._stopped


def test_what_check_raises_ends_the_wait(rig: Rig) -> None:
    def check() -> None:
        raise ClosedError("stop")

    with rig.replaying(), pytest.raises(ClosedError, match="stop"):
        rig.replays.hold_back(check)
    assert not rig.is_held()


def test_nested_blocks_and_those_of_other_threads_are_counted(rig: Rig) -> None:
    outer = rig.replaying()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with outer:  # the same object
            inside.set()
            leave.wait(HANG_SECONDS)

    with outer:
        with thread_of(other):
            assert inside.wait(HANG_SECONDS)
            with outer, rig.replaying(8):
                assert len(rig.replays._open) == 4
            assert len(rig.replays._open) == 2
            leave.set()
        assert len(rig.replays._open) == 1
    assert not rig.replays._open


def test_a_stream_that_has_the_handle_of_a_former_one_is_waited_for_with_it(rig: Rig) -> None:
    with rig.replaying(7):
        rig.device.launch(7)
    queued = rig.device.queued.pop(7)  # the stream was destroyed, its work goes on; another one gets the handle
    rig.device.queued[-7] = queued
    rig.device.events = {event: {-7: queued} for event in rig.device.events}
    with rig.replaying(7):
        pass
    assert not rig.work.is_done()
    rig.device.finish()
    assert rig.work.is_done()


def test_a_stream_that_is_captured_is_refused_and_gets_no_event(rig: Rig) -> None:
    rig.device.capturing.add(7)
    with pytest.raises(DeviceError, match="being captured"), rig.replaying(7):
        raise AssertionError
    assert not rig.device.events and not rig.replays._open


def test_a_device_that_refuses_the_event_leaves_no_block_open(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(event: int, stream: int) -> None:
        raise DeviceError("for this test")

    with pytest.raises(DeviceError, match="for this test"), rig.replaying():
        monkeypatch.setattr(rig.device, "record", fail)
    assert not rig.replays._open


def test_close_refuses_blocks_and_waits_for_open_ones(rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    leave = threading.Event()

    def stay() -> None:
        with rig.replaying():
            leave.wait(HANG_SECONDS)

    with thread_of(stay):
        wait_until(lambda: rig.replays._open)
        rig.replays._asked = True

        def refused() -> None:
            with pytest.raises(ClosedError), rig.replaying():
                raise AssertionError

        with thread_of(refused), thread_of(rig.replays.close) as closed:
            assert not closed.wait(0.05)
            leave.set()
            assert closed.wait(HANG_SECONDS)
    assert not rig.device.events
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.0)
    rig.replays._open[object()] = None  # type: ignore[index]
    monkeypatch.setattr(rig.replays, "_is_idle", lambda: False)
    monkeypatch.setattr(rig.replays, "_late", lambda seconds: "late")
    rig.replays.close()
    assert caplog.messages == ["late"]


# --- interrupts -------------------------------------------------------------------------------------------------------

FILES = ("server/replays.py", "runtime/blocks.py")


@pytest.mark.parametrize("step", ["kept", "dropped", "loop"])
def test_an_interrupt_anywhere_keeps_no_block_open_and_loses_no_work(rig: Rig, step: str) -> None:
    guard = rig.replaying()
    kept: list[Any] = []
    launched = [0]

    def call() -> None:
        with rig.replaying() if step != "loop" else guard:
            rig.device.launch(7)
            launched[0] += 1

    if step == "loop":  # in one function, which goes on with the same object
        for interrupt in _interrupted_loop(guard, rig.device, launched):
            kept.append(interrupt)
            with guard:
                pass
            check_idle(rig)
    else:
        for interrupt in interrupted_everywhere(call, *FILES):
            kept += [interrupt] if step == "kept" else []  # with the variables of the call, as a notebook does
            check_idle(rig)
    assert launched[0] > 20
    assert step == "dropped" or len(kept) > 100


def _interrupted_loop(guard: Replaying, device: PlayedDevice, launched: list[int]) -> Iterator[KeyboardInterrupt | None]:
    def call() -> None:
        with guard:
            device.launch(7)
            launched[0] += 1

    yield from interrupted_everywhere(call, *FILES)


def check_idle(rig: Rig) -> None:
    """No block is open, and what was launched is waited for."""
    if rig.device.queued:
        assert not rig.replays._is_idle()
    rig.device.finish()
    assert rig.replays._is_idle() and not rig.replays._open


def test_the_same_with_statement_of_a_call_that_goes_on_ends_what_was_interrupted(rig: Rig) -> None:
    guard, problem = rig.replaying(), None

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is Replaying.__exit__.__code__ and event == "call":
            sys.settrace(None)
            raise KeyboardInterrupt
        return None

    for turn in range(2):
        try:
            with guard:
                assert len(rig.replays._open) == 1, "the one before was left"
                if turn == 0:
                    sys.settrace(trace)
        except KeyboardInterrupt as caught:
            problem = caught
            assert len(rig.replays._open) == 1
    assert problem is not None and not rig.replays._open


class Wrapped:
    """Enters a block in a function that ends long before the block does."""

    def __init__(self, block: Replaying) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._block.__enter__()

    def __exit__(self, *problem: Any) -> None:
        self._block.__exit__(*problem)


@pytest.mark.parametrize("step", ["wrapped", "stacked", "generator", "called"])
def test_a_block_that_was_entered_in_another_way_is_open_until_it_is_left(rig: Rig, step: str) -> None:
    stack = ExitStack()

    @contextmanager
    def generator() -> Iterator[None]:
        with rig.replaying():
            yield

    def enter() -> Any:
        if step == "wrapped":
            stack.enter_context(Wrapped(rig.replaying()))
        elif step == "called":
            block = rig.replaying()
            block.__enter__()
            stack.push(block)
        else:
            stack.enter_context(generator() if step == "generator" else rig.replaying())

    enter()
    gc.collect()
    assert not rig.replays._is_idle()
    stack.close()
    assert rig.replays._is_idle()


def test_an_interrupt_of_the_wait_to_enter_counts_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.replays.hold_back()

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt), rig.replaying():
        raise AssertionError
    assert not rig.replays._open


def test_a_forked_child_has_no_open_blocks_and_leaves_its_own(rig: Rig) -> None:
    leave = threading.Event()

    def stay() -> None:
        with rig.replaying():
            leave.wait(HANG_SECONDS)

    with thread_of(stay):
        wait_until(lambda: rig.replays._open)
        rig.replays._asked = True
        block = rig.replaying(8)
        rig.replays._asked = False
        block.__enter__()
        rig.replays._asked = True

        def child() -> bool:
            before = len(rig.device.events)
            block.__exit__(None, None, None)
            with Replaying(rig.replays, None, None, lambda problem: None):  # type: ignore[arg-type, return-value]
                pass
            rig.replays.hold_back(stop=True)
            return len(rig.device.events) == before

        assert in_child(child) == 0
        block.__exit__(None, None, None)
        leave.set()


# --- a server ---------------------------------------------------------------------------------------------------------


def versioned(folder: Any, version: int, tables: int = 1) -> list[str]:
    """Sparse models in which every element of every row is the number of the version."""
    paths = []
    for table in range(tables):
        path = folder / f"v{version}_{table}"
        if not path.exists():
            hps_numba.write_model(path, DIM, [(np.arange(ROWS), np.full((ROWS, DIM), version, np.float32))])
        paths.append(str(path))
    return paths


def opened(service: Service, tables: int = 1, **entry: Any) -> hps_numba.HPS:
    server = service.open(*[(range(ROWS), DIM)] * tables, max_batch_size=ROWS, **entry)
    server.replace_model("m", versioned(service.workshop.folder, 1, tables))
    return server


class PlayedGraph:
    """A lookup that a graph has captured, played on the CPU: the same kernels with the same workspace, and nothing else."""

    def __init__(self, server: hps_numba.HPS, keys: np.ndarray) -> None:
        cache = served_table(server).cache_on(None)
        assert cache is not None
        self._parts = cache.parts
        self.keys, self.rows = keys, np.empty((len(keys), DIM), np.float32)
        self._arguments = keys.ctypes.data, len(keys), self.rows.ctypes.data, 0
        cache.lookup(*self._arguments, capturing=True)
        self._workspace = self._parts.workspaces.captured[-1]

    def replay(self) -> set[float]:
        with self._parts.reading():
            self._parts.lookups._batches(self._workspace, *self._arguments, "int64", "float32", 0)
        return set(np.unique(self.rows).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_replays_during_replacements_are_of_one_version(on_cpu: Service, kind: str) -> None:
    server = opened(on_cpu, **KINDS[kind])
    files = [versioned(on_cpu.workshop.folder, version) for version in (1, 2)]
    stop, answers, mixed = threading.Event(), [0, 0], []

    def replay(number: int) -> None:
        random = np.random.default_rng(number)
        graph = PlayedGraph(server, random.integers(0, ROWS, 1500))
        while not stop.is_set():
            with server.replaying("m"):
                found = graph.replay()
            answers[number] += 1
            if len(found) > 1:
                mixed.append(found)

    with thread_of(lambda: replay(0)), thread_of(lambda: replay(1)):
        try:
            for number in range(1, 31):
                server.replace_model("m", files[number % 2])
                before = list(answers)
                wait_until(lambda before=before: all(map(int.__lt__, before, answers)))
        finally:
            stop.set()
    assert not mixed
    with server.replaying("m"):
        assert PlayedGraph(server, np.arange(ROWS)).replay() == {1.0 + 30 % 2}


@pytest.mark.parametrize("announced", [True, False])
def test_what_a_replay_sees_when_the_caches_change(on_cpu: Service, monkeypatch: pytest.MonkeyPatch, announced: bool) -> None:
    """One that is not announced may run then; one that is waits until the caches have the new version."""
    server = opened(on_cpu, **KINDS["whole"])
    graph, seen = PlayedGraph(server, np.arange(ROWS)), []
    parts = served_table(server).cache_on(None).parts  # type: ignore[union-attr]
    original = parts.link.release

    def replay() -> None:
        with server.replaying("m") if announced else nullcontext():
            seen.append(graph.replay())

    thread = threading.Thread(target=replay, daemon=True)

    def release() -> bool:
        thread.start()
        if announced:
            assert not thread.join(0.05) and thread.is_alive()
        else:
            join_all(thread)
        return original()

    monkeypatch.setattr(parts.link, "release", release)
    server.replace_model("m", versioned(on_cpu.workshop.folder, 2))
    join_all(thread)
    assert seen == [{2.0 if announced else 1.0}]


def test_a_replay_waits_for_none_of_the_filling(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    server = opened(on_cpu, **KINDS["static"])
    graph, seen = PlayedGraph(server, np.arange(ROWS)), []
    warming = served_table(server).cache_on(None).parts.warming  # type: ignore[union-attr]
    original = warming.warm

    def replay() -> None:
        with server.replaying("m"):
            seen.append(graph.replay())

    def warm() -> int:
        with thread_of(replay):
            pass
        return original()

    monkeypatch.setattr(warming, "warm", warm)
    server.replace_model("m", versioned(on_cpu.workshop.folder, 2))
    assert seen == [{2.0}]


def test_one_warning_says_what_to_do_about_graphs(on_cpu: Service, caplog: pytest.LogCaptureFixture) -> None:
    server = opened(on_cpu, **KINDS["dynamic"])
    files = [versioned(on_cpu.workshop.folder, version) for version in (1, 2)]
    caplog.clear()
    server.replace_model("m", files[1])
    assert not caplog.messages
    PlayedGraph(server, np.arange(9))
    for number in range(3):
        server.replace_model("m", files[number % 2])
    (message,) = caplog.messages
    assert "with server.replaying('m'):" in message
    other = opened(on_cpu, **KINDS["dynamic"])
    caplog.clear()
    PlayedGraph(other, np.arange(9))
    with other.replaying("m"):
        pass
    other.replace_model("m", files[1])
    assert not caplog.messages


CHANGES: dict[str, Callable[[hps_numba.HPS, Any], object]] = {
    "insert": lambda server, entry: server.insert([1], np.zeros((1, DIM), np.float32), "m", 0),
    "update": lambda server, entry: server.update([1], np.zeros((1, DIM), np.float32), "m", 0),
    "erase": lambda server, entry: server.erase([1], "m", 0),
    "read_modify_write": lambda server, entry: server.read_modify_write([1], lambda rows, found: rows, "m", 0),
    "locked_table": lambda server, entry: server.locked_table("m", 0).__enter__(),
    "refresh": lambda server, entry: server.refresh("m"),
    "replace_model": lambda server, entry: server.replace_model("m"),
    "load_model": lambda server, entry: server.load_model(entry),
    "unload_model": lambda server, entry: server.unload_model("m"),
    "set_policy": lambda server, entry: server.set_policy("lfu", "m"),
    "close": lambda server, entry: server.close(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_a_block_is_refused_and_done_after_it(on_cpu: Service, change: str) -> None:
    server = on_cpu.open((range(9), DIM))
    entry = on_cpu.model((range(3), DIM), name="other")
    with server.replaying("m"):
        with pytest.raises(ReentryError, match="replaying"):
            CHANGES[change](server, entry)
        server.lookup([1], "m", 0)
        assert server.contains([1], "m", 0).all()
    CHANGES[change](server, entry)


def test_an_open_block_stops_a_replacement_before_a_tier_changes(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT_SECONDS", 0.05)
    server, _ = on_cpu.open_cold(keys=range(ROWS))
    leave = threading.Event()

    def stay() -> None:
        with server.replaying("m"):
            leave.wait(HANG_SECONDS)

    with thread_of(stay):
        wait_until(lambda: served_model(server).replays._open)
        with pytest.raises(DeviceError, match="replaying"):
            server.replace_model("m", versioned(on_cpu.workshop.folder, 2))
        leave.set()
    assert_same_bits(server.lookup(range(0, ROWS, 2), "m", 0), rows_of(range(0, ROWS, 2), DIM))  # from the tier
    server.replace_model("m", versioned(on_cpu.workshop.folder, 2))
    assert server.lookup([5], "m", 0)[0, 0] == 2.0


def test_wrong_arguments_are_typed_errors(on_cpu: Service) -> None:
    server = on_cpu.open((range(9), DIM))
    with pytest.raises(UnknownModelError):
        server.replaying("n")
    with pytest.raises(DeviceError, match="device_id"):
        server.replaying("m", 3)
    for wrong in (None, "x", 1.5, object()):
        with pytest.raises(HpsError):
            server.replaying("m", wrong)  # type: ignore[arg-type]
    kept = server.replaying("m")
    server.unload_model("m")
    with pytest.raises(UnknownModelError, match="unloaded"), kept:
        raise AssertionError
    server.close()
    with pytest.raises(ClosedError, match="the server is closed"), kept:
        raise AssertionError
    with pytest.raises(ClosedError):
        server.replaying("m")


def test_a_closing_server_ends_a_replacement_that_waits_for_a_block(on_cpu: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", HANG_SECONDS)
    server = opened(on_cpu, **KINDS["dynamic"])
    leave = threading.Event()

    def stay() -> None:
        with server.replaying("m"):
            leave.wait(HANG_SECONDS)

    def replace() -> None:
        with pytest.raises(ClosedError):
            server.replace_model("m", versioned(on_cpu.workshop.folder, 2))

    with thread_of(stay):
        replays = served_model(server).replays
        wait_until(lambda: replays._open)
        with thread_of(replace) as replaced:
            wait_until(lambda: replays._asked)
            with thread_of(server.close) as closed:
                assert replaced.wait(HANG_SECONDS)
                assert not closed.wait(0.05), "the block is open"
                leave.set()


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "replacements"), [("dynamic", 200), ("many", 40), ("whole", 20), ("static", 20), ("uvm", 20), ("counting", 20)]
)
def test_gpu_replays_during_replacements_are_of_one_version(workshop: Workshop, kind: str, replacements: int) -> None:
    torch = pytest.importorskip("torch")
    service, tables = Service(workshop, 0), 3 if kind == "many" else 1
    server = opened(service, tables, **KINDS.get(kind, KINDS["dynamic"]))
    files = [versioned(workshop.folder, version, tables) for version in (1, 2)]
    stop, answers, mixed = threading.Event(), [0, 0], []

    def replay(number: int) -> None:
        random = np.random.default_rng(number)
        stream = torch.cuda.Stream()
        given = torch.from_numpy(random.integers(0, ROWS, (tables, 1500))).cuda()
        with torch.cuda.stream(stream):
            keys = [given[table].clone() for table in range(tables)]
            outs = server.lookup_many(keys, "m") if tables > 1 else [server.lookup(keys[0], "m", 0)]  # compiles
            stream.synchronize()
            with capturing:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    if tables > 1:
                        outs = server.lookup_many(keys, "m")
                    else:
                        outs = [server.lookup(keys[0], "m", 0)]
            found = torch.empty(2, device="cuda")
            while not stop.is_set():
                with server.replaying("m", stream=stream if number else None):
                    for _ in range(1 + answers[number] % 3):
                        graph.replay()
                rows = torch.stack(outs)  # after the block: its work goes on behind it
                found[0], found[1] = rows.min(), rows.max()
                low, high = found.tolist()
                answers[number] += 1
                if low != high:
                    mixed.append((low, high))
        stream.synchronize()
        del graph

    capturing = threading.Lock()
    began = time.monotonic()
    with thread_of(lambda: replay(0)) as first, thread_of(lambda: replay(1)) as second:
        try:
            wait_until(lambda: (min(answers) > 0) or first.is_set() or second.is_set())
            for number in range(1, 1 + replacements):
                before = min(answers)
                server.replace_model("m", files[number % 2])
                wait_until(lambda before=before: min(answers) > before or first.is_set() or second.is_set())
                if mixed or first.is_set() or second.is_set():
                    break
        finally:
            stop.set()
    logging.getLogger(__name__).info("%s: %d replays, %.1f s", kind, sum(answers), time.monotonic() - began)
    assert not mixed and min(answers) >= replacements
    server.close()


@pytest.mark.gpu
def test_gpu_the_work_of_a_block_is_waited_for(workshop: Workshop) -> None:
    torch = pytest.importorskip("torch")
    server = opened(Service(workshop, 0), **KINDS["dynamic"])
    stream, replays = torch.cuda.Stream(), served_model(server).replays

    def is_at_work() -> bool:  # unless this thread stops for longer than the device works
        with server.replaying("m", stream=stream), torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
        return not replays._is_idle()

    wait_until(is_at_work)
    server.replace_model("m", versioned(workshop.folder, 2))
    assert stream.query() and replays._is_idle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        torch.cuda._sleep(1)  # Torch warns of an empty graph
        with pytest.raises(DeviceError, match="captured"), server.replaying("m", stream=stream):
            raise AssertionError
    server.close()
