"""A table larger than its cache: every row is exact, and most rows are served from the cache.

GPU memory holds a part of the table (``gpucacheper``), pinned host memory the whole table. The traffic is skewed; in the middle
of the run it shifts to other rows, and the cache adapts. The program prints hit rate and latency, plots them batch by batch
with ``--out``, and compares every row with the model.

::

    pip install "hps-numba[cuda13]"            # and "hps-numba[plot]" for the plot
    python gpu_cache.py --rows 5000000 --batch 65536 --out gpu_cache.png

Without a GPU, the same program runs with ``cache_on_cpu: true``: the same cache, compiled for the CPU, in host memory. Its hit
rates equal those of a GPU; its latencies do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hps_numba
from hps_numba.device.driver import device_count, why_no_device
from hps_numba.simulate.workloads import power_law

ALPHA = 1.1  # of the traffic: the larger, the more skewed
LINES = 10  # of the printed table
INSTALL_PLOT = 'the plot needs matplotlib: pip install "hps-numba[plot]"'
INSTALL_ARRAYS = 'keys on the GPU need CuPy or Torch: pip install "hps-numba[cuda13]"'


@dataclass
class Batch:
    """The share of keys that hit the cache, and the seconds until the rows were available."""

    hit_rate: float
    seconds: float


class HostMemory:
    """Keys and rows are NumPy arrays."""

    def keys(self, keys: np.ndarray) -> Any:
        return keys

    def rows(self, rows: Any) -> np.ndarray:
        return rows

    def wait(self) -> None:
        """A lookup is complete when it returns."""


class CupyMemory:
    """Keys and rows are CuPy arrays."""

    def __init__(self) -> None:
        self._cupy = importlib.import_module("cupy")

    def keys(self, keys: np.ndarray) -> Any:
        return self._cupy.asarray(keys)

    def rows(self, rows: Any) -> np.ndarray:
        return self._cupy.asnumpy(rows)

    def wait(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()


class TorchMemory:
    """Keys and rows are Torch tensors."""

    def __init__(self) -> None:
        self._torch = importlib.import_module("torch")

    def keys(self, keys: np.ndarray) -> Any:
        return self._torch.from_numpy(keys).cuda()

    def rows(self, rows: Any) -> np.ndarray:
        return rows.cpu().numpy()

    def wait(self) -> None:
        self._torch.cuda.synchronize()


def memory_of_keys() -> Any:
    """Memory for keys: on the GPU, if there is one and a library for its arrays."""
    if device_count() == 0:
        return HostMemory()
    if importlib.util.find_spec("cupy"):
        return CupyMemory()
    if importlib.util.find_spec("torch"):
        return TorchMemory()
    sys.exit(INSTALL_ARRAYS)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="A table larger than its cache, served exactly.")
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the table")
    parser.add_argument("--dim", type=int, default=32, help="float32 elements in a row")
    parser.add_argument("--batches", type=int, default=100, help="number of lookups")
    parser.add_argument("--batch", type=int, default=4096, help="keys in a lookup")
    parser.add_argument("--gpucacheper", type=float, default=0.1, help="share of the rows that the cache holds")
    parser.add_argument("--out", type=Path, metavar="PNG", help="plot hit rate and latency to this file")
    options = parser.parse_args(arguments)
    for name in ("rows", "dim", "batches", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    if not 0 < options.gpucacheper <= 1:
        parser.error(f"--gpucacheper: expected more than 0 and at most 1, got {options.gpucacheper}")
    if options.out is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit(INSTALL_PLOT)
    return options


def config_for(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A config in the form of HugeCTR HPS, with ``cache_on_cpu`` for machines without a GPU."""
    entry = {
        "model": "shop",
        "sparse_files": [str(model)],
        "embedding_table_names": ["items"],
        "embedding_vecsize_per_table": [options.dim],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [0],
        "max_batch_size": options.batch,
        "gpucache": True,
        "gpucacheper": options.gpucacheper,
        "cache_policy": "lru",
    }
    return {"supportlonglong": True, "cache_on_cpu": device_count() == 0, "models": [entry]}


