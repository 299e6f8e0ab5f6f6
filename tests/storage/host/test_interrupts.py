"""An interrupt between any two lines of a writer or a large lookup: no crash, no hang, no lost or foreign row afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

# A timer raises in the main thread at random moments of upserts that grow, updates, erases, evictions and replacements.
_WRITER = """
import contextlib, itertools, random, signal, sys
import numpy as np
from hps_numba.storage.host.store import HostStore

class Interrupt(BaseException): pass
armed = False
def ring(*_):
    if armed:
        raise Interrupt
signal.signal(signal.SIGALRM, ring)
random.seed(int(sys.argv[1]))
DIM, N = 16, 6000
COLUMNS = np.arange(1, DIM, dtype=np.float32)
def rows_of(keys, stamp):
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0] = stamp
    rows[:, 1:] = keys[:, None] + stamp * COLUMNS
    return rows
def check(store):
    keys = np.arange(N)
    out, misses = np.empty((N, DIM), np.float32), np.empty(N, np.int64)
    missing = store.lookup(keys, out, -1.0, misses)
    here = np.ones(N, bool)
    here[misses[:missing]] = False
    assert np.array_equal(out[here][:, 1:], keys[here][:, None] + out[here][:, :1] * COLUMNS), "a torn or foreign row"
    assert (out[~here] == -1).all()
    return here
interrupted = 0
warm = HostStore(DIM, max_rows=2, batch_rows=1)  # compiles all kernels: numba itself does not bear an interrupt there
warm.upsert(np.arange(9), np.ones((9, DIM), np.float32))
with contextlib.suppress(Interrupt), warm.write_lock.writing():
    raise Interrupt
warm.erase(np.arange(3))
for bound in (None, 3000):
    store = HostStore(DIM, growth_bytes=64 * 256, batch_rows=1000, max_rows=bound, policy="evict_least_used")
    least = interrupted + 15
    for stamp in itertools.count(1):
        if stamp >= 100 and interrupted >= least:
            break
        keys = np.random.default_rng(stamp).permutation(N)[: random.randrange(1, N)].astype(np.int64)
        rows = rows_of(keys, stamp)
        content = store.new_content(len(keys))
        content.rows_view(0, len(keys))[:] = rows
        content.fill(keys, 1)
        verb = random.choice([
            lambda: store.upsert(keys, rows),
            lambda: store.update(keys, rows),
            lambda: store.erase(keys[::3]),
            lambda: store.replace(content),
            lambda: store.clear(),
        ])
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 1e-3))
            verb()
            armed = False
        except Interrupt:
            armed = False
            interrupted += 1
        check(store)
        if stamp % 10 == 0:
            some = np.arange(0, 500)
            store.upsert(some, rows_of(some, 100_000 + stamp))
            here = check(store)
            assert len(store) == here.sum() and (bound or here[:500].all()), (len(store), here.sum())
    store.upsert(np.arange(2500), rows_of(np.arange(2500), 7777))
    out = np.empty((2500, DIM), np.float32)
    if bound is None:
        assert store.lookup(np.arange(2500), out) == 0 and np.array_equal(out, rows_of(np.arange(2500), 7777))
    store.close()
signal.setitimer(signal.ITIMER_REAL, 0)
print("interrupted", interrupted)
"""

# The same for a lookup that is cut over threads: when it has raised, nobody may still write to its output.
_READER = """
import random, signal, time
import numpy as np
from hps_numba.storage.host.store import HostStore

class Interrupt(BaseException): pass
armed = False
def ring(*_):
    if armed:
        raise Interrupt
signal.signal(signal.SIGALRM, ring)
N, DIM = 200_000, 32
store = HostStore(DIM)
store.upsert(np.arange(N), np.ones((N, DIM), np.float32))
out = np.empty((N, DIM), np.float32)
store.lookup(np.arange(N), out, threads=4)
interrupted = tries = 0
while tries < 30 or interrupted <= 5:
    tries += 1
    out[:] = 5
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 8e-3))
        store.lookup(np.arange(N), out, threads=4)
        armed = False
    except Interrupt:
        armed = False
        interrupted += 1
        before = out.copy()
        time.sleep(0.02)
        assert np.array_equal(before, out), "rows were written after the lookup had raised"
signal.setitimer(signal.ITIMER_REAL, 0)
print("interrupted", interrupted)
"""


def run(program: str, *arguments: str) -> int:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(), check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that raise in the main thread")
@pytest.mark.parametrize("seed", ["1", "2"])
def test_an_interrupted_writer_is_repaired(seed: str) -> None:
    assert run(_WRITER, seed) >= 30


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers that raise in the main thread")
def test_an_interrupted_lookup_writes_nothing_after_it_raised() -> None:
    assert run(_READER) > 5
