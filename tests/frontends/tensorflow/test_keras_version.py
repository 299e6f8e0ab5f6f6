"""Keras 2 (``TF_USE_LEGACY_KERAS=1``) and Keras 3: which one layers belong to, and what models for Keras 2 do with them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, Rig, finish, rig_of, run_program, start_program, tensorflow
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

from hps_numba import KeyDtypeError
from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()

pytestmark = pytest.mark.timeout(4 * HANG_SECONDS)  # many processes that import TensorFlow

KERAS_2 = {"TF_USE_LEGACY_KERAS": "1"}
needs_keras_2 = pytest.mark.skipif(importlib.util.find_spec("tf_keras") is None, reason="needs tf-keras")
under_keras_3 = pytest.mark.skipif(not hasattr(keras, "KerasTensor"), reason="a test of Keras 3")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = rig_of(tmp_path)
    np.savez(tmp_path / "rows.npz", rows=made.rows, narrow=made.narrow)
    yield made
    SERVERS.close()


def in_keras_2(program: str, *arguments: str, **more: str) -> str:
    return run_program(_PROLOGUE + program, *arguments, **KERAS_2, **more)


_PROLOGUE = """
import os, sys, json, numpy as np, tensorflow as tf
import hps_numba.frontends.tensorflow as hps
import tf_keras
assert tf.keras.layers.Layer is tf_keras.layers.Layer
folder = sys.argv[1]
path = os.path.join(folder, "ps.json")
rows, narrow = (np.load(os.path.join(folder, "rows.npz"))[name] for name in ("rows", "narrow"))
DIM = rows.shape[1]
def at(name): return os.path.join(folder, name)
"""

# -- which Keras -------------------------------------------------------------------------------------

_CHOICES = {
    "set before TensorFlow": ("import hps_numba.frontends.tensorflow as hps", "1", "tf_keras"),
    "set to True": ("import hps_numba.frontends.tensorflow as hps", "True", "tf_keras"),
    "keras imported first": ("import keras; import hps_numba.frontends.tensorflow as hps", "1", "tf_keras"),
    "set between TensorFlow and this package": (
        "import os, tensorflow; os.environ['TF_USE_LEGACY_KERAS'] = '1'; import hps_numba.frontends.tensorflow as hps",
        "",
        "tf_keras",
    ),
    "set after this package": (
        "import os, hps_numba.frontends.tensorflow as hps; os.environ['TF_USE_LEGACY_KERAS'] = '1'",
        "",
        "keras",
    ),
}


@needs_keras_2
def test_layers_are_layers_of_tf_keras_however_it_was_chosen() -> None:
    check = """
import tensorflow as tf
for kind in (hps.LookupLayer, hps.SparseLookupLayer, hps.LookupCollection):
    assert issubclass(kind, tf.keras.layers.Layer)
print(tf.keras.layers.Layer.__module__.split(".")[0])
"""
    started = {
        name: start_program(f"{first}\n{check}", TF_USE_LEGACY_KERAS=value) for name, (first, value, _) in _CHOICES.items()
    }
    chosen = {name: finish(process).strip() for name, process in started.items()}
    assert chosen == {name: wanted for name, (_, _, wanted) in _CHOICES.items()}


@pytest.mark.parametrize("before", ["", "import tensorflow as tf\ntry: tf.keras.layers\nexcept ImportError: pass\n"])
def test_keras_2_that_is_not_installed_is_named(before: str) -> None:
    program = f"""
import sys
sys.modules["tf_keras"] = None  # as if it were not installed
{before}
try:
    import hps_numba.frontends.tensorflow
except ImportError as problem:
    print(problem)
