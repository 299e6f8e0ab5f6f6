"""A table larger than the cache in front of it: every row exact, most of them from the cache.

A GPU's memory holds a part of a table (``gpucacheper``), pinned host memory all of it. Skewed traffic runs through the cache;
in the middle of the run it turns to other rows, and the cache follows. Hit rate and latency are printed, and drawn batch by
batch with ``--out``; every row that comes back is compared with the model.

::

    pip install "hps-numba[cuda13]"            # and "hps-numba[plot]" for the picture
    python gpu_cache.py --rows 5000000 --batch 65536 --out gpu_cache.png

Without a GPU the same program runs with ``cache_on_cpu: true``: the same cache, compiled for the CPU, in the memory of the
process. Its hit rates are those of a GPU; its latencies are not.
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

ALPHA = 1.1  # of the traffic: the larger, the fewer rows take most of it
LINES = 10  # printed
INSTALL_PLOT = 'the picture needs matplotlib: pip install "hps-numba[plot]"'
INSTALL_ARRAYS = 'keys on the GPU need CuPy or Torch: pip install "hps-numba[cuda13]"'


@dataclass
class Batch:
    """What one batch took: share of its keys that the cache had, and seconds until its rows were there."""

    hit_rate: float
    seconds: float


class HostMemory:
    """Keys and rows are NumPy arrays."""

    def keys(self, keys: np.ndarray) -> Any:
        return keys

    def rows(self, rows: Any) -> np.ndarray:
        return rows

    def wait(self) -> None:
        """A lookup is done when it returns."""


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
    """Where keys lie: on the GPU, if there is one and a library for its arrays."""
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
    parser.add_argument("--batches", type=int, default=100, help="lookups")
    parser.add_argument("--batch", type=int, default=4096, help="keys in each")
    parser.add_argument("--gpucacheper", type=float, default=0.1, help="share of the rows that the cache holds")
    parser.add_argument("--out", type=Path, metavar="PNG", help="draw hit rate and latency to this file")
    options = parser.parse_args(arguments)
    for name in ("rows", "dim", "batches", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)}, wanted 1 or more")
    if not 0 < options.gpucacheper <= 1:
        parser.error(f"--gpucacheper: {options.gpucacheper}, wanted more than 0 and at most 1")
    if options.out is not None and importlib.util.find_spec("matplotlib") is None:
        sys.exit(INSTALL_PLOT)
    return options


def config_for(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A config with the original's keys, and ``cache_on_cpu`` for machines without a GPU."""
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
    """Keys of all batches: a few rows are asked for often; from the middle on others than before."""
    rng = np.random.default_rng(7)
    popular = rng.permutation(options.rows)  # the rank of a key says nothing of its number
    turned = rng.permutation(options.rows)
    batches = []
    for number in range(options.batches):
        ranks = power_law(options.rows, options.batch, ALPHA, rng)
        batches.append((popular if number < options.batches // 2 else turned)[ranks])
    return batches


def serve(server: hps_numba.HPS, batches: list[np.ndarray], matrix: np.ndarray) -> list[Batch]:
    """Look all batches up, compare every row, and say what each took."""
    memory, served = memory_of_keys(), []
    # the first lookup ever compiles the kernels; of one key, so that the cache stays as it was
    server.lookup(memory.keys(np.full_like(batches[0], batches[0][0])), "shop", "items")
    memory.wait()
    for number, keys in enumerate(batches):
        asked = memory.keys(keys)
        before, start = server.stats()["shop"]["items"], time.perf_counter()
        rows = server.lookup(asked, "shop", "items")
        memory.wait()
        seconds = time.perf_counter() - start
        after = server.stats()["shop"]["items"]
        assert np.array_equal(memory.rows(rows).view(np.uint32), matrix[keys].view(np.uint32)), f"wrong rows in batch {number}"
        served.append(Batch((after.cache_hits - before.cache_hits) / len(keys), seconds))
    return served


def print_batches(served: list[Batch]) -> None:
    """A line for each tenth of the run."""
    print(f"\n{'batches':>13}  {'hit rate':>8}  {'latency (median)':>16}")
    for part in np.array_split(np.arange(len(served)), min(LINES, len(served))):
        some = [served[number] for number in part]
        rate, seconds = np.mean([batch.hit_rate for batch in some]), np.median([batch.seconds for batch in some])
        print(f"{part[0] + 1:>5} to {part[-1] + 1:>4}  {rate:>8.1%}  {seconds * 1e6:>13.1f} us")


def draw(served: list[Batch], path: Path, title: str) -> None:
    """Hit rate above, latency below, over the number of the batch."""
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
    """Make the model, serve the traffic, print and draw what came of it."""
    options = options_of()
    logging.basicConfig(stream=sys.stdout, format="%(levelname)s: %(message)s")  # what the server says of the machine
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
    print(f"traffic  {options.batches} batches of {options.batch:,} keys, other rows from the middle on")
    print_batches(served)
    print(f"\nall {options.batches * options.batch:,} rows are exactly those of the model")
    print(f"cache    {stats.cache_hits:,} hits, {stats.cache_misses:,} misses, {stats.cache_insertions:,} rows came in")
    print(f"         {stats.cache_evictions:,} left for others")
    assert stats.defaults == 0 and stats.cache_hits + stats.cache_misses == stats.keys
    if options.out is not None:
        draw(served, options.out, title)
        print(f"picture  {options.out}")


if __name__ == "__main__":
    main()
