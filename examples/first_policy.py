# %% [markdown]
# # Your first cache policy
#
# A cache policy decides which row is evicted when a set of the cache is full. This example writes one, compares it on a trace
# with LRU, LFU and the optimum, and uses it in the cache of a server: the same file, unchanged, with the hits that the
# simulator predicted.
#
#     pip install hps-numba            # and "hps-numba[plot]" for the plots
#     python first_policy.py
#
# `TRACE=my_keys.npy` in the environment uses your own trace (`.npy`, CSV, Parquet, oracleGeneral, text) instead of a generated
# one; `HPS.record_trace` records a trace from a running server.

# %%
from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import hps_numba
from hps_numba import simulate
from hps_numba.device.driver import device_count

folder = Path(tempfile.mkdtemp())
random = np.random.default_rng(0)

# %% [markdown]
# ## A trace
#
# The traffic drifts: some keys are far more popular than others, and every 50,000 requests a quarter of all keys change their
# popularity. LRU evicts popular keys in favour of keys that are requested once, LFU keeps keys that were popular long ago.

# %%
KEYS, REQUESTS, DRIFT = 20_000, 400_000, 50_000


def drifting() -> np.ndarray:
    heights = np.cumsum(1 / np.arange(1, KEYS + 1))
    ranks = np.searchsorted(heights / heights[-1], random.random(REQUESTS))
    of_rank = random.permutation(KEYS)
    parts = []
    for part in np.split(ranks, range(DRIFT, REQUESTS, DRIFT)):
        parts.append(of_rank[part])
        moved = random.choice(KEYS, KEYS // 4, replace=False)
        of_rank[moved] = of_rank[random.permutation(moved)]
    return np.concatenate(parts).astype(np.int64)


if os.environ.get("TRACE"):
    trace = simulate.open_trace(os.environ["TRACE"])
else:
    trace = simulate.open_trace(drifting(), name="drifting Zipf, generated")
keys = trace.keys()
known = np.unique(keys)
print(f"{trace.name}: {len(keys):,} requests for {len(known):,} keys")

# %% [markdown]
# ## A policy
#
# Two functions of integers. `first` is the score of a new row, `touch` the score of a row that is requested again; the row with
# the smallest score in its set is evicted. `now` is the time in ticks: one for each call, or more if the call is large relative
# to the cache. `needs_count` requests `count`, the number of times that the call contains the key. The class is only a
# namespace: there is no `self`.
#
# This policy counts requests as LFU does, but from a level that rises by one every `AGE` ticks, and at most `LIMIT` above it: a
# row that is no longer requested soon has a lower score than a new one.

# %%
POLICY = """
AGE, LIMIT = 32, 8


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, LIMIT)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + LIMIT)
"""
file = folder / "my_policy.py"
file.write_text(POLICY)

# %% [markdown]
# ## Try it
#
# The GPU cache has sets of ten rows and processes whole calls: the geometry `gpu` does exactly that. `associative` has one
# order of all rows and processes one request after the other, as in the literature. Belady's optimum and the infinite cache are
# upper bounds.

# %%
BATCH, SIZES = 256, "2%:20%:4"
policies = ["lru", "lfu", f"{file}:Fading"]
result = simulate.run(trace, policies, SIZES, batch=BATCH, allow_code=True, progress=False)
print(f"{'hit rate':24}" + "".join(f"{rows:>8,}" for rows in result.sizes) + "  rows")
for (policy, geometry), runs in result.curves().items():
    print(f"{policy:12}{geometry:12}" + "".join(f"{run.hit_rate:8.1%}" for run in runs))
if importlib.util.find_spec("matplotlib"):
    simulate.write_plot(result, folder / "first_policy.png")
    simulate.write_page(result, folder / "first_policy.html")
    print("a plot and an HTML page are in", folder)
if not os.environ.get("TRACE"):
    for mine, lru, lfu in zip(*(result.select(policy=name, geometry="gpu") for name in ("Fading", "lru", "lfu"))):
        assert mine.hit_rate > lru.hit_rate + 0.01 and mine.hit_rate > lfu.hit_rate

# %% [markdown]
# ## Choose its constants
#
# A class in a cell is a policy as well. A fully associative simulation compiles fastest, so several variants can be tried in
# seconds.

# %%
AGE = LIMIT = 0


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, LIMIT)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + LIMIT)


for AGE, LIMIT in ((8, 8), (32, 8), (128, 8), (32, 32)):
    tried = simulate.run(trace, Fading, "10%", batch=BATCH, geometry="associative", bounds=False, progress=False)
    print(f"AGE {AGE:4} LIMIT {LIMIT:3}: hit rate {tried.runs[0].hit_rate:.2%} with {tried.runs[0].rows:,} rows")

# %% [markdown]
# ## Use it in a server
#
# The config names the same file. A Python file runs code, so the caller has to permit it. Without a GPU, `cache_on_cpu` runs
# the same cache in host memory. Here it starts empty (`init_ec` is off), like the simulation; the rows are checked, and the
# counters must equal those of the simulation. Rows of one float are enough for that.

# %%
rows = np.arange(len(known), dtype=np.float32).reshape(-1, 1)
hps_numba.write_model(folder / "table.model", 1, [(known, rows)])
config = {
    "supportlonglong": True,
    "cache_on_cpu": device_count() == 0,
    "models": [
        {
            "model": "demo",
            "sparse_files": [str(folder / "table.model")],
            "embedding_table_names": ["items"],
            "embedding_vecsize_per_table": [1],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0],
            "max_batch_size": BATCH,
            "gpucacheper": 0.1,
            "cache_policy": f"{file}:Fading",
            "init_ec": False,
        }
    ],
}


def on_the_device(batch: np.ndarray) -> Any:
    """The keys in GPU memory, where they are looked up in the GPU cache; without a GPU, in host memory."""
    if device_count() == 0:
        return batch
    if importlib.util.find_spec("cupy"):
        return importlib.import_module("cupy").asarray(batch)
    return importlib.import_module("torch").from_numpy(batch).cuda()


logging.disable(logging.WARNING)  # it warns that there is no GPU
with hps_numba.HPS(config, allow_code=True) as server:
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        answer = server.lookup(on_the_device(batch), "demo", "items")
        if start % (100 * BATCH) == 0:
            answer = np.asarray(answer.get() if hasattr(answer, "get") else answer.cpu() if hasattr(answer, "cpu") else answer)
            assert np.array_equal(answer, rows[np.searchsorted(known, batch)])
    (cache,) = server.stats()["demo"]["items"].caches
predicted = simulate.run(
    trace, f"{file}:Fading", cache.capacity, batch=BATCH, geometry="gpu", bounds=False, allow_code=True, progress=False
).runs[0]
print(f"simulated: {predicted.hits:,} hits and {predicted.evictions:,} evictions in {predicted.rows:,} rows")
print(f"served:    {cache.hits:,} hits and {cache.evictions:,} evictions in {cache.capacity:,} rows")
assert (cache.hits, cache.evictions) == (predicted.hits, predicted.evictions)
