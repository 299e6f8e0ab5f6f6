"""A call of a server from inside another one of the same thread: refused with one error or done whole, never a hang or a crash.

The inner call comes at every few dozen lines of the outer one, in a process of its own; ``HPS_NUMBA_REENTRY_STEP=1`` makes that
every line. Real signals: see the last test.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

_EVERY_LINE = """
import contextlib, faulthandler, logging, sys, threading, warnings
from pathlib import Path
import numpy as np
from hps_numba.errors import ClosedError, UnknownModelError
from support.factories import KEEPING, Workshop
from support.oracles import rows_of
from support.reentry import run_inside
from support.waiting import HANG_SECONDS

faulthandler.dump_traceback_later(0.9 * HANG_SECONDS, exit=True)
logging.disable(logging.ERROR)
folder, kind, step, verb, *inner_verbs = sys.argv[1:]
shop = Workshop(Path(folder))
N, DIM = 40, 3
KEYS, INNER = np.arange(0, 30), np.arange(20, 40)

def server_of_kind():
    entry = {"max_batch_size": 8, "hit_rate_threshold": 1.0}
    if kind == "cache":
        entry |= {"deployed_device_list": [0], "gpucacheper": 0.5}
    model = shop.model((np.arange(25), DIM), **entry)
    if kind == "tier":
        return shop.open(model, volatile_db=KEEPING, persistent_db={"type": "support.fakes:DictTier"})
    return shop.open(model, cache_on_cpu=kind == "cache", volatile_db={"type": "hash_map"})

def call(server, verb, keys, stamp):
    if verb == "insert": server.insert(keys, rows_of(keys, DIM, stamp), "m", 0)
    elif verb == "update": server.update(keys, rows_of(keys, DIM, stamp), "m", 0)
    elif verb == "erase": server.erase(keys, "m", 0)
    elif verb == "step": server.read_modify_write(keys, lambda rows, found: rows_of(keys, DIM, stamp), "m", 0)
    elif verb == "refresh": server.refresh("m")
    elif verb == "close": server.close()
    elif verb == "unload": server.unload_model("m")
    elif verb == "replace": server.replace_model("m")
    elif verb == "policy": server.set_policy("fifo", "m")
    elif verb == "lookup":
        rows = server.lookup(keys, "m", 0)
        stamps_of(keys, rows)
    elif verb == "large lookup":
        many = np.resize(keys, 300_000)
        stamps_of(keys, server.lookup(many, "m", 0)[: len(keys)])

def stamps_of(keys, rows):
    found = np.full(len(keys), -1)
    for stamp in (0, 2, 3, 9):
        found[(rows == rows_of(keys, DIM, stamp)).all(1)] = stamp
    assert (found[(rows != -7.5).any(1)] >= 0).all(), "a torn or foreign row"
    return found

def attack():
    for inner_verb in inner_verbs:
        counts = {"done": 0, "refused": 0}
        line = 1 - int(step)
        while True:
            line += int(step)
            server = server_of_kind()
            server.lookup(np.arange(12), "m", 0)
            ended = False
            try:
                what = run_inside(lambda: call(server, verb, KEYS, 2), lambda: call(server, inner_verb, INNER, 3), line)
            except (ClosedError, UnknownModelError):
                assert inner_verb in ("close", "unload")
                what, ended = "done", True
            if what == "not reached":
                server.close()
                break
            counts[what] += 1
            ended = ended or (inner_verb in ("close", "unload") and what == "done") or verb in ("close", "unload")
            if not ended:
                keys = np.arange(N)
                for _ in range(2):
                    found = stamps_of(keys, server.lookup(keys, "m", 0))
                    assert np.array_equal(found >= 0, server.contains(keys, "m", 0)), (line, what, found)
                    if what == "refused":
                        assert (found[30:] == -1).all()
                        if verb in ("insert", "step"): assert (found[:30] == 2).all()
                        if verb == "update": assert (found[:25] == 2).all()
                        if verb == "erase": assert (found[:30] == -1).all()
                    elif inner_verb in ("insert", "step") and verb != "replace":
                        assert (found[30:] == 3).all(), (line, what, found)
                server.insert(keys, rows_of(keys, DIM, 9), "m", 0)
                assert (stamps_of(keys, server.lookup(keys, "m", 0)) == 9).all()
            server.close()
        print(inner_verb, counts["done"], counts["refused"])

# not on the main thread, whose writes are done by another thread: there, the inner call would only wait for its turn
problems = []
def guarded():
    try:
        attack()
    except BaseException as problem:
        problems.append(problem)
thread = threading.Thread(target=guarded)
thread.start()
thread.join()
if problems:
    raise problems[0]
