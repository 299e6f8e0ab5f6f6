# %% [markdown]
# # Why is my hit rate lower than I thought?
#
# A paper, or your own simulation, predicts a hit rate for LRU with a tenth of the rows; `server.stats()` shows a lower one.
# This example explains the difference on a trace: what is counted, the cold start, the batches, and the sets of the cache. Each
# part is measured separately, with the code of the cache itself.
#
#     pip install hps-numba            # and "hps-numba[plot]" for the plots
#     python hit_rate_lower_than_thought.py
#
# `TRACE=my_keys.npy` in the environment uses your own trace instead of a generated one.

# %%
from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import numpy as np

from hps_numba import simulate

folder = Path(tempfile.mkdtemp())
KEYS, REQUESTS = 20_000, 250_000


def zipf() -> np.ndarray:
    random = np.random.default_rng(0)
    heights = np.cumsum(1 / np.arange(1, KEYS + 1))
    return random.permutation(KEYS)[np.searchsorted(heights / heights[-1], random.random(REQUESTS))].astype(np.int64)


if os.environ.get("TRACE"):
    trace = simulate.open_trace(os.environ["TRACE"])
else:
    trace = simulate.open_trace(zipf(), name="Zipf 1.0, generated")
keys = trace.keys()
known = len(np.unique(keys))
rows = max(20, known // 100 * 10)
CALL = max(64, min(4096, rows * 2))
print(f"{trace.name}: {len(keys):,} requests for {known:,} keys; a cache of {rows:,} rows, calls of {CALL:,} keys")


def hit_rate(policy: str = "lru", size: int = rows, *, geometry: str = "gpu", **options: float) -> simulate.Run:
    """One run of the simulator."""
    return simulate.run(trace, policy, size, geometry=geometry, bounds=False, progress=False, **options).runs[0]


# %% [markdown]
# ## What you expected, and what the server shows
#
# Expected: LRU over all rows, one request after the other, warm. Shown: the GPU cache, with sets of ten rows and calls of many
# keys, starting empty.

# %%
WARM = 0.2
expected = hit_rate(geometry="associative", warmup=WARM).hit_rate
shown = hit_rate(batch=CALL)
print(f"expected {expected:.1%}, shown {shown.hit_rate:.1%}")

# %% [markdown]
# ## What is possible
#
# The first request for a key misses in every cache: no policy beats the infinite cache, and none of this size beats Belady's
# optimum, which knows the future.

# %%
bounds = {run.policy: run for run in simulate.run(trace, "belady", rows, progress=False).runs}
print(f"infinite cache {bounds['infinite'].hit_rate:.1%}, optimum of {rows:,} rows {bounds['belady'].hit_rate:.1%}")
assert shown.hit_rate <= bounds["belady"].hit_rate <= bounds["infinite"].hit_rate

# %% [markdown]
# ## Warm-up
#
# An empty cache misses until it is full. In a short trace these are a large part of all misses; in a server that runs for days
# they do not matter. Servers also fill their caches when they start (`init_ec`). So leave out the first part of the trace.

# %%
warm = hit_rate(batch=CALL, warmup=WARM)
windows = shown.by_window / (len(keys) / len(shown.by_window))
print("hit rate of each twentieth of the trace:", " ".join(f"{part.mean():.0%}" for part in np.array_split(windows, 20)))
print(f"warm {warm.hit_rate:.1%}, {100 * (warm.hit_rate - shown.hit_rate):+.1f} pp")

# %% [markdown]
# ## Batches
#
# All keys of a call are looked up before any row is inserted. So a missing key that a call contains five times misses five
# times, while separate requests would miss once. And a call that inserts more rows into a set than it has ways evicts rows that
# should have stayed. Both effects grow with the size of the call relative to the cache.

# %%
calls = [64, 256, 1024, 4096]
by_call = {call: hit_rate(batch=call, warmup=WARM) for call in calls}
for call, run in by_call.items():
    print(f"calls of {call:5,}: {run.hit_rate:6.1%} of requests, {run.key_hit_rate:6.1%} of the distinct keys of a call")
small = by_call[64].hit_rate

# %% [markdown]
# The right column is another trap: a cache that removes duplicates before it counts, as HugeCTR does, reports hits of distinct
# keys: a different number for the same traffic and the same cache.

# %%
assert all(run.key_hit_rate < run.hit_rate for run in by_call.values())
if not os.environ.get("TRACE"):
    assert small > by_call[4096].hit_rate + 0.02

# %% [markdown]
# ## Sets
#
# A key belongs to one set of ten rows, chosen by a hash. If more than ten popular keys fall into one set, they evict each
# other, while other sets have free ways. This is the difference that remains with small calls.

# %%
in_sets = np.bincount(np.random.default_rng(1).integers(0, rows // 10, rows), minlength=rows // 10)
print(f"{rows:,} keys at random in {rows // 10:,} sets: {np.mean(in_sets > 10):.0%} of the sets get more than ten")
print(f"sets {small:.1%}, one order of all rows {expected:.1%}: {100 * (small - expected):+.1f} pp")
if not os.environ.get("TRACE"):
    assert -0.02 < small - expected < 0.005

# %% [markdown]
# ## All together

# %%
steps = [("expected: LRU, one order, warm", expected), ("sets of ten rows", small - expected)]
steps += [
    (f"calls of {CALL:,} instead of 64", warm.hit_rate - small),
    ("starting with an empty cache", shown.hit_rate - warm.hit_rate),
]
for name, value in steps:
    print(f"{name:36}" + (f"{value:8.1%}" if name.startswith("expected") else f"{100 * value:+7.1f} pp"))
print(f"{'shown':36}{shown.hit_rate:8.1%}")
assert abs(sum(value for _, value in steps) - shown.hit_rate) < 1e-12

# %% [markdown]
# ## What helps
#
# Another policy, a larger cache, smaller calls. `hps-numba simulate --advise` finds the least memory that reaches a hit rate.

# %%
options = [("as it is", "lru", rows, CALL), ("LFU instead of LRU", "lfu", rows, CALL)]
options += [("half as many keys a call", "lru", rows, CALL // 2), ("twice as many rows", "lru", 2 * rows, CALL)]
for name, policy, size, call in options:
    print(f"{name:36}{hit_rate(policy, size, batch=call, warmup=WARM).hit_rate:8.1%}")
found = simulate.advise(trace, round(expected, 2), ["lru", "lfu"], batch=CALL, progress=False)
if found.best is not None:
    print(f"hit rate {found.target:.0%} with the least memory: {found.best.policy}, {found.best.rows:,} rows")
if importlib.util.find_spec("matplotlib"):
    result = simulate.run(trace, ["lru", "lfu"], "2%:40%:5", batch=CALL, progress=False)
    simulate.write_page(result, folder / "hit_rate.html", advice=found)
    print("an HTML page with plots is in", folder)
