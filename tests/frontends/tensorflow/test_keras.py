"""Keras and SavedModel: saving, loading elsewhere, mixed precision, training a head, cutting a model in two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, export, rig_of, run_program, tensorflow

from hps_numba import ConfigError
from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


def model_of(rig: Rig, **more: Any) -> Any:
    """Three ids of t0 and a number, to one number."""
    ids, number = keras.Input([3], dtype="int64", name="ids"), keras.Input([1], name="number")
    rows = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, global_batch_size=64, **more)(ids)
    both = keras.layers.Concatenate()([keras.layers.Flatten()(rows), number])
    return keras.Model([ids, number], keras.layers.Dense(1)(both))


def batch(seed: int = 0, n: int = 16) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, ROWS, (n, 3)), random.normal(size=(n, 1)).astype(np.float32)]


@pytest.mark.parametrize("config", ["path", "dict"])
def test_layers_from_their_own_config(rig: Rig, config: str) -> None:
    source = rig.path if config == "path" else rig.config
    for layer in (
        hps.LookupLayer("m", "t0", DIM, "float16", source, 8, name="rows"),
        hps.SparseLookupLayer("m", 1, 3, tf.float32, source, 8, trainable=False),
        hps.LookupCollection("m", {"a": (0, DIM), "b": ("t1", 3)}, ps_config_file=source),
    ):
        settings = json.loads(json.dumps(layer.get_config()))
        twin = type(layer).from_config(settings)
        assert twin.get_config() == layer.get_config() and twin.name == layer.name
    rows = hps.LookupLayer.from_config(hps.LookupLayer("m", 0, DIM, ps_config_file=source).get_config())
    assert np.array_equal(rows(np.array([1])), rig.rows[[1]])


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # Keras' own
def test_a_keras_file(rig: Rig, tmp_path: Path) -> None:
    model, inputs = model_of(rig), batch()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.array_equal(loaded.predict(inputs, verbose=0), model.predict(inputs, verbose=0))
    assert loaded.layers[1].table.ps_config_file == rig.path


_SERVE = """
import sys, threading, numpy as np
import hps_numba.frontends.tensorflow as hps
from hps_numba.server.registry import SERVERS
from support.waiting import join_all
path, inputs, answer = sys.argv[1], np.load(sys.argv[2]), sys.argv[3]
served = hps.load(path)
assert SERVERS.opened == []
results, ids, number = [None] * 16, inputs["ids"], inputs["number"]

import tensorflow as tf
ids, number = tf.constant(ids), tf.constant(number)
def call(i):
    for _ in range(5):
        results[i] = served.serve([ids, number]).numpy()
threads = [threading.Thread(target=call, args=(i,)) for i in range(16)]
for thread in threads: thread.start()
join_all(*threads)
assert len(SERVERS.opened) == 1
assert all(np.array_equal(result, results[0]) for result in results)
np.save(answer, results[0])
print("served")
"""


def exported(rig: Rig, tmp_path: Path) -> tuple[Any, str, list[np.ndarray]]:
    model, inputs = model_of(rig), batch()
    path = export(model, tmp_path / "saved")
    np.savez(tmp_path / "inputs.npz", ids=inputs[0], number=inputs[1])
    return model, path, inputs


def test_a_saved_model_serves_in_a_process_that_only_imported_the_package(rig: Rig, tmp_path: Path) -> None:
    model, path, inputs = exported(rig, tmp_path)
    assert "served" in run_program(_SERVE, path, str(tmp_path / "inputs.npz"), str(tmp_path / "answer.npy"))
    assert np.allclose(np.load(tmp_path / "answer.npy"), model(inputs), rtol=1e-6)


def test_the_config_may_change_after_the_export(rig: Rig, tmp_path: Path) -> None:
    model, path, inputs = exported(rig, tmp_path)
    before = model(inputs).numpy()
    (2 * rig.rows).tofile(tmp_path / "t0" / "emb_vector")
    rig.config["models"][0]["default_value_for_each_table"] = [9.0, 9.0]
    rig.config["models"][0]["max_batch_size"] = 64
    rig.write()
    run_program(_SERVE, path, str(tmp_path / "inputs.npz"), str(tmp_path / "answer.npy"))
    after = np.load(tmp_path / "answer.npy")
    SERVERS.close()
    assert np.allclose(after, model(inputs), rtol=1e-6) and not np.allclose(after, before)


_NO_IMPORT = """
import sys, tensorflow as tf
served = tf.saved_model.load(sys.argv[1])
try:
    served.serve([tf.constant([[1, 2, 3]], tf.int64), tf.constant([[1.0]])])
except tf.errors.OpError as problem:
    print("callback hps_numba.lookup.1 is not found" if "hps_numba.lookup.1" in str(problem) else problem)