"""

_SIGNALS = """
import faulthandler, random, signal, sys, time
from pathlib import Path
import numpy as np
from hps_numba.errors import ClosedError, ReentryError
from support.factories import Workshop
from support.waiting import HANG_SECONDS

faulthandler.dump_traceback_later(0.9 * HANG_SECONDS, exit=True)
verb, folder, calls = sys.argv[1], sys.argv[2], int(sys.argv[3])
N, DIM = 60_000, 32
keys = np.arange(N)
def new_server():
    shop = Workshop(Path(folder))
    return shop.open(shop.model((np.arange(100), DIM)), volatile_db={"type": "hash_map"})

server = new_server()

def rows_of(keys, stamp):
    return (keys[:, None] * 7.0 + np.arange(DIM) + stamp).astype(np.float32)

server.insert(keys, rows_of(keys, 0), "m", 0)
other = np.arange(N // 2, N)
counts = {"done": 0, "refused": 0}  # a write inside a write of the main thread waits for its turn
armed = False

def ring(*_):
    if not armed:
        return
    try:
        if verb == "close":
            server.close()
        else:
            server.insert(other, rows_of(other, -1), "m", 0)
        counts["done"] += 1
    except ReentryError:
        counts["refused"] += 1

signal.signal(signal.SIGALRM, ring)
random.seed(1)
stamp, span = 0, 4e-3
while sum(counts.values()) < calls or (verb == "close" and not counts["refused"]):  # one for ever is found as a hang
    stamp += 1
    rows = rows_of(keys, stamp % 1000)
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, span))
    armed, began = True, time.perf_counter()
    try:
        server.insert(keys, rows, "m", 0)
    except ClosedError:
        assert server.closed
    armed = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    span = max(1e-4, time.perf_counter() - began)  # of a write, here and now
    if server.closed:  # the signal came just before the write, or after it
        server = new_server()
        continue
    rows = server.lookup(keys, "m", 0)
    old, new = rows_of(keys, stamp % 1000), rows_of(keys, -1)
    right = (rows == old).all(1)
    right[N // 2 :] |= (rows[N // 2 :] == new[N // 2 :]).all(1)
    assert right.all(), "rows of other keys"
server.close()
print(counts["done"], counts["refused"])
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(), check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return done.stdout


def counted(folder: Path, kind: str, step: int, verb: str, *inner: str) -> dict[str, tuple[int, int]]:
    """How often each inner call was done and refused."""
    lines = run(_EVERY_LINE, str(folder), kind, os.environ.get("HPS_NUMBA_REENTRY_STEP", str(step)), verb, *inner).splitlines()
    return {name: (int(done), int(refused)) for name, done, refused in (line.split() for line in lines)}


@pytest.mark.parametrize("kind", ["host", "cache", "tier"])
@pytest.mark.parametrize("verb", ["insert", "update", "erase", "step"])
def test_calls_inside_a_write(verb: str, kind: str, tmp_path: Path) -> None:
    counts = counted(tmp_path, kind, 29, verb, "close", "unload", "insert", "erase", "lookup")
    assert counts.pop("lookup")[1] == 0, "a lookup was refused"
    for done, refused in counts.values():
        assert refused > 1 and done > 0


@pytest.mark.parametrize("kind", ["host", "cache", "tier"])
@pytest.mark.parametrize("verb", ["lookup", "large lookup"])
def test_calls_inside_a_lookup(verb: str, kind: str, tmp_path: Path) -> None:
    step = 3 if (verb, kind) == ("lookup", "host") else 29  # which takes some twenty lines
    counts = counted(tmp_path, kind, step, verb, "close", "insert", "lookup", "replace")
    assert counts["lookup"][1] == 0, "a lookup was refused"
    assert counts["close"][1] > 0 and counts["insert"][0] > 0


@pytest.mark.parametrize("kind", ["host", "cache"])
@pytest.mark.parametrize("verb", ["replace", "refresh", "policy", "close"])
def test_calls_inside_a_change_of_a_model(verb: str, kind: str, tmp_path: Path) -> None:
    if verb == "policy" and kind == "host":
        pytest.skip("a table without a cache has no policy")
    inner = ["close"] if verb == "close" else ["close", "insert", "lookup"]
    counts = counted(tmp_path, kind, 43, verb, *inner)
    assert sum(counts["close"]) > 0  # changes of models take turns on a thread of their own: a close waits, or stops a load
    assert counts.get("lookup", (0, 0))[1] == 0, "a lookup was refused"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that signal the main thread")
@pytest.mark.parametrize("verb", ["close", "insert"])
def test_signal_handlers_that_write_or_close(verb: str, tmp_path: Path) -> None:
    done, refused = map(int, run(_SIGNALS, verb, str(tmp_path), "40").split())
    assert done + refused >= 40 and (verb == "insert" or refused > 0)
