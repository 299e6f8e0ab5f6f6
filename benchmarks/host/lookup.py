"""P6: host lookups, including the hash, compared with copies of rows by row number.

For each width, ``HPS`` loads a table of about 1 GiB. ``torch.index_select`` reads a tensor allocated by Torch, as in a program
without a parameter server; ``numpy.take``, the ceiling and a second run of Torch read the memory of the host store, which is on
2 MB pages, by row number. Keys are permuted multiples of an odd number. Each repetition draws new keys and times every
candidate once, in rotating order; the medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from model import config_of, save_model
from others import Watch
from report import add_options, cache_bytes, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.runtime import threads as hps_threads

#: width -> minimum share of the rate of Torch
TARGETS = {16: 0.75, 32: 0.75, 128: 0.9}
SCALING_TARGET = 1.8
PEER = "torch.index_select"
OURS = ("HPS.lookup", "HostStore.lookup")
SAME_MEMORY = "torch, our memory"
CEILING = "ceiling: row copy"
DICT_ROWS, DICT_KEYS = 1 << 18, 1 << 16
SETTLE_SECONDS = 0.003  # idle OpenMP threads keep spinning on the core that the next candidate needs

Call = Callable[[], Any]
Times = dict[tuple[str, int], list[float]]  # (name, threads) -> seconds of each repetition


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    table_bytes: int = 1 << 30
    batch: int = 1 << 20
    repetitions: int = 11
    warmups: int = 2
    small: tuple[int, ...] = (1, 64, 1024)
    small_calls: int = 500


QUICK = Sizes(table_bytes=1 << 20, batch=1 << 13, repetitions=3, warmups=1, small_calls=20)


@numba.njit(nogil=True)
def copy_rows(rows, slots, out, start, stop):
    for i in range(start, stop):
        slot = slots[i]
        for column in range(rows.shape[1]):
            out[i, column] = rows[slot, column]


@dataclass
class Table:
    """A served table: ``rows[i]`` is the row of ``keys[i]``."""

    server: hps_numba.HPS
    store: Any
    keys: np.ndarray
    rows: np.ndarray
    as_tensor: torch.Tensor
    own_tensor: torch.Tensor
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))


@dataclass
class Batch:
    """Row numbers, their keys, and the output, as arrays and as tensors."""

    slots: np.ndarray
    keys: np.ndarray
    out: np.ndarray

    def __post_init__(self) -> None:
        self.slot_tensor, self.out_tensor = torch.from_numpy(self.slots), torch.from_numpy(self.out)


@contextmanager
def served(dim: int, sizes: Sizes) -> Iterator[Table]:
    """The table of width ``dim``, loaded by a server."""
    with tempfile.TemporaryDirectory(prefix="hps_lookup_") as temporary:
        folder = Path(temporary) / "table.model"
        keys = save_model(folder, sizes.table_bytes // (4 * dim), dim)
        server = hps_numba.HPS(config_of(folder, dim))
    with server:
        store = server._catalog.table("m", 0).store
        rows = store.versions.current.rows_view(0, len(keys))  # a server fills the slots in the order of the file
        shared = torch.from_numpy(rows)
        table = Table(server, store, keys, rows, shared, shared.clone())
        yield table
        table.pool.shutdown()
        del rows, shared, table


def draw(table: Table, n: int, rng: np.random.Generator, out: np.ndarray) -> Batch:
    slots = rng.integers(0, len(table.keys), n)
    return Batch(slots, table.keys[slots], out)


def hps_lookup(table: Table, batch: Batch, threads: int) -> Call:
    def call() -> None:
        table.server.lookup(batch.keys, "m", 0, out=batch.out)

    hps_threads._pool.threads = threads  # HPS.lookup uses all cores; here, as many as the peer
    return call


def store_lookup(table: Table, batch: Batch, threads: int) -> Call:
    return lambda: table.store.lookup(batch.keys, batch.out, threads=threads)


def torch_select(table: Table, batch: Batch, threads: int) -> Call:
    torch.set_num_threads(threads)
    return lambda: torch.index_select(table.own_tensor, 0, batch.slot_tensor, out=batch.out_tensor)


def torch_select_ours(table: Table, batch: Batch, threads: int) -> Call:
    torch.set_num_threads(threads)
    return lambda: torch.index_select(table.as_tensor, 0, batch.slot_tensor, out=batch.out_tensor)


def numpy_take(table: Table, batch: Batch, threads: int) -> Call:
    return lambda: np.take(table.rows, batch.slots, axis=0, out=batch.out, mode="clip")


def row_copy(table: Table, batch: Batch, threads: int) -> Call:
    n = len(batch.slots)

    def call() -> None:
        half = table.pool.submit(copy_rows, table.rows, batch.slots, batch.out, n // 2, n) if threads == 2 else None
        copy_rows(table.rows, batch.slots, batch.out, 0, n if half is None else n // 2)
        if half is not None:
            half.result()

    return call


CANDIDATES = {
    "HPS.lookup": hps_lookup,
    "HostStore.lookup": store_lookup,
    PEER: torch_select,
    SAME_MEMORY: torch_select_ours,
    "numpy.take": numpy_take,
    CEILING: row_copy,
}
#: numpy.take uses one thread
LARGE = [(name, threads) for name in CANDIDATES for threads in (1, 2) if (name, threads) != ("numpy.take", 2)]


def aligned_rows(n: int, dim: int) -> np.ndarray:
    """float32 ``[n, dim]``, aligned to 64 bytes like the outputs of Torch; those of NumPy are 16 bytes off."""
    memory = np.zeros(n * dim + 16, np.float32)
    first = -memory.ctypes.data % 64 // 4
    return memory[first : first + n * dim].reshape(n, dim)


def check(table: Table, n: int) -> None:
    """Check that every candidate gives the same rows."""
    batch = draw(table, n, np.random.default_rng(1), aligned_rows(n, table.rows.shape[1]))
    expected = table.rows[batch.slots]
    for name, threads in LARGE:
        batch.out[:] = -1
        CANDIDATES[name](table, batch, threads)()
        if not np.array_equal(batch.out, expected):
            raise SystemExit(f"{name} with {threads} threads: wrong rows")


def large_batches(table: Table, sizes: Sizes) -> tuple[Times, int]:
    """Seconds of each repetition of one batch, by candidate and number of threads; and the number of dropped repetitions.

    A repetition that other programs disturb is repeated, at most as often as there are repetitions.
    """
    rng = np.random.default_rng(2)
    out = aligned_rows(sizes.batch, table.rows.shape[1])
    seconds: Times = {who: [] for who in LARGE}
    needed, dropped, turn = sizes.warmups + sizes.repetitions, 0, 0
    while turn < needed + dropped:
        watch = Watch()
        times = large_repetition(table, sizes, rng, out, turn % len(LARGE))
        turn += 1
        if watch.disturbed and dropped < needed:
            dropped += 1
        elif turn - dropped > sizes.warmups:
            for who, time_taken in times.items():
                seconds[who].append(time_taken)
    return seconds, dropped


def large_repetition(
    table: Table, sizes: Sizes, rng: np.random.Generator, out: np.ndarray, turn: int
) -> dict[tuple[str, int], float]:
    """Time every candidate once, starting with number ``turn``."""
    times = {}
    for name, threads in LARGE[turn:] + LARGE[:turn]:
        call = CANDIDATES[name](table, draw(table, sizes.batch, rng, out), threads)
        time.sleep(SETTLE_SECONDS)
        start = time.perf_counter()
        call()
        times[name, threads] = time.perf_counter() - start
    return times


def small_batches(table: Table, n: int, sizes: Sizes) -> dict[str, float]:
    """Median microseconds of a call with ``n`` keys on one thread; each call has new keys."""
    rng = np.random.default_rng(3)
    out = np.zeros((n, table.rows.shape[1]), np.float32)
    taken: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for repetition in range(sizes.warmups + sizes.repetitions):
        for name, candidate in CANDIDATES.items():
            calls = [candidate(table, draw(table, n, rng, out), 1) for _ in range(sizes.small_calls)]
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            for call in calls:
                call()
            if repetition >= sizes.warmups:
                taken[name].append((time.perf_counter() - start) / sizes.small_calls * 1e6)
    return {name: statistics.median(times) for name, times in taken.items()}


def dict_rate(table: Table) -> float:
    """Keys per second of a dict from key to row, with the rows copied to one array; a small sample."""
    rows = min(DICT_ROWS, len(table.keys))
    answers = dict(zip(table.keys[:rows].tolist(), table.rows[:rows], strict=True))
    keys = table.keys[np.random.default_rng(4).integers(0, rows, min(DICT_KEYS, rows))].tolist()
    out = np.zeros((len(keys), table.rows.shape[1]), np.float32)
    start = time.perf_counter()
    for i, key in enumerate(keys):
        out[i] = answers[key]
    return len(keys) / (time.perf_counter() - start)


def show_large(
    table: Table, times: dict[tuple[str, int], list[float]], dictionary: float, sizes: Sizes
) -> list[dict[str, Any]]:
    dim = table.rows.shape[1]
    seconds = {who: statistics.median(some) for who, some in times.items()}
    results, cells = [], []
    for (name, threads), time_taken in seconds.items():
        share, rate = seconds[PEER, threads] / time_taken, sizes.batch / time_taken
        judged = verdict(share, at_least=TARGETS[dim]) if name in OURS else ""
        some = times[name, threads]
        results.append({"name": name, "threads": threads, "seconds": some, "share_of_torch": share, "target": judged})
        spread = f"{min(some) * 1e3:.1f} .. {max(some) * 1e3:.1f}"
        cells.append([name, str(threads), f"{time_taken * 1e3:.1f}", spread, f"{rate / 1e6:.1f}", f"{share:.2f}", judged])
    share = dictionary * seconds[PEER, 1] / sizes.batch
    results.append({"name": "dict", "threads": 1, "keys_per_second": dictionary, "share_of_torch": share, "target": ""})
    cells.append(
        [f"dict ({min(DICT_ROWS, len(table.keys)):,} rows)", "1", "", "", f"{dictionary / 1e6:.1f}", f"{share:.3f}", ""]
    )
    title = f"D={dim}: {len(table.keys):,} rows, {table.rows.nbytes >> 20} MiB, {sizes.batch:,} keys in a batch"
    print_table(title, ["candidate", "threads", "ms", "range", "M keys/s", "rate / torch", "target"], cells)
    return results


def show_scaling(dim: int, times: Times) -> list[dict[str, Any]]:
    results, cells = [], []
    for name in (name for name in CANDIDATES if (name, 2) in times):
        gain = statistics.median(times[name, 1]) / statistics.median(times[name, 2])
        judged = verdict(gain, at_least=SCALING_TARGET) if name in OURS else ""
        results.append({"name": name, "scaling": gain, "target": judged})
        cells.append([name, f"{gain:.2f}", judged])
    print_table(f"D={dim}: speed-up from one thread to two", ["candidate", "speed-up", "target"], cells)
    return results


def show_small(dim: int, taken: dict[int, dict[str, float]]) -> None:
    cells = [[name, *(f"{times[name]:.2f}" for times in taken.values())] for name in CANDIDATES]
    print_table(f"D={dim}: small batches, one thread, us per call", ["candidate", *(f"{n} keys" for n in taken)], cells)


def measure(dim: int, sizes: Sizes) -> dict[str, Any]:
    """Measure one width and print its tables; returns the figures."""
    with served(dim, sizes) as table:
        check(table, min(sizes.batch, 1 << 19))
        seconds, dropped = large_batches(table, sizes)
        large = show_large(table, seconds, dict_rate(table), sizes)
        if dropped:
            print(f"{dropped} repetitions were disturbed by other programs and repeated\n")
        scaling = show_scaling(dim, seconds)
        taken = {n: small_batches(table, n, sizes) for n in sizes.small}
        show_small(dim, taken)
        return {
            "dim": dim,
            "rows": len(table.keys),
            "disturbed": dropped,
            "large": large,
            "scaling": scaling,
            "small_us": taken,
        }


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description="Host lookups compared with Torch, NumPy and a row copy (P6)."))
    parser.add_argument("--dims", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS), help="widths to measure")
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    print_machine("Host lookup (P6): medians, ratios within one run", quick=options.quick)
    if not options.quick and (cache := cache_bytes()) and sizes.table_bytes < 4 * cache:
        print(f"note: the tables are not much larger than the last-level cache of {cache >> 20} MiB\n")
    finish(options.json, quick=options.quick, widths=[measure(dim, sizes) for dim in options.dims])


if __name__ == "__main__":
    main()
