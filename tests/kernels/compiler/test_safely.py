"""Compilations survive a fork and interrupts at any moment: each in a process of its own, which must end in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS, join_all

from hps_numba.kernels.compiler import safely

COMMON = """
import os, signal, sys, threading, time
import numpy as np
from numba.core import event
from hps_numba.kernels.compiler.safely import compile_lock
from hps_numba.storage.host.store import HostStore
from support.waiting import HANG_SECONDS

def store():
    made = HostStore(4)
    made.upsert(np.arange(9), np.arange(36).reshape(9, 4).astype(np.float32))
    return made

def right(made):
    out = np.zeros((9, 4), np.float32)
    return bool(made.lookup(np.arange(9), out) == 0 and (out.ravel() == np.arange(36)).all())

class Started(event.Listener):
    threads = []
    begun = threading.Event()
    def on_start(self, event):
        self.threads.append(threading.get_ident())
        self.begun.set()
    def on_end(self, event):
        pass

event.register("numba:compile", Started())
"""

FORK = (
    COMMON
    + """
made = []
thread = threading.Thread(target=lambda: made.append(right(store())))
thread.start()
children = []
for delay in (0.0, 0.05, 0.4):
    assert Started.begun.wait(HANG_SECONDS)
    time.sleep(delay)
    child = os.fork()
    if child == 0:
        os._exit(0 if right(store()) else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
thread.join()
print(made)
"""
)

INTERRUPT = (
    COMMON
    + """
import importlib
from hps_numba.kernels.compiler.njit import host_kernel
kernels = importlib.import_module("many")

def stop(*args):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, stop)
interrupted = 0
for i in range(2):  # how long a compilation takes here and now
    began = time.monotonic()
    assert host_kernel(getattr(kernels, f"add{i}"))(3) == 3 + i
    span = time.monotonic() - began
for i in range(kernels.COUNT):
    kernel = host_kernel(getattr(kernels, f"add{i}"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + span * i / kernels.COUNT)
        try:
            assert kernel(1) == 1 + i
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupted += 1
    assert kernel(2) == 2 + i, i
    assert len(kernel.overloads) == 1
assert right(store())
assert threading.get_ident() not in Started.threads and len(Started.threads) > kernels.COUNT
print("interrupted", interrupted)
"""
)

LATE = (
    COMMON
    + """
def stop(*args):
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, stop)
main, compiles, sent = threading.get_ident(), threading.Event(), threading.Event()

class Waits(Started):
    def on_start(self, event):  # on the thread that compiles: it goes on when the interrupt has been sent
        compiles.set()
        assert sent.wait(HANG_SECONDS)

def interrupt():
    assert compiles.wait(HANG_SECONDS)
    signal.pthread_kill(main, signal.SIGINT)
    sent.set()

event.register("numba:compile", Waits())
threading.Thread(target=interrupt).start()
try:
    store()
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
if sys.argv[1] == "again":
    print(right(store()))
"""
)

FORK_INTERRUPTED = (
    COMMON
    + """
main, holds, seen = threading.get_ident(), threading.Event(), threading.Event()

def stop(*args):
    seen.set()
    raise KeyboardInterrupt

def hold():
    with compile_lock:
        holds.set()
        while "before" not in [frame.name for frame in traceback.extract_stack(sys._current_frames()[main])]:
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)
        assert seen.wait(HANG_SECONDS)

import traceback
signal.signal(signal.SIGINT, stop)
threading.Thread(target=hold).start()
assert holds.wait(HANG_SECONDS)
children = []
try:
    children.append(os.fork() or os._exit(0 if right(store()) else 1))
    print("the fork was not interrupted", threading.Event().wait(HANG_SECONDS))
except KeyboardInterrupt:
    print("interrupted")
print(os.waitstatus_to_exitcode(os.wait()[1]), compile_lock.is_locked(), right(store()))
"""
)


def run(program: str, folder: Path, *arguments: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env=environment(HPS_NUMBA_CACHE_DIR=str(folder / "kept"), **more),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_children_forked_while_a_thread_compiles_can_look_up(tmp_path: Path) -> None:
    assert run(FORK, tmp_path) == "[0, 0, 0]\n[True]\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_an_interrupt_of_a_fork_that_waits_is_not_lost(tmp_path: Path) -> None:
    assert run(FORK_INTERRUPTED, tmp_path).split("\n") == ["interrupted", "0 False True", ""]


class InterruptedLock:
    """A lock like numba's whose every call is interrupted once, before or after it has taken effect."""

    def __init__(self, *, after: bool) -> None:
        self._lock, self._after, self._interrupted = threading.RLock(), after, set()

    def _call(self, name: str) -> None:
        if self._after:
            getattr(self._lock, name)()
        if name not in self._interrupted:
            self._interrupted.add(name)
            raise KeyboardInterrupt
        if not self._after:
            getattr(self._lock, name)()

    def acquire(self) -> None:
        self._call("acquire")

    def release(self) -> None:
        self._call("release")

    def is_locked(self) -> bool:
        return self._lock._is_owned()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("side", ["in_parent", "in_child"])
