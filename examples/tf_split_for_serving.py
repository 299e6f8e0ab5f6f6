# %% [markdown]
# # Split a model for a server that cannot run Python
#
# TensorFlow Serving does not run Python, which our lookup needs. So the model is split after its lookup layers: the dense half
# is a plain SavedModel with rows as inputs, which any TF-Serving accepts; the lookup half runs in front of it, in a Python
# process.
#
#     pip install "hps-numba[tensorflow]"
#     python tf_split_for_serving.py

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

import hps_numba
import hps_numba.frontends.tensorflow as hps

ROWS, DIM, SLOTS = 10_000, 8, 3
folder = Path(tempfile.mkdtemp())
hps_numba.generate_model(folder / "table.model", ROWS, DIM)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "demo",
            "sparse_files": [str(folder / "table.model")],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [],
            "max_batch_size": 1024,
        }
    ],
}

# %% [markdown]
# ## The whole model: ids and a dense feature

# %%
ids, dense = keras.Input([SLOTS], dtype="int64", name="ids"), keras.Input([4], name="numbers")
rows = hps.LookupLayer("demo", 0, DIM, tf.float32, ps_config_file=config, global_batch_size=1024)(ids)
hidden = keras.layers.Concatenate()([keras.layers.Flatten()(rows), dense])
model = keras.Model([ids, dense], keras.layers.Dense(1)(keras.layers.Dense(16, "relu")(hidden)))

# %% [markdown]
# ## Split, and export the dense half

# %%
lookup, rest = hps.split(model)
rest.export(str(folder / "dense" / "1"), verbose=False)  # TF-Serving expects a folder for each version number

# %% [markdown]
# ## In front of the server: look up the rows and send them on
#
# In this example, `tf.saved_model.load` in the same process stands for the server.

# %%
remote = tf.saved_model.load(str(folder / "dense" / "1"))
random = np.random.default_rng(0)
batch = [random.integers(0, ROWS, (5, SLOTS)), random.normal(size=(5, 4)).astype(np.float32)]
answer = remote.serve(lookup(batch))
print("whole model:", model(batch).numpy().ravel())
print("two halves: ", answer.numpy().ravel())
assert np.allclose(answer, model(batch), rtol=1e-6)
