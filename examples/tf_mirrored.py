# %% [markdown]
# # A trainable head on frozen features, on several replicas
#
# Rows learned by another model are features here: the lookup is frozen, and the dense head on top of it is trained. Under
# `tf.distribute.MirroredStrategy`, each replica looks up its share of the batch; all replicas share one server. They are two
# logical CPU devices here, so that the example runs anywhere; with GPUs, leave out the first lines.
#
#     pip install "hps-numba[tensorflow]"
#     python tf_mirrored.py

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

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

ROWS, DIM, SLOTS, BATCH = 10_000, 8, 4, 256
folder = Path(tempfile.mkdtemp())
hps_numba.generate_model(folder / "features.model", ROWS, DIM)
config = {
    "supportlonglong": True,
    "models": [
        {
            "model": "features",
            "sparse_files": [str(folder / "features.model")],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [SLOTS],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [],
            "max_batch_size": BATCH // 2,
        }
    ],
}

# %% [markdown]
# ## Build the model in the scope of the strategy

# %%
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    hps.Init(global_batch_size=BATCH, ps_config_file=config)
    inputs = keras.Input([SLOTS], dtype="int64")
    features = hps.LookupLayer("features", 0, DIM, tf.float32, ps_config_file=config, global_batch_size=BATCH)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(features)))
    model.compile(keras.optimizers.SGD(0.1), "mse")

# %% [markdown]
# ## Train the head on frozen features

# %%
rows = np.fromfile(folder / "features.model" / "emb_vector", np.float32).reshape(ROWS, DIM)
keys = np.random.default_rng(0).integers(0, ROWS, (4096, SLOTS))
target = rows[keys].sum((1, 2))[:, None]
losses = model.fit(keys, target, batch_size=BATCH, epochs=4, verbose=0).history["loss"]
print(f"{strategy.num_replicas_in_sync} replicas, loss an epoch:", *(f"{loss:.3f}" for loss in losses))
print("trainable weights:", [tuple(weight.shape) for weight in model.trainable_weights])
assert losses[-1] < losses[0] / 2
