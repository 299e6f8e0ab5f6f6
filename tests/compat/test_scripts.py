"""Scripts and notebooks such as people have for HugeCTR HPS, as they are: each is a program under the drop-in."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.drop_in import run_drop_in
from support.framework_rig import rig_of, tensorflow

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def output(folder: Path, text: str, *arguments: str, device: str = "cpu") -> list[str]:
    """What a script printed, line by line."""
    (folder / "script.py").write_text(text)
    env = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": "0"}
    done = run_drop_in("script.py", *arguments, cwd=folder, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


_PYTHON_API = """
import importlib.util
import json, os, sys
import numpy as np
import hugectr
from hugectr.inference import HPS, ParameterServerConfig, InferenceParams

rows = [np.random.default_rng(seed).normal(size=(100, dim)).astype(np.float32) for seed, dim in enumerate((16, 32))]
for number, values in enumerate(rows):
    os.makedirs(f"demo{number}.model", exist_ok=True)
    np.arange(100, dtype=np.int64).tofile(f"demo{number}.model/key")
    values.tofile(f"demo{number}.model/emb_vector")

def parameters(**more):
    return InferenceParams(
        model_name="hps_demo",
        max_batchsize=1024,
        hit_rate_threshold=1.0,
        dense_model_file="",
        sparse_model_files=["demo0.model", "demo1.model"],
        deployed_devices=[0],
        use_gpu_embedding_cache=True,
        cache_size_percentage=0.5,
        i64_input_key=True,
        **more,
    )

def config(model):
    return ParameterServerConfig(
        emb_table_name={"hps_demo": ["sparse_embedding1", "sparse_embedding2"]},
        embedding_vec_size={"hps_demo": [16, 32]},
        max_feature_num_per_sample_per_emb_table={"hps_demo": [3, 2]},
        inference_params_array=[model],
        volatile_db=hugectr.inference.VolatileDatabaseParams(
            hugectr.DatabaseType_t.parallel_hash_map, overflow_policy=hugectr.DatabaseOverflowPolicy_t.evict_oldest),
        persistent_db=hugectr.inference.PersistentDatabaseParams(backend=hugectr.DatabaseType_t.disabled),
        update_source=hugectr.inference.UpdateSourceParams(type=hugectr.UpdateSourceType_t.null),
    )

kinds = [hugectr.inference.EmbeddingCacheType_t.Dynamic, hugectr.inference.Static, "uvm"]
for kind in kinds:
    hps = HPS(config(parameters(embedding_cache_type=kind)))
    keys = np.random.default_rng(5).integers(0, 100, (2, 50))
    for table in range(2):
        embedding = hps.lookup(h_keys=keys[table].flatten(), model_name="hps_demo", table_id=table)
        assert isinstance(embedding, np.ndarray) and (embedding == rows[table][keys[table]]).all()
        assert (hps.lookup(keys[table].tolist(), "hps_demo", table, 0) == embedding).all()

with open("hps.json", "w") as file:
    json.dump({"supportlonglong": True, "models": [{
        "model": "hps_demo", "sparse_files": ["demo0.model", "demo1.model"], "embedding_table_names": ["a", "b"],
        "embedding_vecsize_per_table": [16, 32], "maxnum_catfeature_query_per_table_per_sample": [3, 2],
        "default_value_for_each_table": [0.0, 0.0], "deployed_device_list": [0], "max_batch_size": 1024,
        "cache_refresh_percentage_per_iteration": 0.2, "hit_rate_threshold": 1.0, "gpucacheper": 0.5, "gpucache": True}]}, file)
print((HPS("hps.json").lookup([1, 2], "hps_demo", 1) == rows[1][1:3]).all(), "child" in sys.argv)
if "child" not in sys.argv:
    sys.stdout.flush()
    assert os.system(f"{sys.executable} script.py child") == 0
"""


def test_the_python_api_in_a_process_and_its_child(tmp_path: Path) -> None:
    assert output(tmp_path, _PYTHON_API) == ["True False", "True True"]


_DLPACK = """
import sys
import numpy as np
import torch
from torch.utils.dlpack import to_dlpack
from hugectr.inference import HPS

