# %% [markdown]
# # Export a model, change its config, serve it in another process
#
# The SavedModel contains the path of the config and no rows. A program that loads it imports `hps_numba.frontends.tensorflow`,
# and the first call loads the tables that the config names at that time: here, a newer version.
#
# TensorFlow finds our operator by a token that the import registers. Without the import, the first call fails with
# `callback hps_numba.lookup.1 is not found`; `hps.load(path)` is `tf.saved_model.load` including the import.
#
#     pip install "hps-numba[tensorflow]"
#     python tf_saved_model.py

# %%
from __future__ import annotations

import importlib.util
import json
import subprocess
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
hps_numba.generate_model(folder / "monday.model", ROWS, DIM, seed=1)
hps_numba.generate_model(folder / "tuesday.model", ROWS, DIM, seed=2)


def write_config(table: str) -> str:
    model = {
        "model": "demo",
        "sparse_files": [str(folder / table)],
        "embedding_vecsize_per_table": [DIM],
        "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [],
        "max_batch_size": 1024,
    }
    (folder / "ps.json").write_text(json.dumps({"supportlonglong": True, "models": [model]}))
    return str(folder / "ps.json")


# %% [markdown]
# ## Build and export with the table of Monday

# %%
path = write_config("monday.model")
inputs = keras.Input([SLOTS], dtype="int64")
rows = hps.LookupLayer("demo", 0, DIM, tf.float32, ps_config_file=path, global_batch_size=1024)(inputs)
model = keras.Model(inputs, keras.layers.Dense(1, kernel_initializer="ones")(keras.layers.Flatten()(rows)))
batch = np.random.default_rng(0).integers(0, ROWS, (4, SLOTS))
print("Monday, in this process: ", model(batch).numpy().ravel())
model.export(str(folder / "saved"), verbose=False)

# %% [markdown]
# ## Serve in a new process with the table of Tuesday

# %%
write_config("tuesday.model")
program = """
import sys, numpy as np, tensorflow as tf, hps_numba.frontends.tensorflow as hps
served = hps.load(sys.argv[1])
print(*served.serve(tf.constant(np.load(sys.argv[2]))).numpy().ravel())
"""
np.save(folder / "batch.npy", batch)
command = [sys.executable, "-c", program, str(folder / "saved"), str(folder / "batch.npy")]
printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
answer = np.array(printed.split(), np.float32)
print("Tuesday, in a new process:", answer)

tuesday = np.fromfile(folder / "tuesday.model" / "emb_vector", np.float32).reshape(ROWS, DIM)
assert np.allclose(answer, tuesday[batch].sum((1, 2)), rtol=1e-4)
