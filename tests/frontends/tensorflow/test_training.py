"""Rows trained from TensorFlow, against embeddings of its own: tapes, ``fit``, graphs, pooled and several tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, export, rig_of, tensorflow

from hps_numba import ConfigError
from hps_numba.server.registry import SERVERS
from hps_numba.training.initializers import Normal

tf, keras, hps = tensorflow()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


def layer_of(rig: Rig, kind: str = "LookupLayer", **more: Any) -> Any:
    return getattr(hps, kind)("m", 0, DIM, ps_config_file=rig.path, train_rows=True, **more)


def all_rows(rig: Rig) -> np.ndarray:
    return np.asarray(SERVERS.open(rig.path).lookup(np.arange(ROWS), "m", 0))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["SGD", "Adagrad", "Adam"])
def test_steps_as_with_a_variable(rig: Rig, kind: str, graph: bool) -> None:
    """Duplicates in a batch, and two tapes a step."""
    layer = layer_of(rig)
    optimizer = getattr(hps, kind)(layer, lr=0.05)
    sums, means = np.zeros(ROWS), np.zeros((2, ROWS, DIM))
    wanted = rig.rows.astype(np.float64)

    def backward(ids: Any, target: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((layer(ids, training=True) - target) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    call = tf.function(backward) if graph else backward
    random = np.random.default_rng(0)
    for steps in range(1, 11):
        gradient = np.zeros((ROWS, DIM))
        touched = set()
        for _ in range(2):
            ids, target = random.integers(0, 60, (5, 4)), random.normal(size=(5, 4, DIM)).astype(np.float32)
            (zero,) = call(tf.constant(ids), tf.constant(target))
            assert float(zero) == 0
            np.add.at(gradient, ids, 2 * (wanted[ids] - target))
            touched |= set(ids.ravel().tolist())
        optimizer.step()
        for row in touched:
            if kind == "SGD":
                wanted[row] -= 0.05 * gradient[row]
            elif kind == "Adagrad":
                sums[row] += (gradient[row] ** 2).mean()
                wanted[row] -= 0.05 * gradient[row] / (np.sqrt(sums[row]) + 1e-10)
            else:
                means[:, row] += np.array([[0.1], [0.001]]) * ([gradient[row], gradient[row] ** 2] - means[:, row])
                rate = 0.05 * np.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
                wanted[row] -= rate * means[0, row] / (np.sqrt(means[1, row]) + 1e-8)
    np.testing.assert_allclose(all_rows(rig), wanted, rtol=1e-4, atol=1e-4)


def test_fit_trains_rows_and_head(rig: Rig, tmp_path: Path) -> None:
    layer = layer_of(rig, initializer="normal")
    model = keras.Sequential([keras.Input([2], dtype="int64"), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    rows = hps.Adagrad(model, lr=0.2)
    random = np.random.default_rng(0)
    ids = random.integers(150, 250, (256, 2))  # half of them have no row yet
    labels = np.sin(ids).sum(1, keepdims=True)
    losses = model.fit(ids, labels, batch_size=32, epochs=15, verbose=0, callbacks=[rows.callback()]).history["loss"]
    assert losses[-1] < 0.2 * losses[0]
    server = SERVERS.open(rig.path)
    assert server.contains(np.unique(ids), "m", 0).all() and server.lookup([ROWS], "m", 0)[0, 0] != 0.25
    assert float(layer.switch) == 0.0 and rows.trainers[0].steps == 15 * 8
    hps.save_checkpoint(tmp_path / "c.npz", rows)
    before = model.predict(ids[:8], verbose=0)
    export(model, tmp_path / "exported")
    model.fit(ids, labels, epochs=1, verbose=0, callbacks=[rows.callback()])
    server.erase([ids[0, 0]], "m", 0)
    hps.load_checkpoint(tmp_path / "c.npz", rows)
    assert rows.trainers[0].steps == 15 * 8
    served = hps.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(served.serve(tf.constant(ids[:8])), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_pooled_rows_as_those_of_tensorflow(rig: Rig, combiner: str) -> None:
    layer = layer_of(rig, "SparseLookupLayer")
    indices = [[0, 0], [0, 1], [2, 0], [2, 3], [3, 1]]
    ids = tf.SparseTensor(indices, tf.constant([4, 7, 7, 9, 4], tf.int64), [4, 5])
    weights = tf.Variable([0.5, 2.0, 1.0, 3.0, 0.25])
    toward = np.random.default_rng(0).normal(size=(4, DIM)).astype(np.float32)
    variable = tf.Variable(rig.rows)
    with tf.GradientTape() as tape:
        sparse = tf.SparseTensor(indices, weights, [4, 5])
        ours = layer(ids, sparse, combiner=combiner, max_norm=2.5, training=True)
        wanted = tf.nn.embedding_lookup_sparse(variable, ids, sparse, combiner=combiner, max_norm=2.5)
        loss = tf.reduce_sum(ours * toward), tf.reduce_sum(wanted * toward)
        both = loss[0] + 3 * loss[1]
    got = tape.gradient(both, [weights, variable, layer.switch])
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    keys, gradients = layer.trained_tables()[0].take()
    assert keys.tolist() == [4, 7, 9] and float(got[2]) == 0
    np.testing.assert_allclose(gradients, tf.convert_to_tensor(got[1]).numpy()[[4, 7, 9]] / 3, rtol=1e-4, atol=1e-5)
    empty = layer(ids, None, combiner=combiner, default_id=11, training=True)
    np.testing.assert_allclose(empty[1], rig.rows[11], rtol=1e-5)
    np.testing.assert_allclose(empty, layer(ids, None, combiner=combiner, default_id=11), rtol=1e-4, atol=1e-5)


def test_several_tables_ragged_and_sparse(rig: Rig) -> None:
    tables = {"a": (0, DIM), "b": ("t1", 3), "c": ("t0", DIM)}
    layer = hps.LookupCollection("m", tables, ps_config_file=rig.path, train_rows=True)
    optimizer = hps.SGD([layer], lr=1.0)
    assert len(optimizer.tables) == 2 and "lr=1.0" in repr(optimizer)
    ids = {
        "a": tf.ragged.constant([[5, 5], [6]], dtype=tf.int64),
        "b": tf.constant([5, 1000], tf.int32),
        "c": tf.SparseTensor([[0, 0], [0, 1]], tf.constant([5, 7], tf.int64), [1, 2]),
    }
    with tf.GradientTape() as tape:
        rows = layer(ids, training=True)
        loss = tf.reduce_sum(rows["a"].flat_values) + tf.reduce_sum(rows["b"]) + tf.reduce_sum(rows["c"])
    tape.gradient(loss, layer.trainable_variables)
    optimizer.step()
    after = all_rows(rig)
    np.testing.assert_allclose(after[[5, 6, 7]], rig.rows[[5, 6, 7]] - [[2.5], [1], [0.5]], atol=1e-5)
    server = SERVERS.open(rig.path)
    np.testing.assert_allclose(server.lookup([5, 1000], "m", 1), [rig.narrow[5] - 1, [-0.5] * 3], atol=1e-5)
    optimizer.step()  # no gradient since
    assert np.array_equal(all_rows(rig), after)


def test_frozen_layers_have_no_gradients_and_bad_arguments_are_refused(rig: Rig) -> None:
    layer = layer_of(rig, initializer=Normal(0.5))
    ids = tf.constant([1, 1000], tf.int64)
    assert (layer(ids)[1] == 0.25).numpy().all()
    layer.trainable = False
    assert (layer(ids, training=True)[1] == 0.25).numpy().all()
    again = hps.LookupLayer.from_config(layer.get_config())
    assert again.train_rows and again.initializer == Normal(0.5)
    frozen = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path)
    assert not frozen.weights and "train_rows" not in frozen.get_config()
    for wrong in (frozen, keras.Sequential([keras.layers.Dense(1)])):
        with pytest.raises(ConfigError, match="layers: expected layers with train_rows=True"):
            hps.SGD(wrong)
    with pytest.raises(ConfigError, match="layers: expected Keras layers or models, got int"):
        hps.SGD(5)
    with pytest.raises(ConfigError, match="initializer: expected train_rows=True with it"):
        hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, initializer="zeros")
    with pytest.raises(ConfigError, match="cannot be saved with a model"):
        layer_of(rig, initializer=lambda keys, dim: np.zeros((len(keys), dim))).get_config()


KINDS = {
    "LookupLayer": lambda layer, ids, **how: layer(ids, **how),
    "SparseLookupLayer": lambda layer, ids, **how: layer(tf.sparse.from_dense(ids), **how),
    "LookupCollection": lambda layer, ids, **how: layer({"a": ids}, **how)["a"],
}


def trained(rig: Rig, kind: str, **more: Any) -> Any:
    if kind != "LookupCollection":
        return layer_of(rig, kind, initializer="normal", **more)
    tables = {"a": (0, DIM)}
    return hps.LookupCollection("m", tables, ps_config_file=rig.path, train_rows=True, initializer="normal", **more)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_creates_no_rows(rig: Rig, kind: str) -> None:
    layer, call = trained(rig, kind), KINDS[kind]
    server, ids = SERVERS.open(rig.path), tf.constant([[ROWS + 5, 3]], tf.int64)
    before = [table.rows for table in server.stats()["m"].values()]
    for how in ({}, {"training": False}, {"training": None}):
        call(layer, ids, **how)
        tf.function(lambda ids, how=how: call(layer, ids, **how))(ids)
    assert [table.rows for table in server.stats()["m"].values()] == before
    call(layer, ids, training=True)
    assert server.contains([ROWS + 5], "m", 0).all()


def test_fit_creates_rows_and_neither_predict_nor_evaluate_do(rig: Rig, tmp_path: Path) -> None:
    layer = layer_of(rig, initializer="normal")
    model = keras.Sequential([keras.Input([2], dtype="int64"), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    server, ids, labels = SERVERS.open(rig.path), np.array([[ROWS + 5, 3]]), np.zeros([1, 1])
    model.predict(ids, verbose=0)
    model.evaluate(ids, labels, verbose=0)
    served = tf.saved_model.load(export(model, tmp_path / "served"))
    served.serve(tf.constant(ids))
    assert not server.contains([ROWS + 5], "m", 0).any()
    model.fit(ids, labels, verbose=0)
    assert server.contains([ROWS + 5], "m", 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_read_only_layers_neither_create_nor_train_rows(rig: Rig, kind: str) -> None:
    layer, call = trained(rig, kind, read_only=True), KINDS[kind]
    server, ids = SERVERS.open(rig.path), tf.constant([[ROWS + 5, 3]], tf.int64)
    layer = type(layer).from_config(layer.get_config())
    with tf.GradientTape() as tape:
        rows = call(layer, ids, training=True)
    assert tape.gradient(rows, layer.trainable_variables) == [None]
    assert not server.contains([ROWS + 5], "m", 0).any() and not layer.trained_tables()
    with pytest.raises(ConfigError, match=r"expected layers with train_rows=True and not read_only"):
        hps.SGD(layer)
    layer.read_only = False
    assert "read_only" not in layer.get_config() and hps.SGD(layer)
    with tf.GradientTape() as tape:
        rows = call(layer, ids, training=True)
    assert tape.gradient(rows, layer.trainable_variables) != [None]
    assert server.contains([ROWS + 5], "m", 0).all()