"""
    assert run_program(program, **KERAS_2).splitlines()[-1] == (
        "TF_USE_LEGACY_KERAS=1: expected the package tf-keras (Keras 2), which is not installed: "
        "`pip install tf-keras`, or unset the variable to use Keras 3"
    )


# -- Keras 3: what to set ------------------------------------------------------------------------------

NEEDS = "(?s)A KerasTensor .*`pip install tf-keras`, and set TF_USE_LEGACY_KERAS=1 in the environment before TensorFlow is"


def symbolic_rows(rig: Rig, kind: str) -> Any:
    ids = keras.Input([3], dtype="int64", sparse=kind == "sparse")
    if kind == "collection":
        return hps.LookupCollection("m", {"a": (0, DIM)}, ps_config_file=rig.path)({"a": ids})["a"]
    layer = {"dense": hps.LookupLayer, "sparse": hps.SparseLookupLayer}[kind]
    return layer("m", 0, DIM, ps_config_file=rig.path)(ids)


@under_keras_3
@pytest.mark.parametrize("kind", ["dense", "sparse", "collection"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda rows: tf.reshape(rows, [-1, DIM]),
        lambda rows: tf.concat([rows, rows], 1),
        lambda rows: tf.concat([tf.zeros([1, DIM]), rows], 0),
        lambda rows: tf.reduce_sum(rows, 1),
        lambda rows: tf.math.add(1.0, rows),
    ],
)
def test_operations_of_tensorflow_on_symbolic_rows_say_what_to_set(rig: Rig, kind: str, operation: Any) -> None:
    with pytest.raises(ValueError, match=NEEDS):
        operation(symbolic_rows(rig, kind))


@under_keras_3
def test_symbolic_rows_are_usual_ones_to_keras_3(rig: Rig) -> None:
    rows = symbolic_rows(rig, "dense")
    assert isinstance(rows, keras.KerasTensor) and rows.shape == (None, 3, DIM)
    model = keras.Model(rows._keras_history[0].input, keras.ops.sum(2 * rows + 1, axis=1))
    twin = keras.models.clone_model(model)
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(model(ids), twin(ids)) and np.allclose(model(ids)[0], (2 * rig.rows[1:4] + 1).sum(0), rtol=1e-5)


@under_keras_3
def test_inputs_that_keras_3_makes_float_say_how_they_are_declared(rig: Rig) -> None:
    def layer() -> Any:
        return hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)

    ids = np.array([[1, 2, 3]])
    for call in (lambda: keras.Sequential([layer()])(ids), lambda: layer()(keras.Input([3]))):
        with pytest.raises(
            KeyDtypeError, match=r'(?s)got float32.*keras.Input\(shape, dtype="int64"\), also to begin a Sequential'
        ):
            call()
    assert keras.Sequential([keras.Input([3], dtype="int64"), layer()])(ids).shape == (1, 3, DIM)


def test_functions_and_symbolic_ids_say_that_layers_take_them(rig: Rig) -> None:
    table, ids = hps.Table("m", 0, DIM, rig.path), keras.Input([3], dtype="int64")
    for lookup in (hps.embedding_lookup, hps.embedding_lookup_sparse):
        with pytest.raises((TypeError, ValueError), match="A KerasTensor is symbolic: in a functional model, call a layer"):
            lookup(table, ids)


@needs_keras_2
def test_tensors_of_the_other_keras_say_so(rig: Rig) -> None:
    program = """
import sys, importlib, tensorflow as tf, hps_numba.frontends.tensorflow as hps
own, other = (importlib.import_module(name) for name in sys.argv[2:])
assert tf.keras.layers.Layer is own.layers.Layer and issubclass(hps.LookupLayer, own.layers.Layer)
for layer in (hps.LookupLayer, hps.SparseLookupLayer):
    for sparse in (False, True):
        try:
            layer("m", 0, 8, ps_config_file=sys.argv[1])(other.Input([3], dtype="int64", sparse=sparse))
        except (TypeError, ValueError) as problem:
            print(problem)
"""
    of_keras_3 = start_program(program, rig.path, "keras", "tf_keras", TF_USE_LEGACY_KERAS="0")
    of_keras_2 = start_program(program, rig.path, "tf_keras", "keras", **KERAS_2)
    said = "This tensor is of Keras 2 (tf-keras), the layers are of Keras 3: set TF_USE_LEGACY_KERAS=1"
    assert finish(of_keras_3).count(said) == 4
    assert finish(of_keras_2).count("build the model with tf.keras instead of the package keras, or unset the variable") == 4


# -- Keras 2 ---------------------------------------------------------------------------------------

_BUILD = """
keras = tf.keras
def dense(**more): return hps.LookupLayer("m", 0, DIM, tf.float32, path, 64, **more)
def sparse(**more): return hps.SparseLookupLayer("m", 0, DIM, tf.float32, path, 64, **more)