def traffic(options: argparse.Namespace) -> list[np.ndarray]:
    """The keys of all batches: a few rows are popular, and from the middle on these are other rows."""
    rng = np.random.default_rng(7)
    popular = rng.permutation(options.rows)  # the rank of a key is independent of its number
    popular_later = rng.permutation(options.rows)
    batches = []
    for number in range(options.batches):
        ranks = power_law(options.rows, options.batch, ALPHA, rng)
        batches.append((popular if number < options.batches // 2 else popular_later)[ranks])
    return batches


def serve(server: hps_numba.HPS, batches: list[np.ndarray], matrix: np.ndarray) -> list[Batch]:
    """Look up all batches, compare every row, and measure each batch."""
    memory, served = memory_of_keys(), []
    # the first lookup compiles the kernels; with one key, so that the cache hardly changes
    server.lookup(memory.keys(np.full_like(batches[0], batches[0][0])), "shop", "items")
    memory.wait()
    for number, keys in enumerate(batches):
        device_keys = memory.keys(keys)
        before, start = server.stats()["shop"]["items"], time.perf_counter()
        rows = server.lookup(device_keys, "shop", "items")
        memory.wait()
        seconds = time.perf_counter() - start
        after = server.stats()["shop"]["items"]
        assert np.array_equal(memory.rows(rows).view(np.uint32), matrix[keys].view(np.uint32)), f"wrong rows in batch {number}"
        served.append(Batch((after.cache_hits - before.cache_hits) / len(keys), seconds))
    return served


def print_batches(served: list[Batch]) -> None:
    """Print a line for each tenth of the run."""
    print(f"\n{'batches':>13}  {'hit rate':>8}  {'latency (median)':>16}")
    for part in np.array_split(np.arange(len(served)), min(LINES, len(served))):
        some = [served[number] for number in part]
        rate, seconds = np.mean([batch.hit_rate for batch in some]), np.median([batch.seconds for batch in some])
        print(f"{part[0] + 1:>5} to {part[-1] + 1:>4}  {rate:>8.1%}  {seconds * 1e6:>13.1f} us")


def draw(served: list[Batch], path: Path, title: str) -> None:
    """Plot hit rate and latency over the number of the batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    numbers = np.arange(1, len(served) + 1)
    above.plot(numbers, [100 * batch.hit_rate for batch in served], color="#2a9d8f")
    above.set_ylabel("hit rate, %")
    above.set_ylim(0, 100)
    below.plot(numbers, [1e6 * batch.seconds for batch in served], color="#4c78a8")
    below.set_ylabel("latency, us")
    below.set_ylim(bottom=0)
    below.set_xlabel("batch")
    for axes in (above, below):
        axes.axvline(len(served) // 2 + 0.5, color="#666666", linewidth=0.9, linestyle="--")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    """Generate the model, serve the traffic, print and plot the results."""
    options = options_of()
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s: %(message)s")  # messages of the server
    rng = np.random.default_rng(1)
    matrix = rng.random((options.rows, options.dim), np.float32)
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "items.model"
        hps_numba.write_model(model, options.dim, [(np.arange(options.rows), matrix)])
        with hps_numba.HPS(config_for(model, options), progress=False) as server:
            served = serve(server, traffic(options), matrix)
            stats = server.stats()["shop"]["items"]
    where = f"no GPU ({why_no_device()}): cache_on_cpu" if device_count() == 0 else "a cache on the GPU"
    title = f"{options.rows:,} rows x {options.dim} float32, a cache for {options.gpucacheper:.0%} of them"
    print(f"machine  {where}\ntable    {title}")
    print(f"traffic  {options.batches} batches of {options.batch:,} keys, which shift to other rows in the middle")
    print_batches(served)
    print(f"\nall {options.batches * options.batch:,} rows equal those of the model")
    print(f"cache    {stats.cache_hits:,} hits, {stats.cache_misses:,} misses")
    print(f"         {stats.cache_insertions:,} insertions, {stats.cache_evictions:,} evictions")
    assert stats.defaults == 0 and stats.cache_hits + stats.cache_misses == stats.keys
    if options.out is not None:
        draw(served, options.out, title)
        print(f"plot     {options.out}")


if __name__ == "__main__":
    main()
