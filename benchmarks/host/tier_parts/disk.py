"""Rows from a disk: ``row_log`` in each way that it reads, beside lmdb, RocksDB, a plain mapping and what fio gets of the disk.

    python benchmarks/host/tier_parts/disk.py

Cold: the files' pages are dropped from the page cache (``posix_fadvise`` DONTNEED, and from mappings) before each batch of
those that read through it; ``row_log`` by io_uring and by threads, RocksDB (direct reads) and fio (O_DIRECT) read past it
anyway. Warm: all pages were read before. Keys are random.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import add_options, finish, print_machine, print_table, verdict

from hps_numba.storage.tiers.row_log import RowLogTier

TAG = "hps_et.bench.table"
_THREADS = 32
Read = Callable[[np.ndarray], object]


class Rate(NamedTuple):
    """Rows a second, of the best and of the median batch, and CPU time a row of this process in microseconds."""

    best: float
    median: float
    cpu: float

    @property
    def cells(self) -> list[str]:
        return [f"{self.best / 1e3:,.0f} / {self.median / 1e3:,.0f}", f"{self.cpu:.2f}"]


def measure(read: Read, keys: int, batch: int, seconds: float, before: Callable[[], None] | None) -> Rate:
    """Read random batches for some seconds; ``before`` is called before each, and not counted."""
    rng = np.random.default_rng(1)
    read(rng.permutation(keys)[:64])
    times, cpu = [], 0.0
    while sum(times) < seconds or len(times) < 3:
        some = rng.integers(0, keys, batch)
        if before is not None:
            before()
        busy, start = time.process_time(), time.perf_counter()
        read(some)
        times.append(time.perf_counter() - start)
        cpu += time.process_time() - busy
    return Rate(batch / min(times), batch / float(np.median(times)), cpu / len(times) / batch * 1e6)


def drop_pages(folder: Path) -> None:
    """Drop the pages of all files in a folder from the page cache, also those that this process has mapped."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder.resolve()) in line:
            start, end = (int(text, 16) for text in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def chunks(rows: int, dim: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for start in range(0, rows, 65536):
        keys = np.arange(start, min(start + 65536, rows))
        yield keys, rng.random((len(keys), dim), np.float32)


# --- the databases: each gives a function that reads a batch --------------------------------------------------------------


def fill_row_log(folder: Path, rows: int, dim: int) -> None:
    tier = RowLogTier.from_options(path=str(folder), sync="never")
    for keys, values in chunks(rows, dim):
        tier.insert(TAG, keys, values)
    tier.close()


def open_row_log(folder: Path, dim: int, reads: str) -> tuple[Read, Callable[[], object]]:
    tier = RowLogTier.from_options(path=str(folder), reads=reads, read_only=True, queue_depth=512, max_batch_size=1 << 20)
    buffers: dict[int, np.ndarray] = {}

    def read(keys: np.ndarray) -> None:
        out = buffers.setdefault(len(keys), np.empty((len(keys), dim), np.float32))
        assert tier.fetch(TAG, keys, out).found.all()

    return read, tier.close


def fill_lmdb(folder: Path, rows: int, dim: int) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 36, sync=False) as database:
        for keys, values in chunks(rows, dim):
            with database.begin(write=True) as change:
                change.cursor().putmulti((key.tobytes(), row.tobytes()) for key, row in zip(keys, values, strict=True))


def open_lmdb(folder: Path, dim: int) -> tuple[Read, Callable[[], object]]:
    import lmdb

    database = lmdb.open(str(folder), map_size=1 << 36, readonly=True, readahead=False)

    def read(keys: np.ndarray) -> np.ndarray:
        with database.begin(buffers=False) as look:
            found = look.cursor().getmulti([key.tobytes() for key in keys])
        return np.frombuffer(b"".join(row for _, row in found), np.float32).reshape(-1, dim)

    return read, database.close


def _rocks_options() -> Any:
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.set_use_direct_reads(True)
    options.set_use_direct_io_for_flush_and_compaction(True)
    return options


def fill_rocksdict(folder: Path, rows: int, dim: int) -> None:
    import rocksdict

    database = rocksdict.Rdict(str(folder), _rocks_options())
    for keys, values in chunks(rows, dim):
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, row in zip(keys, values, strict=True):
            batch.put(key.tobytes(), row.tobytes())
        database.write(batch)
    database.flush()
    database.close()


def open_rocksdict(folder: Path, dim: int, *, direct: bool) -> tuple[Read, Callable[[], object]]:
    import rocksdict

    options = _rocks_options() if direct else rocksdict.Options(raw_mode=True)
    database = rocksdict.Rdict(str(folder), options, access_type=rocksdict.AccessType.read_only())
    pool = ThreadPoolExecutor(_THREADS if direct else 2)

    def read_part(keys: np.ndarray) -> bytes:
        return b"".join(database.get([key.tobytes() for key in keys]))

    def read(keys: np.ndarray) -> np.ndarray:
        parts = pool.map(read_part, np.array_split(keys, min(len(keys), _THREADS if direct else 2)))
        return np.frombuffer(b"".join(parts), np.float32).reshape(-1, dim)

    def close() -> None:
        pool.shutdown()
        database.close()

    return read, close


def open_mapping(folder: Path, dim: int) -> tuple[Read, Callable[[], object]]:
    """Rows in a file of nothing else: what a gather costs that needs no index, no checksum and no safety."""
    rows = np.memmap(folder / "rows", np.float32, "r").reshape(-1, dim)
    buffers: dict[int, np.ndarray] = {}

    def read(keys: np.ndarray) -> None:
        np.take(rows, keys, axis=0, out=buffers.setdefault(len(keys), np.empty((len(keys), dim), np.float32)), mode="clip")

    return read, lambda: None


def fill_mapping(folder: Path, rows: int, dim: int) -> None:
    folder.mkdir()
    with (folder / "rows").open("wb") as file:
        for _, values in chunks(rows, dim):
            values.tofile(file)


def fio_iops(folder: Path, seconds: int) -> float | None:
    """Random direct reads of 4 KB a second that fio gets by io_uring; None without fio."""
    if shutil.which("fio") is None:
        return None
    options = "--name=x --rw=randread --bs=4k --direct=1 --ioengine=io_uring --iodepth=256 --size=1g --time_based"
    command = ["fio", *options.split(), f"--directory={folder}", f"--runtime={seconds}", "--output-format=json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / "x.0.0").unlink(missing_ok=True)
    return float(json.loads(found.stdout[found.stdout.index("{") :])["jobs"][0]["read"]["iops"])


# --- the run ----------------------------------------------------------------------------------------------------------------

_FILLS = {"row_log": fill_row_log, "lmdb": fill_lmdb, "rocksdict": fill_rocksdict, "plain mapping": fill_mapping}
_OPENS: dict[str, tuple[str, Callable[[Path, int], tuple[Read, Callable[[], object]]]]] = {
    "row_log io_uring": ("row_log", lambda folder, dim: open_row_log(folder, dim, "io_uring")),
    "row_log threads": ("row_log", lambda folder, dim: open_row_log(folder, dim, "threads")),
    "row_log mmap": ("row_log", lambda folder, dim: open_row_log(folder, dim, "mmap")),
    "lmdb": ("lmdb", open_lmdb),
    "rocksdict, direct, 32 threads": ("rocksdict", lambda folder, dim: open_rocksdict(folder, dim, direct=True)),
    "rocksdict, 2 threads": ("rocksdict", lambda folder, dim: open_rocksdict(folder, dim, direct=False)),
    "plain mapping": ("plain mapping", open_mapping),
}
_PAST_THE_CACHE = {"row_log io_uring", "row_log threads", "rocksdict, direct, 32 threads"}


def _measured(folder: Path, rows: int, dim: int, quick: bool) -> dict[str, dict[str, Rate]]:
    batch, seconds = (512, 0.02) if quick else (8192, 2.0)
    results: dict[str, dict[str, Rate]] = {}
    for name, (kind, opened) in _OPENS.items():
        home = folder / kind
        if not home.exists():
            _FILLS[kind](home, rows, dim)
        drop_pages(home)
        read, close = opened(home, dim)
        before = None if name in _PAST_THE_CACHE else lambda home=home: drop_pages(home)  # type: ignore[misc]
        small = 512 if name in ("lmdb", "plain mapping", "rocksdict, 2 threads") else batch  # a page fault at a time
        results[name] = {"cold": measure(read, rows, small, seconds, before)}
        if name not in _PAST_THE_CACHE:
            for start in range(0, rows, 65536):
                read(np.arange(start, min(start + 65536, rows)))
            results[name]["warm"] = measure(read, rows, batch if quick else 65536, seconds, None)
        close()
    return results


def run(quick: bool) -> dict[str, Any]:
    """Measure, print one table and what it means for goal T3; returns the figures."""
    rows = 20_000 if quick else 1_000_000
    figures: dict[str, Any] = {}
    table: list[list[str]] = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("HPS_NUMBA_BENCHMARK_DIR", ".")) as name:
        figures["fio IOPS"] = fio_iops(Path(name), 1 if quick else 5)
        for dim in (32, 128):
            folder = Path(name) / str(dim)
            folder.mkdir()
            results = _measured(folder, rows, dim, quick)
            shutil.rmtree(folder)
            figures[f"D={dim}"] = results
            for kind, rates in results.items():
                table += [[f"D={dim} {state}: {kind}", *rate.cells] for state, rate in rates.items()]
        again = fio_iops(Path(name), 1 if quick else 5)
    if figures["fio IOPS"] is not None and again is not None:
        table.append(
            [
                "fio, 4 KB random, io_uring, depth 256 (before / after)",
                f"{figures['fio IOPS'] / 1e3:.0f} / {again / 1e3:.0f}",
                "",
            ]
        )
        figures["fio IOPS"] = (figures["fio IOPS"] + again) / 2
    print_table(f"Random rows from disk, {rows:,} rows", ["", "k rows/s best / median", "CPU us a row"], table)
    for dim in (32, 128):
        _judge(figures[f"D={dim}"], figures["fio IOPS"], dim)
    return figures


def _judge(results: dict[str, dict[str, Rate]], iops: float | None, dim: int) -> None:
    cold = results["row_log io_uring"]["cold"].median
    warm = results["row_log mmap"]["warm"].median
    rocks = results["rocksdict, direct, 32 threads"]["cold"].median
    rocks_warm = results["rocksdict, 2 threads"]["warm"].median
    if iops:
        print(f"D={dim}: cold / fio: {cold / iops:.2f}, {verdict(cold / iops, at_least=0.9)}")
    print(f"D={dim}: cold / rocksdict: {cold / rocks:.1f}, {verdict(cold / rocks, at_least=3)}")
    print(f"D={dim}: warm / rocksdict: {warm / rocks_warm:.1f}, {verdict(warm / rocks_warm, at_least=40)}")


if __name__ == "__main__":
    given = add_options(argparse.ArgumentParser(description=__doc__)).parse_args()
    print_machine("Rows from a disk", quick=given.quick)
    finish(given.json, quick=given.quick, **run(given.quick))