class Net(keras.models.Model):
    # a model of its own class, whose call takes a list of a sparse and a dense tensor of ids
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.sparse_lookup_layer, self.lookup_layer = sparse(), dense()
        self.fc = keras.layers.Dense(1, name="fc")
    def call(self, inputs):
        pooled = tf.reshape(self.sparse_lookup_layer(sp_ids=inputs[0], sp_weights=None, combiner="mean"), [-1, DIM])
        flat = tf.reshape(self.lookup_layer(inputs[1]), shape=[-1, 3 * DIM])
        return self.fc(tf.concat([pooled, flat], axis=1)), pooled, flat
    def summary(self, **more):
        inputs = sparse_and_dense_inputs()
        return keras.models.Model(inputs=inputs, outputs=self.call(inputs)).summary(**more)

def sparse_and_dense_inputs():
    return [keras.Input(shape=(4,), sparse=True, dtype=tf.int64), keras.Input(shape=(3,), dtype=tf.int64)]

ids = np.random.default_rng(0).integers(0, len(rows), (8, 3))
sp_ids = tf.SparseTensor([[i, 0] for i in range(8)], ids[:, 0], [8, 4])
ragged = tf.ragged.constant([[1, 2], [], [3]], dtype=tf.int64)
labels = rows[ids].sum((1, 2))[:, None]
"""

_SAVE = (
    _BUILD
    + """
i = keras.Input([3], dtype="int64", name="ids")
looked = dense(name="rows")(i)
functional = keras.Model(i, keras.layers.Dense(1)(tf.reshape(looked, [-1, 3 * DIM])))
functional.compile(keras.optimizers.SGD(0.01), "mse")
history = functional.fit(ids, labels, epochs=20, verbose=0).history["loss"]
assert history[-1] < 0.5 * history[0] and len(functional.trainable_variables) == 2
assert functional.get_layer("rows").get_weights() == []

s = keras.Input([4], dtype="int64", sparse=True)
w = keras.Input([4], sparse=True)
weighted = keras.Model([s, w], sparse()(s, w, combiner="sum"))
weights = tf.SparseTensor(sp_ids.indices, np.full(8, 2, np.float32), [8, 4])
assert np.allclose(weighted([sp_ids, weights]), 2 * rows[ids[:, 0]])

r = keras.Input([None], dtype="int64", ragged=True)
both = keras.Model(r, [dense()(r), sparse()(r, combiner="sum")])
one, pooled = both(ragged)
assert np.array_equal(one.flat_values, rows[1:4]) and np.allclose(pooled, [rows[1] + rows[2], 0 * rows[0], rows[3]])

sequential = keras.Sequential([keras.Input([3], dtype="int64"), dense(), keras.layers.Flatten(), keras.layers.Dense(1)])
sequential.compile("adam", "mse")
sequential.fit(ids, labels, verbose=0)

a, b = keras.Input([3], dtype="int64", name="a"), keras.Input([2], dtype="int32", name="b")
tables = hps.LookupCollection("m", {"a": (0, DIM), "b": ("t1", 3)}, ps_config_file=path)
collection = keras.Model({"a": a, "b": b}, tables({"a": a, "b": b}))
several = {"a": tf.constant(ids), "b": tf.constant(ids[:, :2], tf.int32)}
answers = collection(several)
assert np.array_equal(answers["a"], rows[ids]) and np.array_equal(answers["b"], narrow[ids[:, :2]])

net = Net()
net.summary(print_fn=lambda text: None)
wanted = [one.numpy() for one in net([sp_ids, tf.constant(ids)])]
net(sparse_and_dense_inputs())
loss = keras.losses.MeanSquaredError()
with tf.GradientTape() as tape:
    value = loss(labels, net([sp_ids, tf.constant(ids)])[0])
assert len(tape.gradient(value, net.trainable_variables)) == 2

training = dense(train_rows=True, initializer="normal")
trained = keras.Sequential([keras.Input([3], dtype="int64"), training, keras.layers.Flatten(), keras.layers.Dense(1)])
trained.compile("adam", "mse")
optimizer = hps.Adagrad(trained, lr=0.01)
trained.fit(ids, labels, epochs=2, verbose=0, callbacks=[optimizer.callback()])
assert optimizer.trainers[0].steps == 2
np.save(at("after.npy"), hps.server_of(path).lookup(np.arange(len(rows)), "m", 0))
after = np.load(at("after.npy"))
assert not np.array_equal(after[ids], rows[ids])
hps.server_of(path).insert(np.arange(len(rows)), rows, "m", 0)  # a new process loads these