def test_a_fork_takes_and_releases_the_lock_once(monkeypatch: pytest.MonkeyPatch, side: str, ours: bool, after: bool) -> None:
    """``ours``: the thread that forks compiles."""
    lock, interrupts = InterruptedLock(after=after), threading.Event()
    monkeypatch.setattr(safely, "compile_lock", lock)
    monkeypatch.setattr(safely.signal, "pthread_kill", lambda *signal: interrupts.set())
    if ours:
        lock._lock.acquire()
    fork = safely._Fork()
    fork.before()
    assert lock.is_locked()
    if side == "in_parent":
        fork.in_parent()
        assert ours or interrupts.wait(HANG_SECONDS)
    else:
        lock._interrupted.add("release")  # no timer runs in a child
        fork.in_child()
    if ours:
        lock._lock.release()
    assert not lock.is_locked()


def test_threads_that_fork_at_a_time_release_what_each_took(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, fork, waits = type(safely.compile_lock)(), safely._Fork(), threading.Event()
    monkeypatch.setattr(safely, "compile_lock", lock)

    def other() -> None:
        waits.set()
        fork.before()
        fork.in_parent()

    thread = threading.Thread(target=other)
    with lock:  # this thread compiles
        thread.start()
        assert waits.wait(HANG_SECONDS)
        fork.before()
        fork.in_parent()
        assert lock.is_locked()
    join_all(thread)
    assert lock._lock.acquire(blocking=False)


def test_a_child_that_lacks_the_lock_gets_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt may end ``before`` early, while another thread has the lock."""
    lock = type(safely.compile_lock)()
    monkeypatch.setattr(safely, "compile_lock", lock)
    thread = threading.Thread(target=lock.acquire)
    thread.start()
    thread.join()
    safely._Fork().in_child()
    assert not lock.is_locked() and lock._lock.acquire(blocking=False)


def test_a_call_that_no_thread_began_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    running: set[safely._Job] = set()
    monkeypatch.setattr(safely, "_running", running)
    monkeypatch.setattr(safely._thread, "start_new_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        safely.run_safely(lambda: 5)
    ending = threading.Thread(target=safely._finish, daemon=True)
    monkeypatch.undo()
    monkeypatch.setattr(safely, "_running", running)
    ending.start()
    join_all(ending)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that interrupts")
def test_interrupts_at_any_moment_leave_a_process_that_compiles(tmp_path: Path) -> None:
    count = int(os.environ.get("HPS_NUMBA_INTERRUPTS", "24"))
    functions = [f"def add{i}(x):\n    return x + {i}\n" for i in range(count)]
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "many.py").write_text(f"COUNT = {count}\n" + "\n".join(functions))
    paths = os.pathsep.join([str(tmp_path / "sources"), environment()["PYTHONPATH"]])
    _, interrupted = run(INTERRUPT, tmp_path, PYTHONPATH=paths).split()
    assert int(interrupted) > 0


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="signals are for processes here")
@pytest.mark.parametrize("then", ["again", "end"])
def test_an_interrupted_process_can_go_on_or_end(tmp_path: Path, then: str) -> None:
    assert run(LATE, tmp_path, then).split() == ["interrupted", "True"][: 2 if then == "again" else 1]


def test_what_a_compilation_raises_reaches_the_caller() -> None:
    def fails() -> None:
        raise ValueError(threading.get_ident() == threading.main_thread().ident)

    for _ in range(2):
        with pytest.raises(ValueError, match="False"):
            safely.run_safely(fails)
    with safely.compile_lock, pytest.raises(ValueError, match="True"):  # the other thread would wait for this one
        safely.run_safely(fails)
    assert safely.run_safely(lambda: safely.run_safely(lambda: 5)) == 5


def test_without_a_thread_the_caller_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(safely._thread, "start_new_thread", refused)
    assert safely.run_safely(threading.get_ident) == threading.get_ident()