hps = HPS(hps_json_config_file=sys.argv[1])
keys = torch.tensor([3, 1, 3], dtype=torch.int64)
device = "cuda" if torch.cuda.is_available() else "cpu"
for where in {"cpu", device}:
    for to in {"cpu", device}:
        out = torch.empty(3 * 8, dtype=torch.float32, device=to)
        hps.lookup_fromdlpack(to_dlpack(keys.to(where)), to_dlpack(out), model_name="m", table_id=0, device_id=0)
        hps.lookup_fromdlpack(keys=to_dlpack(keys.to(where)), out_tensor=to_dlpack(out), model_name="m", table_id=0)
        assert (out.cpu().numpy().reshape(3, 8) == hps.lookup([3, 1, 3], "m", 0)).all()
print("same")
"""


@pytest.mark.parametrize("device", DEVICES)
def test_dlpack_of_torch(tmp_path: Path, device: str) -> None:
    pytest.importorskip("torch")
    assert output(
        tmp_path, _DLPACK, rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0]).path, device=device
    ) == ["same"]


_DLPACK_TF = """
import sys
import tensorflow as tf
from tensorflow.experimental import dlpack
from hugectr.inference import HPS

hps = HPS(sys.argv[1])
keys, out = tf.constant([3, 1], tf.int64), tf.zeros([2, 8])
hps.lookup_fromdlpack(dlpack.to_dlpack(keys), dlpack.to_dlpack(out), "m", 0)
print((out.numpy() == hps.lookup(keys.numpy(), "m", 0)).all())
"""


def test_dlpack_of_tensorflow(tmp_path: Path) -> None:
    tensorflow()
    assert output(tmp_path, _DLPACK_TF, rig_of(tmp_path).path) == ["True"]


_FUNCTIONS = """
import sys
import numpy as np
import tensorflow as tf
import hierarchical_parameter_server as hps

hps.Init(global_batch_size=64, ps_config_file=sys.argv[1])
dense = hps.LookupLayer(model_name="m", table_id=0, emb_vec_size=8, emb_vec_dtype=tf.float32, name="dense_lookup")
sparse = hps.SparseLookupLayer(model_name="m", table_id=1, emb_vec_size=3, emb_vec_dtype=tf.float32, name="sparse_lookup")

class Inference(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.int64), tf.SparseTensorSpec([None, 4], tf.int64)])
    def serve(self, keys, sp_ids):
        return tf.concat([tf.reshape(dense(keys), [-1, 16]), sparse(sp_ids, sp_weights=None, combiner="sum")], 1)

keys = np.array([[1, 2], [3, 4]], np.int64)
sp_ids = tf.SparseTensor([[0, 0], [0, 1], [1, 0]], tf.constant([7, 8, 9], tf.int64), [2, 4])
module = Inference()
rows = module.serve(keys, sp_ids)
tf.saved_model.save(module, "saved")
assert (tf.saved_model.load("saved").serve(keys, sp_ids).numpy() == rows.numpy()).all()
print(*rows.shape, dense.name)
"""


def test_layers_of_tensorflow_in_functions_and_saved_models(tmp_path: Path) -> None:
    tensorflow()
    assert output(tmp_path, _FUNCTIONS, rig_of(tmp_path).path) == ["2 19 dense_lookup"]


_TORCH_NOTEBOOK = """
import os, subprocess, sys
import numpy as np
import torch
import hps_torch
from typing import List