kinds = {"functional": functional, "sequential": sequential, "trained": trained, "collection": collection, "both": both}
for name, model in kinds.items():
    for suffix in ("", ".keras", ".h5"):
        model.save(at(name + suffix))
    tf.saved_model.save(model, at(name + "_low"))
    assert os.path.isdir(at(name)) and os.path.isfile(at(name + ".keras"))
functional.export(at("exported"))
net.save(at("net"))
lookup, head = hps.split(functional)
assert np.array_equal(lookup(ids)[0] if isinstance(lookup(ids), list) else lookup(ids), rows[ids])
assert np.allclose(head(lookup(ids)), functional(ids), rtol=1e-6)
head.save(at("head"))
head.export(at("head_exported"))
functions = tf.saved_model.load(at("head_exported")).signatures["serving_default"].graph.as_graph_def()
assert "PyFunc" not in str(functions)
np.savez(
    at("wanted.npz"), ids=ids, functional=functional.predict(ids, verbose=0), sequential=sequential.predict(ids, verbose=0),
    trained=trained.predict(ids, verbose=0), **{f"net{i}": one for i, one in enumerate(wanted)},
)
print("saved")
"""
)

_LOAD = (
    _BUILD
    + """
wanted = np.load(at("wanted.npz"))
assert np.array_equal(wanted["ids"], ids)
ours = {"LookupLayer": hps.LookupLayer, "SparseLookupLayer": hps.SparseLookupLayer, "LookupCollection": hps.LookupCollection}
for objects in (None, ours):
    for suffix in ("", ".keras", ".h5"):
        for name in ("functional", "sequential", "trained"):
            model = keras.models.load_model(at(name + suffix), custom_objects=objects)
            assert np.allclose(model.predict(ids, verbose=0), wanted[name], rtol=1e-5), (name, suffix)
            (layer,) = [layer for layer in model.layers if isinstance(layer, hps.LookupLayer)]
            assert layer.ps_config_file == path and layer.train_rows == (name == "trained")
            if name == "trained":
                assert hps.SGD(model, lr=0.1).tables
        model = keras.models.load_model(at("collection" + suffix), custom_objects=objects)
        answers = model({"a": tf.constant(ids), "b": tf.constant(ids[:, :2], tf.int32)})
        assert np.array_equal(answers["a"], rows[ids]) and np.array_equal(answers["b"], narrow[ids[:, :2]])
        one, pooled = keras.models.load_model(at("both" + suffix), custom_objects=objects)(ragged)
        assert np.array_equal(one.flat_values, rows[1:4]) and np.allclose(pooled[0], rows[1] + rows[2])
net = keras.models.load_model(at("net"))  # its class is not known here: TensorFlow runs what it traced
net.summary(print_fn=lambda text: None)
for number, one in enumerate(net([sp_ids, tf.constant(ids)])):
    assert np.allclose(one, wanted[f"net{number}"], rtol=1e-5)
head = keras.models.load_model(at("head"))
assert np.allclose(head.predict(rows[ids], verbose=0), wanted["functional"], rtol=1e-5)
print("loaded")
"""
)

_SERVE_IN_KERAS_3 = """
import os, sys, numpy as np, tensorflow as tf
import hps_numba.frontends.tensorflow as hps
folder = sys.argv[1]
wanted = np.load(os.path.join(folder, "wanted.npz"))
assert hasattr(tf.keras, "KerasTensor")
for name in ("functional", "sequential", "trained"):
    for suffix in ("", "_low"):
        serve = hps.load(os.path.join(folder, name + suffix)).signatures["serving_default"]
        (answer,) = serve(tf.constant(wanted["ids"])).values()
        assert np.allclose(answer, wanted[name], rtol=1e-5)
exported = hps.load(os.path.join(folder, "exported"))
assert np.allclose(exported.serve(tf.constant(wanted["ids"])), wanted["functional"], rtol=1e-5)
print("served")
"""


@needs_keras_2
def test_models_of_keras_2_are_built_trained_saved_and_loaded_by_a_new_process(rig: Rig, tmp_path: Path) -> None:
    assert in_keras_2(_SAVE, str(tmp_path)).endswith("saved\n")
    loading = start_program(_PROLOGUE + _LOAD, str(tmp_path), **KERAS_2)
    serving = start_program(_SERVE_IN_KERAS_3, str(tmp_path), TF_USE_LEGACY_KERAS="")
    assert finish(loading).endswith("loaded\n")
    assert finish(serving).endswith("served\n")


_MIRRORED = (
    """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4)
