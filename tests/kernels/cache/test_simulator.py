"""Cache kernels in numba's CUDA simulator, which has no warp functions: tiles of one lane, equal to the oracle of the cache.

Run as a program, this file is what one process of the simulator does: ``test_kernel_simulator.py POLICY,... BLOCKS THREADS``.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.cache_oracle import CacheOracle
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba import plugins
from hps_numba.kernels.cache.sketch import sketch_places, sketch_shape
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.compiler.specialize import bindings
from hps_numba.kernels.dtypes import row_stride
from hps_numba.kernels.hashing import index_hash
from hps_numba.kernels.layouts import cache as layout
from hps_numba.kernels.layouts.cache import LINE_BYTES, LINES_PER_SET, META_AT, OCCUPIED, SCORES_AT, WAYS, WAYS_PER_LINE
from hps_numba.kernels.layouts.host_store import ENTRIES_PER_LINE, FIRST_SLOT, META_BYTES, index_bytes
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy

SETS, DIM, MOST, DEFAULT = 2, 3, 64, -7.5
HOST_LINES = 12
STRIDE = row_stride(DIM, "float32")

#: what the thread of the simulator that runs is: its number in the grid and in its block, and how to wait for its block
HERE = threading.local()


# -- a grid in which each thread is a tile and a warp of its own -------------------------------------


def number_in_grid():
    return HERE.number


def threads_in_grid():
    return HERE.grid


def blocks_in_grid():
    return HERE.blocks


def block_in_grid():
    return HERE.number // (HERE.grid // HERE.blocks)


def threads_in_block():
    return HERE.grid // HERE.blocks


def is_first_in_grid():
    return HERE.number == 0


def is_first_in_block():
    return HERE.in_block == 0


def wait_for_block():
    HERE.wait()


GRID = {
    "tile_number": number_in_grid,
    "warp_number": number_in_grid,
    "grid_tiles": threads_in_grid,
    "grid_warps": threads_in_grid,
    "grid_blocks": blocks_in_grid,
    "block_number": block_in_grid,
    "block_tiles": threads_in_block,
    "is_grid_leader": is_first_in_grid,
    "is_block_leader": is_first_in_block,
    "sync_block": wait_for_block,
}


def simulate(kernel: Callable[..., None], blocks: int, threads: int, *args: Any) -> None:
    """Run a kernel in the simulator; what a thread raises is raised here."""

    @cuda.jit
    def grid():
        HERE.number, HERE.grid = cuda.grid(1), cuda.gridsize(1)
        HERE.in_block, HERE.blocks = cuda.threadIdx.x, cuda.gridDim.x
        HERE.wait = cuda.syncthreads
        with np.errstate(over="ignore"):  # hashes count modulo 2**64
            kernel(*args)

    grid[blocks, threads]()


# -- a cache on NumPy memory --------------------------------------------------------------------------


def hash_of(key: int) -> int:
    with np.errstate(over="ignore"):
        return int(index_hash(np.int64(key).view(np.uint64)))


def backend_for(key: int) -> tuple[int, int]:
    """(set, primary line) of a key."""
    return (hash_of(key) >> 32) * SETS >> 32, hash_of(key) & 1


def counters_of(words: int, key: int) -> tuple[int, ...]:
    with np.errstate(over="ignore"):
        return tuple(map(int, sketch_places(words, key)))


class HostIndex:
    """A host store as kernels see it, written from its description in ``hps_numba.kernels.layouts.host_store``."""

    def __init__(self, rows: dict[int, np.ndarray]) -> None:
        self.index = np.zeros(index_bytes(HOST_LINES) // 8, np.int64)
        self.rows = np.zeros((len(rows), DIM), np.float32)
        self.slots = {key: slot for slot, key in enumerate(rows)}
        entries = self.index[META_BYTES // 8 :].reshape(-1, 2)
        for key, slot in self.slots.items():
            at = ((hash_of(key) >> 32) * HOST_LINES >> 32) * ENTRIES_PER_LINE
            while entries[at, 1] != 0:
                at = (at + 1) % len(entries)
            entries[at] = key, slot + FIRST_SLOT
            self.rows[slot] = rows[key]
        self.entries = entries

    def write(self, key: int, row: np.ndarray) -> None:
        self.rows[self.slots[key]] = row

    def erase(self, key: int) -> None:
        """The key stays in its entry, with the word that says so."""
        (at,) = np.flatnonzero((self.entries[:, 0] == key) & (self.entries[:, 1] != 0))
        self.entries[at, 1] = 1


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class SimulatedCache:
    """The kernels of one policy on a grid; the interface of the oracle."""

    def __init__(self, policy: Policy, blocks: int, threads: int, host: HostIndex) -> None:
        self.policy, self.grid, self.host = policy, (blocks, threads), host
        self.kept: list[np.ndarray] = []
        memory = self.zeros(SETS * layout.SET_BYTES + 128)
        self.lines = -(-address(memory) // 128) * 128
        self.line_bytes = memory[self.lines - address(memory) :][: SETS * layout.SET_BYTES].reshape(-1, LINE_BYTES)
        self.rows = np.zeros((SETS * WAYS, STRIDE // 4), np.float32)
        self.state = self.zeros(layout.STATE_BYTES).view(np.int64)
        self.state[layout.STATE_PENDING // 8] = address(self.zeros(4 * SETS * WAYS))
        self.state[layout.STATE_CAPACITY // 8] = SETS * WAYS
        self.workspace = self.zeros(layout.WORKSPACE_BYTES).view(np.int64)
        self.fill_workspace()
        ring = layout.HOST_RING
        self.descriptor = address(self.state) + ring
        words = (layout.DESC_BLOCK, layout.DESC_LINES, layout.DESC_ROWS, layout.DESC_GENERATION)
        for word, value in zip(words, (address(host.index), HOST_LINES, address(host.rows), 1)):
            self.state[(ring + word) // 8] = value

    def zeros(self, size: int) -> np.ndarray:
        self.kept.append(np.zeros(size, np.uint8))
        return self.kept[-1]

    def fill_workspace(self) -> None:
        buckets = 4
        parts = {
            layout.WORKSPACE_KEYS: 8 * MOST,
            layout.WORKSPACE_WORDS: 16 * MOST,
            layout.WORKSPACE_STAGE: 4 * DIM * MOST,
            layout.WORKSPACE_BUCKETS: layout.BUCKET_BYTES * buckets,
            layout.WORKSPACE_LIST: 8 * buckets,
            layout.WORKSPACE_ABSENT_LIST: 8 * MOST,
            layout.WORKSPACE_COUNTS: 16 * 2 * MOST,
            layout.WORKSPACE_TOUCHED_LIST: 8 * MOST,
        }
        for word, size in parts.items():
            self.workspace[word // 8] = address(self.zeros(size))
            if word == layout.WORKSPACE_BUCKETS:
                self.kept[-1][:] = layout.UNUSED_BUCKET
        self.workspace[layout.WORKSPACE_BATCH // 8] = layout.FIRST_BATCH
        self.workspace[layout.WORKSPACE_STAGE_STRIDE // 8] = 4 * DIM
        self.workspace[layout.WORKSPACE_MASK // 8] = buckets - 1
        self.workspace[layout.WORKSPACE_COUNTS_MASK // 8] = 2 * MOST - 1
        words, shift = sketch_shape(SETS * WAYS)
        self.workspace[layout.WORKSPACE_SET_STATES // 8] = address(self.zeros(4 * SETS * max(1, self.policy.state)))
        self.workspace[layout.WORKSPACE_SKETCH // 8] = address(self.zeros(8 * words))
        self.workspace[layout.WORKSPACE_SKETCH_WORDS // 8] = words
        self.workspace[layout.WORKSPACE_SKETCH_SHIFT // 8] = shift

    def run(self, name: str, *args: Any) -> None:
        kernel = bindings(KernelSpec(name=name, dim=DIM, policy=self.policy), lambda function: function, GRID)
        simulate(kernel, *self.grid, *args)

    def reading_host(self, yes: bool) -> None:
        self.state[layout.STATE_HOST // 8] = self.descriptor if yes else 0
        self.workspace[layout.WORKSPACE_ASSUME // 8] = 0 if yes else 1

    def finish(self, source: int, stride: int) -> None:
        cache, state, workspace = self.lines, address(self.state), address(self.workspace)
        if self.policy.needs_count:
            self.run("touch_kernel", cache, SETS, state, workspace)
        self.run("insert_kernel", cache, address(self.rows), state, source, stride, workspace, 0)

    def look_up(self, keys: np.ndarray, out: int, now: int) -> None:
        self.state[layout.STATE_NOW // 8] = now
        state, workspace = address(self.state), address(self.workspace)
        arguments = (state, address(keys), len(keys), out, np.float32(DEFAULT), workspace)
        self.run("lookup_kernel", self.lines, address(self.rows), SETS, *arguments)

    def lookup(self, keys: np.ndarray, now: int) -> np.ndarray:
        self.reading_host(True)
        out = np.full((len(keys), DIM), 99, np.float32)
        self.look_up(keys, address(out), now)
        if self.policy.admit is not None:
            self.run("sketch_kernel", address(self.state), address(keys), len(keys), 0, 0, address(self.workspace))
        self.finish(int(self.workspace[layout.WORKSPACE_STAGE // 8]), 4 * DIM)
        return out

    def insert(self, keys: np.ndarray, rows: np.ndarray, now: int) -> None:
        self.reading_host(False)
        self.look_up(keys, 0, now)
        self.finish(address(rows), 4 * DIM)
        self.reading_host(True)

    def update(self, keys: np.ndarray, rows: np.ndarray | None = None) -> None:
        source = 0 if rows is None else address(rows)
        change = (address(self.state), address(keys), len(keys), source, 4 * DIM, 1)
        self.run("update_kernel", self.lines, address(self.rows), SETS, *change)

    def refresh(self, start_set: int, end_set: int, drop: bool) -> None:
        self.run("refresh_kernel", self.lines, address(self.rows), address(self.state), start_set, end_set, int(drop))

    def counted(self, name: str, *args: Any) -> int:
        self.state[layout.STATE_COUNT // 8] = 0
        self.run(name, *args)
        return int(self.state[layout.STATE_COUNT // 8])

    def erase(self, keys: np.ndarray) -> int:
        return self.counted("erase_kernel", self.lines, SETS, address(self.state), address(keys), len(keys))

    def clear(self) -> None:
        self.run("clear_kernel", self.lines, SETS)

    def keys(self) -> list[int]:
        out = np.zeros(SETS * WAYS, np.int64)
        count = self.counted("dump_kernel", self.lines, address(self.state), 0, SETS, address(out))
        return sorted(out[:count].tolist())

    def content(self) -> list[tuple[Any, ...]]:
        """(key, row, score, set, line, way) of all contents; no line has a writer."""
        found = []
        for number, line in enumerate(self.line_bytes):
            meta = int(line[META_AT : META_AT + 4].view(np.uint32)[0])
            assert meta & (layout.BUSY | layout.LOCK) == 0
            for way in range(WAYS_PER_LINE):
                if (meta & OCCUPIED) >> way & 1:
                    key = int(line[8 * way : 8 * way + 8].view(np.int64)[0])
                    score = int(line[SCORES_AT + 4 * way : SCORES_AT + 4 * way + 4].view(np.uint32)[0])
                    row = self.rows[number * WAYS_PER_LINE + way, :DIM].tolist()
                    found.append((key, row, score, *divmod(number, LINES_PER_SET), way))
        return found


def rows_for(keys: Any, stamp: int) -> np.ndarray:
    return np.array([[key % 1000 + stamp / 8, stamp, -key % 77] for key in map(int, keys)], np.float32)


def check(policy: Policy, blocks: int, threads: int) -> int:
    """All kernels against the oracle; returns how many batches agreed."""
    rng = np.random.default_rng(5)
    known = np.concatenate([rng.choice(2**62, 21, replace=False) - 2**61, [0, -1, 2**63 - 1, -(2**63)]]).astype(np.int64)
    universe = np.concatenate([known, rng.choice(2**62, 5) - 2**61]).astype(np.int64)
    rows = {int(key): row for key, row in zip(known, rows_for(known, 1))}
    host = HostIndex(rows)
    cache = SimulatedCache(policy, blocks, threads, host)
    oracle = CacheOracle(SETS, policy, DIM, DEFAULT, backend_for, rows, counters_of=counters_of)
    agreed = 0

    def compare() -> None:
        nonlocal agreed
        expected = [(entry.key, entry.row.tolist(), *entry[2:]) for entry in oracle.dump(0, SETS)]
        assert cache.content() == expected
        assert cache.keys() == sorted(entry[0] for entry in expected)
        agreed += 1

    for step in range(6):
        now = 100 + 20 * step
        batch = rng.choice(universe, int(rng.integers(1, 25)))
        assert cache.lookup(batch, now).tolist() == oracle.lookup(batch, now).tolist()
        compare()
        some = rng.choice(universe, 4, replace=False)
        given = rows_for(some, step + 2)
        if step == 0:
            cache.insert(some, given, now + 5)
            oracle.insert(some, given, now + 5)
        elif step == 1:
            cache.update(some, given)
            oracle.update(some, given)
        elif step == 2:
            for key in known[:6]:
                rows[int(key)] = rows_for([key], 9)[0]
                host.write(int(key), rows[int(key)])
            cache.update(universe)
            oracle.update(universe)
        elif step == 3:
            assert cache.erase(some) == oracle.erase(some)
        elif step == 4:
            for key in known[:9]:
                del rows[int(key)]
                host.erase(int(key))
            for drop in (False, True):
                cache.refresh(0, SETS, drop)
                oracle.refresh(0, SETS, drop)
        compare()
    assert cache.state[layout.STATE_EVICTED // 8] == oracle.evictions
    assert cache.state[layout.STATE_REFUSED // 8] == oracle.refused
    assert oracle.evictions + oracle.refused > 0
    cache.run("rescore_kernel", cache.lines, SETS, address(cache.state))
    for at in map(tuple, np.argwhere(oracle.occupied)):
        oracle.scores[at] = (
            policy.first(int(cache.state[layout.STATE_NOW // 8]), 1, *[int(oracle.keys[at])] * policy.takes_key) % 2**32
        )
    compare()
    cache.clear()
    oracle.clear()
    compare()
    return agreed


@pytest.mark.skipif(importlib.util.find_spec("numba.cuda") is None, reason="numba's CUDA target is not installed")
@pytest.mark.parametrize("grid", [(1, 1), (2, 4)], ids=["one tile", "eight tiles"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
def test_kernels_in_the_simulator_do_what_the_oracle_does(policy, grid):
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, policy, *map(str, grid)],
        env=environment(NUMBA_ENABLE_CUDASIM="1"),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert (done.returncode, done.stdout) == (0, "agreed: 14\n"), done.stderr[-3000:]


@pytest.mark.skipif(importlib.util.find_spec("numba.cuda") is None, reason="numba's CUDA target is not installed")
def test_kernels_of_every_other_policy_in_the_simulator_do_what_the_oracle_does():
    others = [name for name in plugins.names("hps_numba.kernels.policies") if name not in ("lru", "lfu", "fifo")]
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, ",".join(others), "2", "3"],
        env=environment(NUMBA_ENABLE_CUDASIM="1"),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert (done.returncode, done.stdout) == (0, "agreed: 14\n" * len(others)), done.stderr[-3000:]


if __name__ == "__main__":
    from numba import cuda  # the simulator replaces a global of this name

    for named in sys.argv[1].split(","):
        sys.stdout.write(f"agreed: {check(load_policy(named), int(sys.argv[2]), int(sys.argv[3]))}\n")
