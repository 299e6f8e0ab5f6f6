"""A call of a store from inside another one of the same thread: no crash, no wait for itself, no lost or foreign row.

The inner call comes at every few lines of the outer one, in a process of its own, as what went wrong was a crash;
``HPS_NUMBA_REENTRY_STEP=1`` makes that every line.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

_EVERY_LINE = """
import faulthandler, sys
import numpy as np
from hps_numba.errors import ClosedError
from hps_numba.storage.host.store import HostStore
from support.reentry import run_inside
from support.waiting import HANG_SECONDS

faulthandler.dump_traceback_later(0.9 * HANG_SECONDS, exit=True)
step, verb, *inner_verbs = sys.argv[1:]
DIM, N = 4, 300
COLUMNS = np.arange(1, DIM, dtype=np.float32)
KEYS, INNER, FILL = np.arange(0, 200), np.arange(150, 300), np.arange(100)
OLD, OUTER, NEW = 1, 2, 3

def rows_of(keys, stamp):
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0] = stamp
    rows[:, 1:] = keys[:, None] + stamp * COLUMNS
    return rows

def content_of(store):
    content = store.new_content(len(FILL))
    content.rows_view(0, len(FILL))[:] = rows_of(FILL, OUTER)
    content.fill(FILL, 1)
    return content

def stamps(store):
    keys = np.arange(N)
    out, misses = np.empty((N, DIM), np.float32), np.empty(N, np.int64)
    missing = store.lookup(keys, out, -1.0, misses)
    here = np.ones(N, bool)
    here[misses[:missing]] = False
    assert np.array_equal(out[here][:, 1:], keys[here][:, None] + out[here][:, :1] * COLUMNS), "a torn or foreign row"
    return np.where(here, out[:, 0], 0)

def change(store, verb, keys, stamp):
    if verb == "upsert": store.upsert(keys, rows_of(keys, stamp))
    elif verb == "update": store.update(keys, rows_of(keys, stamp))
    elif verb == "erase": store.erase(keys)
    elif verb == "replace": store.replace(content_of(store))
    elif verb == "clear": store.clear()
    elif verb == "close": store.close()
    elif verb == "lookup":
        out = np.empty((len(keys), DIM), np.float32)
        store.lookup(keys, out, threads=4)
        assert np.isin(out[:, 0], (0, OLD, OUTER, NEW)).all()
    elif verb == "large lookup":
        many = np.resize(keys, 100_000)  # cut over threads
        out = np.empty((len(many), DIM), np.float32)
        store.lookup(many, out, -1.0, threads=4)
        assert np.isin(out[:, 0], (-1, OLD, NEW)).all() and (out[out[:, 0] == OLD, 1] == many[out[:, 0] == OLD] + 1).all()

for inner_verb in inner_verbs:
    counts = {"done": 0, "refused": 0}
    line = 1 - int(step)
    while True:
        line += int(step)
        store = HostStore(DIM, rows=150, growth_bytes=16 * 16, batch_rows=64)
        old = np.arange(150)
        store.upsert(old, rows_of(old, OLD))
        store.erase(old[:3])
        closed = False
        try:
            outer, inner = lambda: change(store, verb, KEYS, OUTER), lambda: change(store, inner_verb, INNER, NEW)
            what = run_inside(outer, inner, line, visits=4)
        except ClosedError:
            what, closed = "done", True
        if what == "not reached":
            break
        counts[what] += 1
        if verb == "close" or inner_verb == "close" and what == "done":
            store.close()
            continue
        found = stamps(store)
        only_inner = found[200:]
        if what == "refused" or inner_verb == "lookup":
            assert (only_inner == 0).all()
            expected = {"upsert": OUTER, "update": OUTER, "erase": 0, "clear": 0, "lookup": OLD, "large lookup": OLD}.get(verb)
            if verb != "replace":
                assert (found[3:150] == expected).all(), (line, what, found)
        elif inner_verb == "upsert" and verb not in ("replace", "clear"):
            assert (only_inner == NEW).all(), (line, what, found)
        some = np.arange(N)
        store.upsert(some, rows_of(some, 9))
        assert (stamps(store) == 9).all() and len(store) == N
        store.close()
    print(counts["done"], counts["refused"])
"""


def run(step: int, *verbs: str) -> list[tuple[int, int]]:
    """How often each inner call was done and refused, at every ``step``th line."""
    command = [sys.executable, "-c", _EVERY_LINE, os.environ.get("HPS_NUMBA_REENTRY_STEP", str(step)), *verbs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(), check=False)
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]  # type: ignore[misc]


@pytest.mark.parametrize("verb", ["upsert", "update", "erase", "replace", "clear"])
def test_calls_inside_a_change(verb: str) -> None:
    *changes, lookup = run(5, verb, "close", "upsert", "erase", "lookup")
    for done, refused in changes:
        assert refused > 5 and done > 0
    assert lookup[0] > 5 and lookup[1] == 0, "a lookup was refused"


def test_calls_inside_a_large_lookup() -> None:
    close, upsert = run(5, "large lookup", "close", "upsert")
    assert close[0] > 0 and close[1] > 5
    assert upsert[0] > 5 and upsert[1] == 0


def test_calls_while_a_store_closes() -> None:
    for done, refused in run(5, "close", "close", "upsert"):
        assert refused > 5 and done > 0