"""
    + _PROLOGUE
    + _BUILD
    + """
strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(4)])
with strategy.scope():
    assert [answer.numpy() for answer in hps.Init(global_batch_size=32, ps_config_file=path)] == [b"OK"] * 4
    path = ""  # layers leave the rest to Init
    net = Net()
    net.summary(print_fn=lambda text: None)
    optimizer = keras.optimizers.Adam(0.05)
measure = keras.losses.MeanSquaredError(reduction=keras.losses.Reduction.NONE)

def batches(context):
    count = context.get_per_replica_batch_size(32)
    random = np.random.default_rng(0)
    many = random.integers(0, len(rows), (32 * 12, 3))
    sparse = tf.SparseTensor([[i, 0, 0] for i in range(len(many))], many[:, 0], [len(many), 1, 4])
    data = tf.data.Dataset.from_tensor_slices((sparse, many, rows[many].sum((1, 2))[:, None]))
    return data.batch(count, drop_remainder=True)

def step(sparse, dense, labels):
    with tf.GradientTape() as tape:
        logit, pooled, flat = net([sparse, dense])
        loss = tf.nn.compute_average_loss(measure(labels, logit), global_batch_size=32)
    optimizer.apply_gradients(zip(tape.gradient(loss, net.trainable_variables), net.trainable_variables))
    return loss, pooled, flat, dense

flatten = lambda sparse: tf.sparse.reshape(sparse, [-1, sparse.shape[-1]])
losses = []
for sparse_ids, dense_ids, labels in strategy.distribute_datasets_from_function(batches):
    sparse_ids = strategy.run(flatten, args=(sparse_ids,))
    loss, pooled, flat, asked = (strategy.experimental_local_results(one) for one in strategy.run(
        step, args=(sparse_ids, dense_ids, labels)))
    assert len(loss) == 4
    for number in range(4):
        looked = rows[asked[number].numpy()]
        assert np.array_equal(flat[number], looked.reshape(len(looked), -1)) and np.array_equal(pooled[number], looked[:, 0])
    losses.append(float(sum(loss)))
assert losses[-1] < losses[0], losses
assert len(net.trainable_variables) == 2
print("mirrored", losses)
"""
)


@needs_keras_2
def test_a_mirrored_strategy_of_four_trains_a_head_step_by_step(rig: Rig, tmp_path: Path) -> None:
    assert "mirrored" in run_program(_MIRRORED, str(tmp_path), **KERAS_2)


_TRANSFER = (
    _BUILD
    + """
# a model trained by TensorFlow, taken apart: its tables for the server, its head for a model that looks rows up
class Trained(keras.models.Model):
    def __init__(self):
        super().__init__()
        self.params = tf.Variable(initial_value=tf.concat([rows], axis=0))
        self.fc_1 = keras.layers.Dense(units=4, name="fc_1")
        self.fc_2 = keras.layers.Dense(units=1, name="fc_2")
    def call(self, inputs):
        pooled = tf.nn.embedding_lookup_sparse(params=self.params, sp_ids=inputs[0], sp_weights=None, combiner="mean")
        flat = tf.reshape(tf.nn.embedding_lookup(params=self.params, ids=inputs[1]), [-1, 3 * DIM])
        return self.fc_2(self.fc_1(tf.concat([pooled, flat], 1))), pooled, flat
    def summary(self):
        inputs = sparse_and_dense_inputs()
        return keras.models.Model(inputs=inputs, outputs=self.call(inputs)).summary(print_fn=lambda text: None)

trained = Trained()
trained.summary()
optimizer = keras.optimizers.Adam(learning_rate=0.1)
for _ in range(3):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((trained([sp_ids, tf.constant(ids)])[0] - labels) ** 2)
    optimizer.apply_gradients(zip(tape.gradient(loss, trained.trainable_variables), trained.trainable_variables))
head = keras.Model(trained.get_layer("fc_1").input, trained.get_layer("fc_2").output)
head.save(at("dense.model"))
trained.get_weights()[-1].tofile(at("t0/emb_vector"))

