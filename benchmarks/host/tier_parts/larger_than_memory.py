"""A table larger than the memory that a server may use: ``row_log`` below a bounded host store, every row checked.

    python benchmarks/host/tier_parts/larger_than_memory.py --table-gb 12 --memory-gb 6

The table is written to a row_log straight, without a server. A child process whose memory is limited (a control group where
this user may make one, else RLIMIT_DATA, which the page cache does not count to) then opens a server on it and looks up keys
drawn from a Zipf distribution. Rows are functions of their keys, so that each answer is compared with what was written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import add_options, child_environment, finish, print_machine, print_table

TAG = "hps_et.m.table"
_CHUNK = 131_072
#: where groups are made, and the file of their limit, in version 2 and version 1
_CGROUPS = [
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
]


def rows_of(keys: np.ndarray, dim: int) -> np.ndarray:
    """float32 ``[n, dim]``: exact functions of key and column."""
    low = (keys & 0xFFF).astype(np.float32)[:, None]
    high = (keys >> 12).astype(np.float32)[:, None]
    columns = np.arange(dim, dtype=np.float32)
    return np.where(columns % 2 == 0, high * 2 + columns / 256, low + columns / 256).astype(np.float32)


def write_table(folder: Path, rows: int, dim: int) -> float:
    """Write the table; returns the seconds that it took, until it is on the disk."""
    from hps_numba.storage.tiers.row_log import RowLogTier

    start = time.perf_counter()
    tier = RowLogTier.from_options(path=str(folder / "rows"))
    for first in range(0, rows, _CHUNK):
        keys = np.arange(first, min(first + _CHUNK, rows))
        tier.insert(TAG, keys, rows_of(keys, dim))
    tier.close()
    return time.perf_counter() - start


def limit_memory(limit: int, name: str) -> str:
    """Limit this process; says how."""
    for home, file in _CGROUPS:
        if not (home / "cgroup.procs").exists():
            continue
        try:
            (home / name).mkdir()
            (home / name / file).write_text(str(limit))
            (home / name / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            continue
        return "control group"
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return "RLIMIT_DATA"


def config_of(folder: Path, dim: int, host_rows: int) -> dict[str, Any]:
    """A server of one table, of whose sparse model a single row is enough: the others are on the disk already."""
    model = folder / "one.model"
    model.mkdir(exist_ok=True)
    np.zeros(1, np.int64).tofile(model / "key")
    rows_of(np.zeros(1, np.int64), dim).tofile(model / "emb_vector")
    tiers = [
        {
            "type": "hash_map",
            "num_partitions": 1,
            "overflow_margin": host_rows,
            "overflow_policy": "evict_oldest",
            "initialize_after_startup": False,
            "cache_missed_embeddings": True,
        },
        {"type": "row_log", "path": str(folder / "rows"), "read_only": True},
    ]
    entry = {
        "model": "m",
        "sparse_files": [str(model)],
        "embedding_table_names": ["table"],
        "embedding_vecsize_per_table": [dim],
        "default_value_for_each_table": [0.0],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "deployed_device_list": [],
        "max_batch_size": 8192,
    }
    return {"supportlonglong": True, "models": [entry], "tiers": tiers}


def serve(folder: Path, rows: int, dim: int, given: argparse.Namespace) -> dict[str, Any]:
    """What the limited child does."""
    how = limit_memory(int(given.memory_gb * 2**30), folder.name)
    import hps_numba

    start = time.perf_counter()
    rng = np.random.default_rng(3)
    times: list[float] = []
    wrong = 0
    with hps_numba.HPS(config_of(folder, dim, int(given.memory_gb * 2**30 / 4 / (4 * dim)))) as server:
        opened = time.perf_counter() - start
        busy = time.process_time()
        deadline = time.perf_counter() + given.seconds
        while time.perf_counter() < deadline or len(times) < 3:
            keys = (rng.zipf(1.05, 8192) * 0x9E3779B1) % rows
            begin = time.perf_counter()
            answer = server.lookup(keys, "m", "table")
            times.append(time.perf_counter() - begin)
            wrong += int((answer != rows_of(keys, dim)).any(axis=1).sum())
        busy = time.process_time() - busy
        sweep = np.linspace(0, rows - 1, 65536).astype(np.int64)  # and some of each part of the table
        wrong += int((server.lookup(sweep, "m", "table") != rows_of(sweep, dim)).any(axis=1).sum())
        stats = server.stats()["m"]["table"]
    keys_asked = 8192 * len(times)
    return {
        "limited by": how,
        "opened s": opened,
        "keys": keys_asked,
        "wrong rows": wrong,
        "k keys/s": keys_asked / sum(times) / 1e3,
        "ms a batch p50": float(np.median(times)) * 1e3,
        "ms a batch p99": float(np.quantile(times, 0.99)) * 1e3,
        "CPU us a key": busy / keys_asked * 1e6,
        "share of keys from the disk": stats.tier_hits / max(1, keys_asked),
        "peak resident GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def run(quick: bool, given: argparse.Namespace | None = None) -> dict[str, Any]:
    """Write the table, serve it from a child, print one table; returns the figures."""
    given = given if given is not None else parser().parse_args(["--quick"] if quick else [])
    if quick:
        given.table_gb, given.memory_gb, given.seconds = 0.02, 2.0, 0.1
    slot = 24 + 4 * given.dim
    rows = int(given.table_gb * 2**30 / slot)
    free = shutil.disk_usage(given.folder).free
    if rows * slot > 0.8 * free:
        rows = int(0.8 * free / slot)
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="row_log_") as name:
        folder = Path(name)
        written = write_table(folder, rows, given.dim)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        command = [sys.executable, __file__, "--serve", name, "--rows", str(rows), "--dim", str(given.dim)]
        command += ["--memory-gb", str(given.memory_gb), "--seconds", str(given.seconds)]
        child = subprocess.run(command, capture_output=True, text=True, env=child_environment())
        for home, _ in _CGROUPS:
            if (home / folder.name).is_dir():
                (home / folder.name).rmdir()
        if child.returncode:
            raise SystemExit(f"the limited process ended with {child.returncode}: {child.stderr[-2000:]}")
        figures: dict[str, Any] = {
            "rows": rows,
            "dim": given.dim,
            "GB on disk": size / 2**30,
            "GB of memory allowed": given.memory_gb,
            "written k rows/s": rows / written / 1e3,
            **json.loads(child.stdout),
        }
    cells = [
        [name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value]
        for name, value in figures.items()
    ]
    print_table("A table larger than memory", ["", "value"], cells)
    if figures["wrong rows"]:
        raise SystemExit("rows were wrong")
    return figures


def parser() -> argparse.ArgumentParser:
    options = add_options(argparse.ArgumentParser(description=__doc__))
    options.add_argument("--table-gb", type=float, default=12.0, help="size of the table on disk")
    options.add_argument("--memory-gb", type=float, default=6.0, help="memory that the server may use")
    options.add_argument("--dim", type=int, default=128)
    options.add_argument("--seconds", type=float, default=60.0, help="how long it serves")
    options.add_argument("--folder", type=Path, default=Path.cwd(), help="where the table is written, and deleted after")
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    return options


if __name__ == "__main__":
    asked = parser().parse_args()
    if asked.serve is not None:
        json.dump(serve(asked.serve, asked.rows, asked.dim, asked), sys.stdout)
    else:
        print_machine("A table larger than memory", quick=asked.quick)
        finish(asked.json, quick=asked.quick, **run(asked.quick, asked))