"""


def test_without_the_import_tensorflow_names_our_token(rig: Rig, tmp_path: Path) -> None:
    _, path, _ = exported(rig, tmp_path)
    assert "hps_numba.lookup.1" in run_program(_NO_IMPORT, path)


def test_a_module_is_saved_without_keras(rig: Rig, tmp_path: Path) -> None:
    module = tf.Module()
    table = hps.Table("m", 0, DIM, rig.path)
    module.rows = tf.function(
        lambda ids: hps.embedding_lookup(table, ids), input_signature=[tf.TensorSpec([None, None], tf.int64)]
    )
    tf.saved_model.save(module, str(tmp_path / "module"))
    rows = hps.load(tmp_path / "module").rows(tf.constant([[1, 2]], tf.int64))
    assert np.array_equal(rows, rig.rows[[[1, 2]]])


def test_a_head_learns_on_frozen_rows(rig: Rig) -> None:
    model, inputs = model_of(rig), batch(n=256)
    assert len(model.trainable_variables) == 2 and not model.layers[1].weights
    wanted = rig.rows[inputs[0]].sum((1, 2))[:, None] + inputs[1]
    model.compile(keras.optimizers.SGD(0.01), "mse")
    history = model.fit(inputs, wanted, epochs=5, batch_size=32, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    assert np.array_equal(SERVERS.opened[0].lookup(inputs[0], "m", 0), rig.rows[inputs[0]])


def test_mixed_precision(rig: Rig) -> None:
    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, dtype="mixed_bfloat16")
    rows = layer(np.array([1, 2]))
    assert rows.dtype == tf.bfloat16 and np.array_equal(rows, tf.cast(rig.rows[1:3], tf.bfloat16))
    ids = tf.SparseTensor([[0, 0]], tf.constant([1], tf.int64), [1, 1])
    weights = tf.SparseTensor([[0, 0]], [0.1], [1, 1])
    sums = hps.SparseLookupLayer("m", 0, DIM, ps_config_file=rig.path, dtype="mixed_float16")(ids, weights, combiner="sum")
    assert sums.dtype == tf.float16  # weights were not rounded before
    assert np.array_equal(sums[0], tf.cast(np.float32(0.1) * rig.rows[1], tf.float16))


def test_no_jit_is_tried(rig: Rig) -> None:
    model = model_of(rig)
    assert model.layers[1].supports_jit is False
    if hasattr(keras, "KerasTensor"):  # Keras 2 compiles only what it is told to
        model.compile("sgd", "mse", jit_compile="auto")
        assert not model.jit_compile


def test_inside_a_dataset(rig: Rig) -> None:
    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)
    ids = np.arange(64).reshape(16, 4)
    stream = tf.data.Dataset.from_tensor_slices(ids).batch(4).map(layer, num_parallel_calls=4)
    assert np.array_equal(np.concatenate(list(stream.as_numpy_iterator())), rig.rows[ids])


def test_26_tables_in_a_graph_end(tmp_path: Path) -> None:
    """Lookups wait for nothing but the GIL: however many there are, threads of TensorFlow suffice."""
    rig = rig_of(tmp_path)
    layers = [hps.LookupLayer("m", i % 2, (DIM, 3)[i % 2], ps_config_file=rig.path) for i in range(26)]
    call = tf.function(lambda ids: [layer(ids) for layer in layers])
    for _ in range(10):
        answers = call(tf.constant([1, 2]))
    assert all(np.array_equal(answers[i], (rig.rows, rig.narrow)[i % 2][1:3]) for i in range(26))
    SERVERS.close()


def sparse_model(rig: Rig) -> Any:
    ids = keras.Input([4], dtype="int64", sparse=True, name="ids")
    rows = hps.SparseLookupLayer("m", 0, DIM, ps_config_file=rig.path)(ids, combiner="sum")
    return keras.Model(ids, keras.layers.Dense(2)(rows))


def test_sparse_inputs_of_a_functional_model(rig: Rig) -> None:
    model = sparse_model(rig)
    ids = tf.SparseTensor([[0, 0], [0, 1], [1, 3]], tf.constant([1, 2, 3], tf.int64), [2, 4])
    sums = np.stack([rig.rows[1] + rig.rows[2], rig.rows[3]])
    assert np.allclose(model(ids), model.layers[-1](sums), rtol=1e-5, atol=1e-6)


def test_a_model_in_two_halves(rig: Rig, tmp_path: Path) -> None:
    model, inputs = model_of(rig), batch()
    lookup, dense = hps.split(model)
    outputs = lookup(inputs)
    assert np.array_equal(outputs[0], rig.rows[inputs[0]]) and np.array_equal(outputs[1], inputs[1])
    assert np.array_equal(dense(outputs), model(inputs))
    export(dense, tmp_path / "dense")
    graph = tf.saved_model.load(str(tmp_path / "dense")).signatures["serve"].graph.as_graph_def()
    functions = [node.op for function in graph.library.function for node in function.node_def]
    assert "PyFunc" not in {node.op for node in graph.node} | set(functions)
    assert len(hps.split(sparse_model(rig))[1].inputs) == 1
    subclassed = Subclassed(rig)
    subclassed(inputs[0])
    for wrong in (keras.Sequential([keras.layers.Dense(1)]), keras.Model(*[keras.Input([1])] * 2), subclassed, "model"):
        with pytest.raises(ConfigError, match="model: "):
            hps.split(wrong)


class Subclassed(keras.Model):  # type: ignore[misc]
    """A model that is not functional."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rows = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)

    def call(self, ids: Any) -> Any:
        return self.rows(ids)


