# %% [markdown]
# # Why is my hit rate lower than I thought?
#
# A paper, or a simulation of one's own, says that LRU with a tenth of the rows has so many hits; `server.stats()` shows fewer.
# Here the difference is taken apart on a trace: what is counted, the cold start, the batches, and the sets of the cache. Each
# is measured alone, by the cache's own code.
#
#     pip install hps-numba            # and "hps-numba[plot]" for the picture
#     python hit_rate_lower_than_thought.py
#
# `TRACE=my_keys.npy` in the environment takes a trace of your own instead of the generated one.

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
# ## What was expected, and what the server shows
#
# Expected: LRU over all rows, one request after the other, warm. Shown: the cache as it runs on a GPU, sets of ten rows and
# calls of many keys, from an empty cache on.

# %%
WARM = 0.2
expected = hit_rate(geometry="associative", warmup=WARM).hit_rate
shown = hit_rate(batch=CALL)
print(f"expected {expected:.1%}, shown {shown.hit_rate:.1%}")

# %% [markdown]
# ## What is possible at all
#
# The first request for a key misses in every cache: no policy is above the infinite cache, and none of this size above Belady's
# optimum, which knows the future.

# %%
bounds = {run.policy: run for run in simulate.run(trace, "belady", rows, progress=False).runs}
print(f"infinite cache {bounds['infinite'].hit_rate:.1%}, optimum of {rows:,} rows {bounds['belady'].hit_rate:.1%}")
assert shown.hit_rate <= bounds["belady"].hit_rate <= bounds["infinite"].hit_rate

# %% [markdown]
# ## Warm-up
#
# An empty cache misses until it is full. In a short trace that is a large part of all misses; in a server that runs for days it
# is none. Servers also fill their caches when they start (`init_ec`). So compare with the first part of the trace left out.

# %%
warm = hit_rate(batch=CALL, warmup=WARM)
windows = shown.by_window / (len(keys) / len(shown.by_window))
print("hit rate of each twentieth of the trace:", " ".join(f"{part.mean():.0%}" for part in np.array_split(windows, 20)))
print(f"warm {warm.hit_rate:.1%}, {100 * (warm.hit_rate - shown.hit_rate):+.1f} pp")

# %% [markdown]
# ## Batches
#
# All keys of a call are looked up before any row comes in. So a key that the cache lacks and the call has five times misses
# five times, where one request after the other would miss once. And a call that brings in more rows than a set has ways
# pushes out rows that it should have kept. Both grow with the call beside the cache.

# %%
calls = [64, 256, 1024, 4096]
by_call = {call: hit_rate(batch=call, warmup=WARM) for call in calls}
for call, run in by_call.items():
    print(f"calls of {call:5,}: {run.hit_rate:6.1%} of requests, {run.key_hit_rate:6.1%} of the distinct keys of a call")
small = by_call[64].hit_rate

# %% [markdown]
# The right column is another trap: a cache that removes duplicates before it counts, as the original does, reports hits of
# distinct keys. The same traffic, the same cache, another number.

# %%
assert all(run.key_hit_rate < run.hit_rate for run in by_call.values())
if not os.environ.get("TRACE"):
    assert small > by_call[4096].hit_rate + 0.02

# %% [markdown]
# ## Sets
#
# A key belongs to one set of ten rows, chosen by a hash. Where more than ten popular keys fall into one set they push each
# other out, while another set has room. This is what remains with small calls.

# %%
in_sets = np.bincount(np.random.default_rng(1).integers(0, rows // 10, rows), minlength=rows // 10)
print(f"{rows:,} keys by chance into {rows // 10:,} sets: {np.mean(in_sets > 10):.0%} of the sets get more than ten")
print(f"sets {small:.1%}, one order of all rows {expected:.1%}: {100 * (small - expected):+.1f} pp")
if not os.environ.get("TRACE"):
    assert -0.02 < small - expected < 0.005

# %% [markdown]
# ## All together

# %%
steps = [("expected: LRU, one order, warm", expected), ("sets of ten rows", small - expected)]
steps += [
    (f"calls of {CALL:,} instead of 64", warm.hit_rate - small),
    ("from an empty cache on", shown.hit_rate - warm.hit_rate),
]
for name, value in steps:
    print(f"{name:36}" + (f"{value:8.1%}" if name.startswith("expected") else f"{100 * value:+7.1f} pp"))
print(f"{'shown':36}{shown.hit_rate:8.1%}")
assert abs(sum(value for _, value in steps) - shown.hit_rate) < 1e-12

# %% [markdown]
# ## What helps
#
# Another policy, a larger cache, smaller calls. `hps-numba simulate --advise` looks for the least memory that reaches a hit
# rate.

# %%
options = [("as it is", "lru", rows, CALL), ("LFU instead of LRU", "lfu", rows, CALL)]
options += [("half as many keys a call", "lru", rows, CALL // 2), ("twice as many rows", "lru", 2 * rows, CALL)]
for name, policy, size, call in options:
    print(f"{name:36}{hit_rate(policy, size, batch=call, warmup=WARM).hit_rate:8.1%}")
found = simulate.advise(trace, round(expected, 2), ["lru", "lfu"], batch=CALL, progress=False)
if found.best is not None:
    print(f"{found.target:.0%} hits at the least memory: {found.best.policy}, {found.best.rows:,} rows")
if importlib.util.find_spec("matplotlib"):
    result = simulate.run(trace, ["lru", "lfu"], "2%:40%:5", batch=CALL, progress=False)
    simulate.write_page(result, folder / "hit_rate.html", advice=found)
    print("a page with pictures is in", folder)
