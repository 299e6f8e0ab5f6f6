# %% [markdown]
# # Several tables, several ids a sample: pooled lookups
#
# Each sample has a list of items with ratings, and a list of tags. `SparseLookupLayer` returns one row for each sample and
# table: the weighted mean, the sum, or the sum divided by the root of the squared weights, as `tf.nn.embedding_lookup_sparse`
# does; it is computed in the pass that reads the rows. `LookupCollection` looks up all tables in one call.
#
#     pip install "hps-numba[tensorflow]"
#     python tf_sparse_tables.py

# %%
from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

import numpy as np

NEEDS = ("tensorflow",)
if importlib.util.find_spec("tensorflow") is None:
    sys.exit('tensorflow missing: pip install "hps-numba[tensorflow]"')

import tensorflow as tf

import hps_numba
import hps_numba.frontends.tensorflow as hps

SAMPLES = 6
folder = Path(tempfile.mkdtemp())
hps_numba.generate_model(folder / "items.model", 50_000, 16, seed=1)
hps_numba.generate_model(folder / "tags.model", 2_000, 8, seed=2)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "demo",
            "sparse_files": [str(folder / "items.model"), str(folder / "tags.model")],
            "embedding_table_names": ["items", "tags"],
            "embedding_vecsize_per_table": [16, 8],
            "maxnum_catfeature_query_per_table_per_sample": [10, 4],
            "default_value_for_each_table": [0.0, 0.0],
            "deployed_device_list": [],
            "max_batch_size": 1024,
        }
    ],
}

# %% [markdown]
# ## Ragged lists as sparse tensors

# %%
items = tf.ragged.constant([[11, 12], [7], [], [49_999, 3, 3], [5], []], dtype=tf.int64).to_sparse()
ratings = tf.SparseTensor(items.indices, tf.constant([5.0, 1.0, 3.0, 2.0, 4.0, 4.0, 1.0]), items.dense_shape)
tags = tf.ragged.constant([[1], [2, 3], [4], [], [5, 6, 7], [1999]], dtype=tf.int64).to_sparse()

# %% [markdown]
# ## One pooled row for each sample, and the gradient with respect to the ratings

# %%
lookup = hps.SparseLookupLayer("demo", "items", 16, tf.float32, ps_config_file=config, global_batch_size=SAMPLES)
with tf.GradientTape() as tape:
    tape.watch(ratings.values)
    weights = tf.SparseTensor(ratings.indices, ratings.values, ratings.dense_shape)
    pooled = lookup(items, weights, combiner="mean")
print("weighted mean:", pooled.shape, "samples without items are 0:", not pooled.numpy()[[2, 5]].any())
print("gradient with respect to the ratings:", np.round(tape.gradient(pooled, ratings.values).numpy(), 3))

# %% [markdown]
# ## Compare with the operator of TensorFlow

# %%
rows = np.fromfile(folder / "items.model" / "emb_vector", np.float32).reshape(-1, 16)
for combiner in ("sum", "mean", "sqrtn"):
    ours = lookup(items, ratings, combiner=combiner)[:5]  # that of TensorFlow ends with the last sample that has an id
    theirs = tf.nn.embedding_lookup_sparse(tf.constant(rows), items, ratings, combiner=combiner)
    print(f"{combiner}: largest difference {np.abs(ours - theirs).max():.1e}")
    assert np.allclose(ours, theirs, rtol=1e-5, atol=1e-6)

# %% [markdown]
# ## All tables in one call

# %%
collection = hps.LookupCollection("demo", {"items": ("items", 16), "tags": ("tags", 8)}, ps_config_file=config)
both = collection({"items": items, "tags": tags})
print({name: tuple(answer.shape) for name, answer in both.items()})
assert np.array_equal(both["items"], lookup(items))