def test_halves_of_models_that_share_return_or_hide_lookups(rig: Rig) -> None:
    def layer() -> Any:
        return hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)

    one, two = keras.Input([3], dtype="int64"), keras.Input([3], dtype="int64")
    shared, ids = layer(), [batch(0)[0], batch(1)[0]]
    model = keras.Model([one, two], keras.layers.Add()([shared(one), shared(two)]))
    lookup, dense = hps.split(model)
    assert len(dense.inputs) == 2 and np.array_equal(dense(lookup(ids)), model(ids))
    rows = layer()(one)
    lookup, dense = hps.split(keras.Model(one, [rows, keras.layers.Flatten()(rows)]))
    for answer in dense(lookup(ids[0])):
        assert np.array_equal(np.reshape(answer, (16, 3, DIM)), rig.rows[ids[0]])
    tables = hps.LookupCollection("m", {"a": (0, DIM), "b": ("t1", 3)}, ps_config_file=rig.path)({"a": one, "b": two})
    _, dense = hps.split(keras.Model([one, two], keras.layers.Flatten()(tables["b"])))
    assert [tuple(tensor.shape) for tensor in dense.inputs] == [(None, 3, 3)]
    inner = keras.Model(one, layer()(one))
    model = keras.Model(two, keras.layers.Add()([inner(two), layer()(two)]))
    with pytest.raises(
        ConfigError, match=r"expected lookup layers that '.*' itself calls, got lookup_layer.* inside another layer"
    ):
        hps.split(model)


def test_lookups_inside_wrappers(rig: Rig) -> None:
    """As an Embedding of Keras: ``TimeDistributed`` asks for shapes before there is a tensor."""
    given = batch(n=6)[0].reshape(2, 3, 3)
    for steps in (3, None):
        layer = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)
        ids = keras.Input([steps, 3], dtype="int64")
        rows = keras.layers.TimeDistributed(layer)(ids)
        assert tuple(rows.shape) == (None, steps, 3, DIM)
        np.testing.assert_array_equal(keras.Model(ids, rows)(given), rig.rows[given])
        np.testing.assert_array_equal(keras.Model(ids, rows).predict(given, verbose=0), rig.rows[given])
    last = keras.Sequential([keras.Input([3, 3], dtype="int64"), keras.layers.TimeDistributed(layer)])
    last.add(keras.layers.TimeDistributed(keras.layers.Flatten()))
    last.add(keras.layers.LSTM(2))
    assert last(given).shape == (2, 2)


def test_shapes_of_answers(rig: Rig) -> None:
    layer, sparse = (make("m", 0, DIM, ps_config_file=rig.path) for make in (hps.LookupLayer, hps.SparseLookupLayer))
    collection = hps.LookupCollection("m", {"a": (0, DIM), "b": (1, 3)}, ps_config_file=rig.path)
    for shape in ((None, 3), tf.TensorShape([None, 3])):
        assert tuple(layer.compute_output_shape(shape)) == (None, 3, DIM)
        assert tuple(sparse.compute_output_shape(shape)) == tuple(sparse.compute_output_shape([shape, shape])) == (None, DIM)
        assert collection.compute_output_shape({"b": shape}) == {"b": (None, 3, 3)}
    rows = hps.LookupLayer("m", 0, DIM, tf.float16, rig.path)(keras.Input([3], dtype="int64"))
    assert tf.as_dtype(rows.dtype) == tf.float16 and tuple(rows.shape) == (None, 3, DIM)


def test_the_first_half_takes_inputs_as_the_model_does(rig: Rig) -> None:
    """One tensor, a list of one, or a mapping."""
    ids = batch()[0]
    for wrap in (lambda one: one, lambda one: [one], lambda one: {"ids": one}):
        given = keras.Input([3], dtype="int64", name="ids")
        rows = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)(given)
        model = keras.Model(wrap(given), keras.layers.Flatten()(rows))
        lookup, dense = hps.split(model)
        np.testing.assert_array_equal(dense(lookup(wrap(ids))), model(wrap(ids)))