class Model(torch.nn.Module):
    def __init__(self, ps_config_file: str, model_name: str, sizes: List[int]):
        super().__init__()
        self.layers = torch.nn.ModuleList([
            hps_torch.LookupLayer(ps_config_file=ps_config_file, model_name=model_name, table_id=i, emb_vec_size=size)
            for i, size in enumerate(sizes)])

    def forward(self, keys_list: torch.Tensor):
        futures = torch.jit.annotate(List[torch.jit.Future[torch.Tensor]], [])
        for i, layer in enumerate(self.layers):
            futures.append(torch.jit.fork(layer, keys_list[i]))
        vectors = torch.jit.annotate(List[torch.Tensor], [])
        for future in futures:
            vectors.append(torch.jit.wait(future))
        return torch.cat(vectors, dim=2)

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = torch.jit.script(Model(sys.argv[1], "m", [8, 3])).to(device)
keys = torch.randint(0, 200, (2, 16, 4), dtype=torch.int64).to(device)
rows = model(keys)
assert torch.equal(rows, Model(sys.argv[1], "m", [8, 3])(keys)) and rows.shape == (16, 4, 11)
torch.jit.save(model, "model.pt")
torch.save(keys, "keys.pt")
torch.save(rows, "rows.pt")
child = "import hps_torch, torch; model = torch.jit.load('model.pt');" \\
    "print(torch.equal(model(torch.load('keys.pt')), torch.load('rows.pt')))"
sys.stdout.flush()
subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_the_layer_of_torch_scripted_forked_and_saved(tmp_path: Path, device: str) -> None:
    pytest.importorskip("torch")
    assert output(
        tmp_path, _TORCH_NOTEBOOK, rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0]).path, device=device
    ) == ["True"]


_SCRIPTED_WITH_THE_OPERATOR = """
import sys
import torch
import hps_torch

class LookupLayer(torch.nn.Module):
    ps_config_file: str
    model_name: str
    table_id: int
    emb_vec_size: int

    def __init__(self, ps_config_file: str, model_name: str, table_id: int, emb_vec_size: int):
        super().__init__()
        self.ps_config_file, self.model_name = ps_config_file, model_name
        self.table_id, self.emb_vec_size = table_id, emb_vec_size

    def forward(self, keys):
        return torch.ops.hps_torch.hps_embedding_lookup(
            keys, self.ps_config_file, self.model_name, self.table_id, self.emb_vec_size)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = LookupLayer(sys.argv[1], "m", 0, 8), LookupLayer(sys.argv[1], "m", 1, 3)

    def forward(self, keys):
        first, second = torch.jit.fork(self.first, keys), torch.jit.fork(self.second, keys)
        return torch.cat([torch.jit.wait(first), torch.jit.wait(second)], dim=-1)

torch.jit.save(torch.jit.script(Model()), "scripted.pt")
print("ops.hps_torch.hps_embedding_lookup(keys, " in torch.jit.load("scripted.pt").first.code)
"""
_LOADS_IT = """
import sys
import torch
import hps_torch
from hps_torch import LookupLayer

model = torch.jit.load("scripted.pt")
keys = torch.arange(12).reshape(4, 3).to("cuda" if torch.cuda.is_available() else "cpu")
rows = [LookupLayer(sys.argv[1], "m", table, size)(keys) for table, size in ((0, 8), (1, 3))]
print(torch.equal(model(keys), torch.cat(rows, -1)), torch.equal(torch.jit.freeze(model.eval())(keys), torch.cat(rows, -1)))
"""


@pytest.mark.parametrize("device", DEVICES)
def test_models_scripted_with_the_operator_of_hugectr_load_and_run(tmp_path: Path, device: str) -> None:
    """The archive holds calls of the operator and none of our layers, as those that HugeCTR's users have."""
    pytest.importorskip("torch")
    rig = rig_of(tmp_path, deployed_device_list=[] if device == "cpu" else [0])
    assert output(tmp_path, _SCRIPTED_WITH_THE_OPERATOR, rig.path, device=device) == ["True"]
    assert output(tmp_path, _LOADS_IT, rig.path, device=device) == ["True True"]


"""To append to tests/compat/test_scripts.py once the Keras 2 layers are merged (needs `import importlib.util` there)."""

