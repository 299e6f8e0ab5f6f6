"""The tier ``rocks_db`` beside plain rocksdict: batches of random keys, from the page cache (warm) and from the disk (cold).

Plain rocksdict is one list ``get`` of the batch in the caller's order, with the same options and joined to an array, as anybody
would write it. Cold: the page cache is asked to drop the database before each batch (``posix_fadvise``), and the database is
opened anew, so that no block is cached. The disk's own cache, or the host's below a virtual machine, is not dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the benchmarks' shared modules

from report import add_options, finish, print_machine, print_table

from hps_numba.storage.rocksdb.library import column_options, database_options, rocksdict
from hps_numba.storage.tiers.rocks_db import RocksTier

TAG = "hps_et.m.a"
DIMS = (32, 128)
ROWS, BATCH, REPETITIONS = 1_000_000, 8192, 9
QUICK_ROWS, QUICK_BATCH, QUICK_REPETITIONS = 20_000, 512, 2
THREADS = 16

Read = Callable[[np.ndarray, np.ndarray], None]


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure, print the tables, and return the figures: rows a second and CPU time a row, by median."""
    rows, batch, repetitions = (QUICK_ROWS, QUICK_BATCH, QUICK_REPETITIONS) if quick else (ROWS, BATCH, REPETITIONS)
    results = []
    for dim in DIMS:
        with tempfile.TemporaryDirectory(prefix="hps_rocksdb_") as folder:
            path = Path(folder) / "database"
            results.append({"dim": dim, "name": "insert, synced", **fill(path, rows, dim)})
            for warm in (True, False):
                for name, opened in (("rocks_db", open_tier), ("plain rocksdict", open_plain)):
                    figures = measure(path, opened, rows, batch, dim, repetitions, warm=warm)
                    results.append({"dim": dim, "name": f"{name}, {'warm' if warm else 'cold'}", **figures})
    table = [
        [f"D={one['dim']}: {one['name']}", f"{one['rate'] / 1e3:.1f}", f"{one['best'] / 1e3:.1f}", f"{one['cpu_us']:.2f}"]
        for one in results
    ]
    print_table(f"RocksDB: {rows:,} rows, batches of {batch:,} random keys", ["", "k rows/s", "best", "CPU us a row"], table)
    return results


def fill(path: Path, rows: int, dim: int) -> dict[str, float]:
    """Insert all rows, in random order of keys, 65,536 at a time."""
    chance, rates = np.random.default_rng(0), []
    keys = chance.permutation(rows).astype(np.int64)
    tier, cpu = RocksTier.from_options(path=str(path), num_threads=THREADS), time.process_time()
    for start in range(0, rows, 65536):
        some = keys[start : start + 65536]
        values = chance.random((len(some), dim), np.float32)
        begin = time.perf_counter()
        tier.insert(TAG, some, values)
        rates.append(len(some) / (time.perf_counter() - begin))
    tier.close()
    cpu = time.process_time() - cpu
    RocksTier.from_options(path=str(path)).close()  # moves the rest of the log into table files
    return {"rate": statistics.median(rates), "best": max(rates), "cpu_us": cpu / rows * 1e6}


def open_tier(path: Path, dim: int) -> tuple[Read, Callable[[], None]]:
    tier = RocksTier.from_options(path=str(path), num_threads=THREADS, read_only=True)

    def read(keys: np.ndarray, out: np.ndarray) -> None:
        assert tier.fetch(TAG, keys, out).found.all()

    return read, tier.close


def open_plain(path: Path, dim: int) -> tuple[Read, Callable[[], None]]:
    package = rocksdict(str(path))
    options = database_options(package, THREADS, create=False)
    database = package.Rdict(str(path), options, {TAG: column_options(package)}, package.AccessType.read_only(False))
    column = database.get_column_family(TAG)

    def read(keys: np.ndarray, out: np.ndarray) -> None:
        out[:] = np.frombuffer(b"".join(column.get([key.tobytes() for key in keys])), np.float32).reshape(-1, dim)

    return read, database.close


def measure(path: Path, opened: Any, rows: int, batch: int, dim: int, repetitions: int, *, warm: bool) -> dict[str, float]:
    chance, rates, cpu = np.random.default_rng(1), [], []
    out = np.empty((batch, dim), np.float32)
    read, close = opened(path, dim)
    if warm:
        for start in range(0, rows, batch):
            some = np.arange(start, min(start + batch, rows))
            read(some, out[: len(some)])
    for _ in range(repetitions):
        keys = chance.integers(0, rows, batch)
        if not warm:
            del read
            close()
            drop_page_cache(path)
            read, close = opened(path, dim)
        begin, used = time.perf_counter(), time.process_time()
        read(keys, out)
        rates.append(batch / (time.perf_counter() - begin))
        cpu.append((time.process_time() - used) / batch * 1e6)
    close()
    return {"rate": statistics.median(rates), "best": max(rates), "cpu_us": statistics.median(cpu)}


def drop_page_cache(path: Path) -> None:
    for file in path.glob("*.sst"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """Run this part alone."""
    options = add_options(argparse.ArgumentParser(description=__doc__.partition("\n")[0])).parse_args()
    print_machine("The tier rocks_db", quick=options.quick)
    finish(options.json, quick=options.quick, rocksdb=run(options.quick))


if __name__ == "__main__":
    main()