class Inference(keras.models.Model):
    def __init__(self):
        super().__init__()
        self.sparse_lookup_layer = hps.SparseLookupLayer(model_name="m", table_id=0, emb_vec_size=DIM, emb_vec_dtype=tf.float32)
        self.lookup_layer = hps.LookupLayer(model_name="m", table_id=0, emb_vec_size=DIM, emb_vec_dtype=tf.float32)
        self.dense_model = keras.models.load_model(at("dense.model"))
    def call(self, inputs):
        pooled = self.sparse_lookup_layer(sp_ids=inputs[0], sp_weights=None, combiner="mean")
        flat = tf.reshape(self.lookup_layer(inputs[1]), [-1, 3 * DIM])
        return self.dense_model(tf.concat([pooled, flat], 1)), pooled, flat

model = Inference()
model(sparse_and_dense_inputs())  # symbolic: the server is not there yet
model.save(at("inference"))
del model
hps.Init(global_batch_size=8, ps_config_file=path)
loaded = keras.models.load_model(at("inference"))
loaded.summary(print_fn=lambda text: None)
for got, one in zip(loaded([sp_ids, tf.constant(ids)]), trained([sp_ids, tf.constant(ids)])):
    assert np.allclose(got, one, rtol=1e-5, atol=1e-5)

functional = keras.Model(*(lambda i: (i, keras.layers.Dense(1, name="top")(tf.reshape(dense()(i), [-1, 3 * DIM]))))(
    keras.Input([3], dtype="int64")))
twin = keras.models.clone_model(functional)
twin.get_layer("top").set_weights(functional.get_layer("top").get_weights())
assert np.array_equal(twin(ids), functional(ids))
print("transferred")
"""
)


@needs_keras_2
def test_weights_go_from_a_trained_model_to_the_server_and_a_head(rig: Rig, tmp_path: Path) -> None:
    assert "transferred" in in_keras_2(_TRANSFER, str(tmp_path))


@pytest.mark.parametrize("kind", ["LookupLayer", "SparseLookupLayer"])
def test_configs_of_layers_are_read_whichever_keras_wrote_them(rig: Rig, kind: str) -> None:
    own = {"model_name": "m", "table_id": 0, "emb_vec_size": DIM, "ps_config_file": rig.path}
    policy = {"config": {"name": "mixed_bfloat16"}, "registered_name": None}
    of_keras_3 = {"module": "keras", "class_name": "DTypePolicy", **policy}
    of_keras_2 = {"module": "keras.mixed_precision", "class_name": "Policy", **policy}
    for dtype in ("mixed_bfloat16", of_keras_3, of_keras_2):
        layer = getattr(hps, kind).from_config({"name": "rows", "trainable": False, "dtype": dtype, **own})
        assert (layer.name, layer.trainable, layer.compute_dtype, layer.dtype) == ("rows", False, "bfloat16", "float32")
    for shape in ({"batch_input_shape": [None, 3]}, {"batch_shape": [None, 3]}):
        assert getattr(hps, kind).from_config({"dtype": "float32", **shape, **own}).emb_vec_size == DIM


def test_arguments_of_the_constructor_are_attributes(rig: Rig) -> None:
    for layer in (
        hps.LookupLayer("m", 0, DIM, tf.float32, rig.path, 8),
        hps.SparseLookupLayer(
            model_name="m", table_id=0, emb_vec_size=DIM, emb_vec_dtype=np.float32, ps_config_file=rig.path, global_batch_size=8
        ),
    ):
        assert (layer.model_name, layer.table_id, layer.emb_vec_size, layer.emb_vec_dtype) == ("m", 0, DIM, tf.float32)
        assert (layer.ps_config_file, layer.global_batch_size) == (rig.path, 8)
    tables = hps.LookupCollection("m", {"a": (0, DIM)}, ps_config_file=rig.path, global_batch_size=8)
    assert (tables.model_name, tables.ps_config_file, tables.global_batch_size) == ("m", rig.path, 8)


@needs_keras_2
@under_keras_3
def test_the_tests_of_layers_pass_under_keras_2() -> None:
    """All others of this folder, in a process of their own."""
    folder = Path(__file__).parent
    files = [str(folder / f"test_{name}.py") for name in ("initialize", "keras", "lookup", "training")]
    others = ("strategy", "rank", "config_may_change", "without_the_import")  # processes of their own
    chosen = ["-k", " and ".join(f"not {name}" for name in others) + " and not (pooled_rows_are and function)"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *chosen, *files]
    settings = {name: value for name, value in environment(**KERAS_2).items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=3 * HANG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