_KERAS_2 = """
import json, os, subprocess, sys
import numpy as np
import tensorflow as tf
import hierarchical_parameter_server as hps

assert tf.keras.layers.Layer.__module__.startswith("tf_keras")
args = {"batch": 64, "slots": 3, "dim": 8, "rows": 300}

class TrainModel(tf.keras.models.Model):
    def __init__(self, init_tensors, **kwargs):
        super().__init__(**kwargs)
        self.params = tf.Variable(init_tensors)
        self.fc = tf.keras.layers.Dense(units=1, name="fc")

    def call(self, inputs):
        rows = tf.reshape(tf.nn.embedding_lookup(params=self.params, ids=inputs), shape=[-1, args["slots"] * args["dim"]])
        return self.fc(rows), rows

    def summary(self):
        inputs = tf.keras.Input(shape=(args["slots"],), dtype=tf.int64)
        return tf.keras.models.Model(inputs=[inputs], outputs=self.call(inputs)).summary(print_fn=lambda line, **_: None)

generator = np.random.default_rng(0)
keys = generator.integers(0, args["rows"], (args["batch"], args["slots"])).astype(np.int64)
labels = generator.integers(0, 2, (args["batch"], 1)).astype(np.float32)
model = TrainModel(generator.normal(size=(args["rows"], args["dim"])).astype(np.float32))
model.summary()
loss, optimizer = tf.keras.losses.BinaryCrossentropy(from_logits=True), tf.keras.optimizers.Adam()

@tf.function
def train_step(inputs, labels):
    with tf.GradientTape() as tape:
        logit, rows = model(inputs)
        value = loss(labels, logit)
    optimizer.apply_gradients(zip(tape.gradient(value, model.trainable_variables), model.trainable_variables))
    return value

for _ in range(3):
    train_step(keys, labels)

os.makedirs("table.model", exist_ok=True)
np.arange(args["rows"], dtype=np.int64).tofile("table.model/key")
model.params.numpy().tofile("table.model/emb_vector")
with open("ps.json", "w") as file:
    json.dump({"supportlonglong": True, "models": [{
        "model": "demo", "sparse_files": ["table.model"], "num_of_worker_buffer_in_pool": 3,
        "embedding_table_names": ["sparse_embedding0"], "embedding_vecsize_per_table": [args["dim"]],
        "maxnum_catfeature_query_per_table_per_sample": [args["slots"]], "default_value_for_each_table": [1.0],
        "deployed_device_list": [0], "max_batch_size": 64, "cache_refresh_percentage_per_iteration": 0.2,
        "hit_rate_threshold": 1.0, "gpucacheper": 1.0, "gpucache": True}]}, file)

class InferenceModel(tf.keras.models.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lookup_layer = hps.LookupLayer(
            model_name="demo", table_id=0, emb_vec_size=args["dim"], emb_vec_dtype=tf.float32, ps_config_file="ps.json",
            global_batch_size=64, name="lookup")
        self.fc = tf.keras.layers.Dense(units=1, name="fc")

    def call(self, inputs):
        rows = tf.reshape(self.lookup_layer(inputs), shape=[-1, args["slots"] * args["dim"]])
        return self.fc(rows), rows

    def summary(self):
        inputs = tf.keras.Input(shape=(args["slots"],), dtype=tf.int64)
        return tf.keras.models.Model(inputs=[inputs], outputs=self.call(inputs)).summary(print_fn=lambda line, **_: None)

hps.Init(global_batch_size=64, ps_config_file="ps.json")
inference = InferenceModel()
inference.summary()
inference.fc.set_weights(model.fc.get_weights())
expected, rows = model(keys)
logit, same = inference(tf.convert_to_tensor(keys))
assert (rows.numpy() == same.numpy()).all() and np.allclose(logit, expected)
inference.predict(keys, verbose=0)
inference.save("saved")
np.save("keys.npy", keys)
np.save("logit.npy", logit.numpy())
child = "import numpy as np, tensorflow as tf, hierarchical_parameter_server as hps;" \\
    "model = tf.keras.models.load_model('saved');" \\
    "print(np.allclose(model.predict(np.load('keys.npy'), verbose=0)[0], np.load('logit.npy')))"
sys.stdout.flush()
subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("tf_keras") is None, reason="needs Keras 2: pip install tf-keras")
def test_a_notebook_of_keras_2_trains_saves_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorflow()
    monkeypatch.setenv("TF_USE_LEGACY_KERAS", "1")
    assert output(tmp_path, _KERAS_2)[-1] == "True"
