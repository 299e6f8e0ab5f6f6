# %% [markdown]
# # Move the embedding table out of a Keras model
#
# A model is trained with `keras.layers.Embedding`. Then its table is written as a sparse model, `hps_numba` serves it, and the
# same dense layers run on `LookupLayer`: the predictions are equal, bit by bit. Now the table can be larger than GPU memory,
# shared by several models, and replaced while they serve.
#
#     pip install "hps-numba[tensorflow]"
#     python tf_dense_model.py

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

import keras
import tensorflow as tf

import hps_numba.frontends.tensorflow as hps

ROWS, DIM, SLOTS, BATCH = 20_000, 16, 3, 256
folder = Path(tempfile.mkdtemp())
random = np.random.default_rng(0)

# %% [markdown]
# ## Train with the table in the model

# %%
embedding = keras.layers.Embedding(ROWS, DIM)
head = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(32, "relu"), keras.layers.Dense(1)])
inputs = keras.Input([SLOTS], dtype="int64")
trained = keras.Model(inputs, head(embedding(inputs)))
trained.compile("adam", "mse")
keys = random.integers(0, ROWS, (4096, SLOTS))
trained.fit(keys, (keys % 7).sum(1, keepdims=True) / 7.0, batch_size=BATCH, epochs=2, verbose=0)

# %% [markdown]
# ## Write the table as two files, keys and rows

# %%
table = folder / "table.model"
table.mkdir()
np.arange(ROWS, dtype=np.int64).tofile(table / "key")
embedding.embeddings.numpy().tofile(table / "emb_vector")
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "demo",
            "sparse_files": [str(table)],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [],
            "max_batch_size": BATCH,
        }
    ],
}

# %% [markdown]
# ## Serve with the table outside the model

# %%
hps.Init(global_batch_size=BATCH, ps_config_file=config)
lookup = hps.LookupLayer(model_name="demo", table_id=0, emb_vec_size=DIM, emb_vec_dtype=tf.float32, ps_config_file=config)
served = keras.Model(inputs, head(lookup(inputs)))

batch = random.integers(0, ROWS, (BATCH, SLOTS))
before, after = trained.predict_on_batch(batch), served.predict_on_batch(batch)
print(f"{BATCH} predictions, equal: {np.array_equal(before, after)}")
print(f"weights in the trained model: {trained.count_params():,}, in the served one: {served.count_params():,}")
assert np.array_equal(before, after)
