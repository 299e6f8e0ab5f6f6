# %% [markdown]
# # Your first cache policy
#
# A cache policy decides which row leaves when a set of the cache is full. Here one is written, tried on a trace beside LRU, LFU
# and the optimum, and put into the cache of a server: the same file, unchanged, with the hits that the simulator promised.
#
#     pip install hps-numba            # and "hps-numba[plot]" for the picture
#     python first_policy.py
#
# `TRACE=my_keys.npy` in the environment takes a trace of your own (`.npy`, CSV, Parquet, oracleGeneral, text) instead of the
# generated one; `HPS.record_trace` records one from a running server.

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
# Traffic that drifts: some keys are far more popular than others, and every 50,000 requests a quarter of all keys change their
# popularity. LRU loses popular keys to passers-by, LFU never forgets those that were popular once.

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
# Two functions of integers. `first` is the score of a row that comes in, `touch` that of a row that is asked for again; the row
# with the smallest score of its set leaves. `now` is the time in ticks: a call is one, or more if it is large beside the cache.
# `needs_count` asks for `count`, how often the call has the key. The class is only the namespace: there is no `self`.
#
# This one counts requests as LFU does, but from a level that rises by one every `AGE` ticks, and at most `MOST` above it: a row
# that nobody asks for any more is soon below a newcomer.

# %%
POLICY = """
AGE, MOST = 32, 8


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, MOST)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + MOST)
"""
file = folder / "my_policy.py"
file.write_text(POLICY)

# %% [markdown]
# ## Try it
#
# The GPU's cache has sets of ten rows and takes a call at a time: the geometry `gpu` is exactly that. `associative` has one
# order of all rows and takes one request after the other, the form in which the literature compares policies. Belady's optimum
# and the infinite cache say what could be reached at all.

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
    print("a picture and a page are in", folder)
if not os.environ.get("TRACE"):
    for mine, lru, lfu in zip(*(result.select(policy=name, geometry="gpu") for name in ("Fading", "lru", "lfu"))):
        assert mine.hit_rate > lru.hit_rate + 0.01 and mine.hit_rate > lfu.hit_rate

# %% [markdown]
# ## Choose its numbers
#
# A class in a cell is a policy too. With one order of all rows a policy is compiled soonest, so a few can be tried in seconds.

# %%
AGE = MOST = 0


class Fading:
    needs_count = True

    def first(now, count):
        return now // AGE + min(count, MOST)

    def touch(score, now, count):
        return min(max(score, now // AGE) + count, now // AGE + MOST)


for AGE, MOST in ((8, 8), (32, 8), (128, 8), (32, 32)):
    tried = simulate.run(trace, Fading, "10%", batch=BATCH, geometry="associative", bounds=False, progress=False)
    print(f"AGE {AGE:4} MOST {MOST:3}: {tried.runs[0].hit_rate:.2%} of {tried.runs[0].rows:,} rows")

# %% [markdown]
# ## Put it into a server
#
# The same file, named in the config. A file of Python runs code, so the caller has to allow it. Without a GPU `cache_on_cpu`
# has the same cache in host memory. It begins empty here (`init_ec` off), as the simulation does; rows that come back are
# compared, and the counters must be those of the simulation. Rows of one float are enough to see that.

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
    """Keys in the memory of the GPU go through its cache; without a GPU those in host memory do."""
    if device_count() == 0:
        return batch
    if importlib.util.find_spec("cupy"):
        return importlib.import_module("cupy").asarray(batch)
    return importlib.import_module("torch").from_numpy(batch).cuda()


logging.disable(logging.WARNING)  # it says that there is no GPU
with hps_numba.HPS(config, allow_code=True) as server:
    for start in range(0, len(keys), BATCH):
        batch = keys[start : start + BATCH]
        answer = server.lookup(on_the_device(batch), "demo", "items")
        if start % (100 * BATCH) == 0:
            answer = np.asarray(answer.get() if hasattr(answer, "get") else answer.cpu() if hasattr(answer, "cpu") else answer)
            assert np.array_equal(answer, rows[np.searchsorted(known, batch)])
    (cache,) = server.stats()["demo"]["items"].caches
promised = simulate.run(
    trace, f"{file}:Fading", cache.capacity, batch=BATCH, geometry="gpu", bounds=False, allow_code=True, progress=False
).runs[0]
print(f"simulated: {promised.hits:,} hits and {promised.evictions:,} evictions in {promised.rows:,} rows")
print(f"served:    {cache.hits:,} hits and {cache.evictions:,} evictions in {cache.capacity:,} rows")
assert (cache.hits, cache.evictions) == (promised.hits, promised.evictions)
