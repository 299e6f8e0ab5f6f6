"""P7: loading a 1 GiB model from the page cache into a host store that is ready to serve, in directory form and as HDF5.

Each repetition is a fresh process. ``first server`` is the first server of the process, so its time includes the import of
numba and the loading of kernels from their cache (see startup.py); ``next server`` follows one for a tiny model. Memory is the
growth of the peak of resident memory, measured from just before ``HPS(config)``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from model import config_of, save_model
from report import add_options, child_environment, finish, print_machine, print_table, verdict

import hps_numba

DIM = 64
ROWS, QUICK_ROWS = 1 << 22, 1 << 14
TINY_ROWS = 64
REPETITIONS, QUICK_REPETITIONS = 7, 1
RATE_TARGET, MEMORY_TARGET = 1.0, 1.15
KINDS = ("first server", "next server", "next server, HDF5", "numpy.fromfile")


# -- in the child process ---------------------------------------------------------------------------------------------


def resident(name: str) -> int:
    """Bytes of resident memory of this process: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def load_by_server(model: Path, folder: Path, tiny: Path | None) -> dict[str, float]:
    """Serve ``model``, whose rows are in ``folder`` in directory form."""
    if tiny is not None:
        hps_numba.HPS(config_of(tiny, DIM)).close()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    start = time.perf_counter()
    server = hps_numba.HPS(config_of(model, DIM))
    seconds = time.perf_counter() - start
    grown = resident("VmHWM") - before
    with server:
        check_rows(server, folder)
        plan = server.plan()
    return {"seconds": seconds, "grown": grown, "planned": plan.host_bytes + plan.loading_bytes}


def check_rows(server: Any, folder: Path) -> None:
    """Compare a thousand rows, evenly spaced over the table, with those in the file."""
    keys = np.memmap(folder / "key", np.int64, "r")
    rows = np.memmap(folder / "emb_vector", np.float32, "r").reshape(-1, DIM)
    some = np.linspace(0, len(keys) - 1, 1000).astype(np.int64)
    if not np.array_equal(server.lookup(np.array(keys[some]), "m", 0), rows[some]):
        raise SystemExit("wrong rows")


def load_by_numpy(folder: Path) -> dict[str, float]:
    before = resident("VmRSS")
    start = time.perf_counter()
    arrays = [np.fromfile(folder / "key", np.int64), np.fromfile(folder / "emb_vector", np.float32)]
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "grown": resident("VmHWM") - before, "planned": sum(array.nbytes for array in arrays)}


def child(kind: str, folder: Path) -> dict[str, float]:
    if kind == "numpy.fromfile":
        return load_by_numpy(folder / "large")
    hdf5 = kind.endswith("HDF5")
    tiny = None if kind == "first server" else folder / ("tiny.h5" if hdf5 else "tiny")
    return load_by_server(folder / ("large.h5" if hdf5 else "large"), folder / "large", tiny)


# -- in the parent ----------------------------------------------------------------------------------------------------


def run_child(kind: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=child_environment(), check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def measure(folder: Path, repetitions: int, *, quick: bool) -> list[dict[str, Any]]:
    size = sum(file.stat().st_size for file in (folder / "large").iterdir())
    if not quick:  # warm-up: page cache, bytecode, kernel cache
        for kind in KINDS:
            run_child(kind, folder)
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repetitions):
        for kind in KINDS:
            runs[kind].append(run_child(kind, folder))
    return [summary(kind, size, some) for kind, some in runs.items()]


def summary(kind: str, size: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    middle = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    times = [run["seconds"] for run in runs]
    rate, share = size / 1e9 / middle["seconds"], middle["grown"] / middle["planned"]
    ours, directory = kind != "numpy.fromfile", kind in ("first server", "next server")
    return {
        "name": kind,
        **middle,
        "fastest": min(times),
        "slowest": max(times),
        "gigabytes_per_second": rate,
        "grown_by_planned": share,
        "rate_target": verdict(rate, at_least=RATE_TARGET) if directory else "",
        "memory_target": verdict(share, at_most=MEMORY_TARGET) if ours else "",
    }


def show(results: list[dict[str, Any]], title: str) -> None:
    reference = results[-1]["seconds"]
    times = [
        [
            run["name"],
            f"{run['seconds']:.3f}",
            f"{run['fastest']:.3f} .. {run['slowest']:.3f}",
            f"{run['gigabytes_per_second']:.2f}",
            f"{run['seconds'] / reference:.2f}",
            run["rate_target"],
        ]
        for run in results
    ]
    print_table(title, ["", "s", "range", "GB/s", "time / fromfile", "target GB/s"], times)
    memory = [
        [
            run["name"],
            f"{run['grown'] / 2**20:.0f}",
            f"{run['planned'] / 2**20:.0f}",
            f"{run['grown_by_planned']:.3f}",
            run["memory_target"],
        ]
        for run in results
    ]
    print_table("Growth of the peak of resident memory", ["", "MiB", "planned", "ratio", "target"], memory)


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description="Loading of a 1 GiB model into host memory (P7)."))
    parser.add_argument("--folder", type=Path, help="directory in which to write the model (default: a temporary one)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.folder)))
        return
    rows, repetitions = (QUICK_ROWS, QUICK_REPETITIONS) if options.quick else (ROWS, REPETITIONS)
    print_machine(f"Loading (P7): medians of {repetitions} processes, page cache warm", quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="hps_loading_", dir=options.folder) as temporary:
        folder = Path(temporary)
        save_model(folder / "large", rows, DIM)
        save_model(folder / "tiny", TINY_ROWS, DIM)
        for name in ("large", "tiny"):
            hps_numba.convert_model(folder / name, folder / f"{name}.h5")
        results = measure(folder, repetitions, quick=options.quick)
    show(results, f"D={DIM}: {rows:,} rows, {rows * (4 * DIM + 8) / 1e9:.3f} GB of files")
    finish(options.json, quick=options.quick, rows=rows, dim=DIM, results=results)


if __name__ == "__main__":
    main()
