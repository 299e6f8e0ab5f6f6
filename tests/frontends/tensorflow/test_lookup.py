"""``LookupLayer`` and ``SparseLookupLayer`` against TensorFlow's own lookups."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, rig_of, tensorflow
from support.waiting import join_all

from hps_numba import ConfigError, HpsError, KeyDtypeError, UnknownModelError
from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()

MODES = ("eager", "function")
NORMS = (None, 0, 0.1, 10.0)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


def dense(rig: Rig, **more: Any) -> Any:
    return hps.LookupLayer("m", 0, DIM, tf.float32, ps_config_file=rig.path, global_batch_size=64, **more)


def sparse(rig: Rig, **more: Any) -> Any:
    return hps.SparseLookupLayer("m", 0, DIM, tf.float32, ps_config_file=rig.path, global_batch_size=64, **more)


def called(layer: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    return (tf.function(layer) if mode == "function" else layer)(*args, **kwargs)


# -- dense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_norm", NORMS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (2, 0, 3), (2, 3, 4), (1, 2, 1, 2, 3)])
def test_dense_rows_are_those_of_tensorflow(rig: Rig, mode: str, shape: tuple[int, ...], max_norm: Any) -> None:
    ids = np.random.default_rng(len(shape)).integers(0, ROWS, shape)
    for dtype in (tf.int64, tf.int32):
        some = tf.constant(ids, dtype)
        answer = called(dense(rig), mode, some, max_norm=max_norm)
        wanted = tf.nn.embedding_lookup(tf.constant(rig.rows), some, max_norm=max_norm)
        assert answer.dtype == tf.float32 and answer.shape == wanted.shape
        assert answer.numpy().tobytes() == wanted.numpy().tobytes()


def test_a_bound_that_is_a_variable(rig: Rig) -> None:
    bound, layer, ids = tf.Variable(0.1), dense(rig), tf.constant([1, 2], tf.int64)
    function = tf.function(lambda: layer(ids, max_norm=bound))
    for value in (0.1, 5.0):
        bound.assign(value)
        assert np.array_equal(function(), tf.nn.embedding_lookup(tf.constant(rig.rows), ids, max_norm=value))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["uint32", "uint64", "int32", "int64"])
def test_every_type_of_ids(rig: Rig, mode: str, name: str) -> None:
    answer = called(dense(rig), mode, tf.constant([[5, 199]], tf.as_dtype(name)))
    assert np.array_equal(answer[0], rig.rows[[5, 199]])


@pytest.mark.parametrize("mode", MODES)
def test_ids_of_64_bits(rig: Rig, mode: str) -> None:
    keys = np.array([0, -1, 2**63 - 1, -(2**63)])
    rows = np.arange(4 * DIM, dtype=np.float32).reshape(4, DIM)
    SERVERS.open(rig.path).insert(keys, rows, "m", 0)
    assert np.array_equal(called(dense(rig), mode, tf.constant(keys)), rows)
    assert np.array_equal(called(dense(rig), mode, tf.constant(keys.view(np.uint64))), rows)


@pytest.mark.parametrize("mode", MODES)
def test_32_bit_models_take_the_bits(tmp_path: Path, mode: str) -> None:
    rig = rig_of(tmp_path)
    rig.config["supportlonglong"] = False
    for name in ("t0", "t1"):
        np.arange(2**32 - ROWS, 2**32, dtype=np.int64).tofile(tmp_path / name / "key")
    rig.write()
    for ids in (tf.constant([-1, -2], tf.int32), tf.constant([2**32 - 1, 2**32 - 2], tf.uint32)):
        assert np.array_equal(called(dense(rig), mode, ids), rig.rows[[-1, -2]])
    SERVERS.close()


def test_ids_that_are_not_tensors_are_converted(rig: Rig) -> None:
    for ids in (np.array([[1, 2]]), tf.Variable([[1, 2]], dtype=tf.int64)):
        assert np.array_equal(dense(rig)(ids), rig.rows[[[1, 2]]])


@pytest.mark.parametrize("mode", MODES)
def test_ragged_ids_give_ragged_rows(rig: Rig, mode: str) -> None:
    for ids in ([[1, 2], [], [3]], [[[1], [2, 3]], [], [[]]]):
        ragged = tf.ragged.constant(ids, dtype=tf.int64, ragged_rank=2 if isinstance(ids[0][0], list) else 1)
        answer = called(dense(rig), mode, ragged, max_norm=0.5)
        wanted = tf.nn.embedding_lookup(tf.constant(rig.rows), ragged.flat_values, max_norm=0.5)
        assert isinstance(answer, tf.RaggedTensor) and np.array_equal(answer.flat_values, wanted)
        assert all(np.array_equal(one, other) for one, other in zip(answer.nested_row_splits, ragged.nested_row_splits))


def test_static_shapes_are_kept(rig: Rig) -> None:
    layer, shapes = dense(rig), []

    def trace(ids: Any) -> Any:
        rows = layer(ids)
        shapes.append(rows.shape.as_list())
        return rows

    for shape in ([None, 3], [2, None, 3], [5]):
        tf.function(trace).get_concrete_function(tf.TensorSpec(shape, tf.int64))
    assert shapes == [[None, 3, DIM], [2, None, 3, DIM], [5, DIM]]
    free = tf.function(layer).get_concrete_function(tf.TensorSpec(None, tf.int64))
    assert free(tf.constant([[1]], tf.int64)).shape == (1, 1, DIM)


@pytest.mark.parametrize("mode", MODES)
def test_unknown_ids_get_the_default_of_their_table(rig: Rig, mode: str) -> None:
    answer = called(dense(rig), mode, tf.constant([1, -5, ROWS, 2], tf.int64)).numpy()
    assert np.array_equal(answer[[0, 3]], rig.rows[[1, 2]]) and (answer[1:3] == 0.25).all()
    sums = called(sparse(rig), mode, tf.sparse.from_dense([[1, ROWS]]), combiner="sum").numpy()
    assert np.allclose(sums[0], rig.rows[1] + 0.25)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_rows_of_low_precision(rig: Rig, name: str) -> None:
    layer = hps.LookupLayer("m", 0, DIM, name, ps_config_file=rig.path)
    ids = tf.constant([3, 4], tf.int64)
    for answer in (layer(ids), tf.function(layer)(ids)):
        assert np.array_equal(answer, tf.cast(rig.rows[3:5], name)) and answer.dtype == name


def test_other_dtypes_are_refused(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="emb_vec_dtype: expected one of float32, float16, bfloat16, got float64"):
        hps.LookupLayer("m", 0, DIM, tf.float64)
    for ids in (tf.constant([1.0]), tf.constant(["a"]), tf.constant([1], tf.int8)):
        with pytest.raises(KeyDtypeError, match=r"ids: expected one of int64, int32, uint32, uint64, got "):
            hps.embedding_lookup(hps.Table("m", 0, DIM, rig.path), ids)


# -- sparse ----------------------------------------------------------------------------------------


def matrix(random: np.random.Generator, rows: int, dtype: str = "int64") -> Any:
    """A SparseTensor of ids with 1 to 6 a row."""
    counts = random.integers(1, 7, rows)
    indices = [(row, column) for row, count in enumerate(counts) for column in range(count)]
    values = random.integers(0, ROWS, len(indices))
    return tf.SparseTensor(np.array(indices), tf.constant(values, dtype), [rows, 6])


def weights_of(random: np.random.Generator, ids: Any, dtype: Any = tf.float32) -> Any:
    values = random.uniform(-1, 2, ids.values.shape[0])
    return tf.SparseTensor(ids.indices, tf.constant(values, dtype), ids.dense_shape)


def scale_of(rig: Rig, ids: Any, weights: Any, combiner: str, max_norm: Any) -> np.ndarray:
    """The sum of the absolute terms of each pooled element, by TensorFlow."""
    rows = tf.nn.embedding_lookup(tf.constant(rig.rows), ids.values, max_norm=max_norm)
    w = tf.ones(ids.values.shape) if weights is None else tf.cast(weights.values, tf.float32)
    bags, n = ids.indices[:, 0], ids.dense_shape[0]
    terms = tf.math.unsorted_segment_sum(tf.abs(w[:, None] * rows), bags, n)
    divisor = {"sum": tf.ones_like(w), "mean": w, "sqrtn": w * w}[combiner]
    total = tf.math.unsorted_segment_sum(divisor, bags, n)[:, None]
    if combiner == "sum":
        return terms.numpy()
    return tf.math.divide_no_nan(terms, tf.sqrt(total) if combiner == "sqrtn" else tf.abs(total)).numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("max_norm", NORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_pooled_rows_are_those_of_tensorflow(rig: Rig, mode: str, combiner: str, weighted: bool, max_norm: Any) -> None:
    random = np.random.default_rng(3)
    layer = sparse(rig)
    call = tf.function(layer) if mode == "function" else layer
    for dtype in ("int64", "int32"):
        for n in (1, 5, 40):
            ids = matrix(random, n, dtype)
            weights = weights_of(random, ids) if weighted else None
            answer = call(ids, weights, combiner=combiner, max_norm=max_norm)
            wanted = tf.nn.embedding_lookup_sparse(tf.constant(rig.rows), ids, weights, combiner=combiner, max_norm=max_norm)
            assert answer.shape == (n, DIM) and answer.dtype == tf.float32
            # a weighted mean whose weights nearly cancel divides by the error of their sum
            slack = 1e-6 if combiner != "mean" or not weighted else 4e-6 * condition(ids, weights)
            assert (np.abs(answer - wanted) <= slack * scale_of(rig, ids, weights, combiner, max_norm)).all()


def condition(ids: Any, weights: Any) -> np.ndarray:
    bags, n = ids.indices[:, 0], ids.dense_shape[0]
    whole = tf.math.unsorted_segment_sum(tf.abs(weights.values), bags, n)
    return (whole / tf.abs(tf.math.unsorted_segment_sum(weights.values, bags, n))).numpy()[:, None]


def test_no_combiner_is_the_mean(rig: Rig) -> None:
    ids = matrix(np.random.default_rng(0), 5)
    layer = sparse(rig)
    assert np.array_equal(layer(ids, None), layer(ids, None, combiner="mean"))
    assert np.array_equal(layer(ids), layer(ids, None, name="anything", combiner="mean"))
    with pytest.raises(ValueError, match="combiner: expected one of sum, mean, sqrtn, got 'max'"):
        layer(ids, None, combiner="max")


@pytest.mark.parametrize("combiner", ["mean", "sqrtn"])
def test_weights_that_add_up_to_0_give_0(rig: Rig, combiner: str) -> None:
    ids = tf.SparseTensor([[0, 0], [0, 1], [1, 0]], tf.constant([1, 2, 3], tf.int64), [2, 2])
    values = [1.0, -1.0, 2.0] if combiner == "mean" else [0.0, 0.0, 2.0]
    weights = tf.SparseTensor(ids.indices, values, ids.dense_shape)
    answer = sparse(rig)(ids, weights, combiner=combiner).numpy()
    assert not answer[0].any() and np.allclose(answer[1], rig.rows[3])


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_ids_give_0_or_the_row_of_default_id(rig: Rig, mode: str) -> None:
    ids = tf.SparseTensor([[1, 0], [1, 1], [3, 0]], tf.constant([7, 8, 9], tf.int64), [6, 4])
    layer = sparse(rig)
    answer = called(layer, mode, ids, combiner="sum").numpy()
    assert answer.shape == (6, DIM) and not answer[[0, 2, 4, 5]].any()
    assert np.allclose(answer[[1, 3]], [rig.rows[7] + rig.rows[8], rig.rows[9]], rtol=1e-6)
    for combiner in ("sum", "mean", "sqrtn"):
        for max_norm in (None, 0.5):
            answer = called(layer, mode, ids, combiner=combiner, max_norm=max_norm, default_id=4)
            wanted = tf.nn.safe_embedding_lookup_sparse(
                tf.constant(rig.rows), ids, combiner=combiner, max_norm=max_norm, default_id=4
            )
            assert np.allclose(answer[:5], wanted[:5], rtol=1e-5, atol=1e-6) and np.array_equal(answer[5], answer[0])
    empty = tf.SparseTensor(np.zeros((0, 2), np.int64), np.zeros(0, np.int64), [3, 4])
    assert called(layer, mode, empty).numpy().tolist() == np.zeros((3, DIM)).tolist()


def test_ids_and_weights_that_are_not_sparse_tensors_are_refused(rig: Rig) -> None:
    ids = matrix(np.random.default_rng(0), 3)
    table = hps.Table("m", 0, DIM, rig.path)
    for wrong in (tf.constant([[1]]), np.array([[1]]), None):
        with pytest.raises(TypeError, match="sp_ids: expected a SparseTensor or RaggedTensor, got "):
            hps.embedding_lookup_sparse(table, wrong)
    for wrong in (tf.constant([1.0]), [1.0], tf.ragged.constant([[1.0]])):
        with pytest.raises(TypeError, match="sp_weights: expected a SparseTensor, as sp_ids are, or None, got "):
            hps.embedding_lookup_sparse(table, ids, wrong)
    with pytest.raises(TypeError, match="sp_weights: expected a RaggedTensor, as sp_ids are, or None, got SparseTensor"):
        hps.embedding_lookup_sparse(table, tf.ragged.constant([[1]]), ids)
    words = tf.SparseTensor(ids.indices, tf.fill(ids.values.shape, "a"), ids.dense_shape)
    with pytest.raises(TypeError, match="sp_weights: expected numbers, got string"):
        hps.embedding_lookup_sparse(table, ids, words)
    with pytest.raises(KeyDtypeError, match=r"sp_ids: expected one of .*, got string"):
        hps.embedding_lookup_sparse(table, words)


@pytest.mark.parametrize("mode", MODES)
def test_indices_of_weights_must_be_those_of_ids(rig: Rig, mode: str) -> None:
    ids = tf.SparseTensor([[0, 0], [1, 0]], tf.constant([1, 2], tf.int64), [2, 2])
    same = tf.SparseTensor(tf.identity(ids.indices), [1.0, 2.0], [2, 2])
    other = tf.SparseTensor([[0, 0], [1, 1]], [1.0, 2.0], [2, 2])
    call = tf.function(sparse(rig)) if mode == "function" else sparse(rig)
    assert np.allclose(call(ids, same, combiner="sum"), [rig.rows[1], 2 * rig.rows[2]])
    with pytest.raises((ConfigError, tf.errors.InvalidArgumentError), match="expected the indices of sp_ids, got others"):
        call(ids, other, combiner="sum")
    with pytest.raises(ValueError, match="incompatible"):
        sparse(rig)(ids, tf.SparseTensor([[0, 0], [1, 0]], [1.0, 2.0], [3, 2]))


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_gradients_of_weights_are_those_of_tensorflow(rig: Rig, combiner: str, max_norm: Any) -> None:
    random = np.random.default_rng(5)
    ids = matrix(random, 9)
    for dtype in (tf.float32, tf.float64):
        values = tf.Variable(random.uniform(0.5, 2, ids.values.shape[0]), dtype=dtype)
        toward = tf.constant(random.normal(size=(9, DIM)), tf.float32)
        gradients = []
        for lookup in (
            lambda sp: sparse(rig)(ids, sp, combiner=combiner, max_norm=max_norm),
            lambda sp: tf.nn.embedding_lookup_sparse(tf.constant(rig.rows), ids, sp, combiner=combiner, max_norm=max_norm),
        ):
            with tf.GradientTape() as tape:
                weights = tf.SparseTensor(ids.indices, tf.cast(values, tf.float32), ids.dense_shape)
                loss = tf.reduce_sum(lookup(weights) * toward)
            gradients.append(tape.gradient(loss, values))
        assert gradients[0].dtype == dtype and np.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_double_weights(rig: Rig) -> None:
    random = np.random.default_rng(6)
    ids = matrix(random, 4)
    values = tf.Variable(random.uniform(0.5, 2, ids.values.shape[0]), dtype=tf.float64)
    with tf.GradientTape() as tape:
        weights = tf.SparseTensor(ids.indices, tf.convert_to_tensor(values), ids.dense_shape)
        loss = tf.reduce_sum(sparse(rig)(ids, weights, combiner="sum"))
    gradient = tape.gradient(loss, values)
    assert gradient.dtype == tf.float64
    assert np.allclose(gradient, rig.rows[ids.values.numpy()].sum(1), rtol=1e-4, atol=1e-5)


# -- many tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_collection_asks_for_all_tables_at_once(rig: Rig, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hps_numba.frontends.tensorflow import operator

    calls: list[bytes] = []
    asked = operator.answer
    monkeypatch.setattr(operator, "answer", lambda text, arrays: [calls.append(text), asked(text, arrays)][1])
    layer = hps.LookupCollection("m", {"a": (0, DIM), "b": ("t1", 3), "c": (0, DIM), "d": (1, 3)}, ps_config_file=rig.path)
    ids = {
        "b": tf.constant([[1, 2]], tf.int64),
        "a": tf.constant([5], tf.int32),
        "c": tf.ragged.constant([[1], [2, 3]], dtype=tf.int64),
        "d": tf.sparse.from_dense(tf.constant([[4, 6], [8, 0]], tf.int64)),
    }
    rows = called(layer, mode, ids)
    assert (len(calls) == 1 and list(rows) == ["b", "a", "c", "d"]) or mode == "function"
    assert np.array_equal(rows["a"], rig.rows[[5]]) and np.array_equal(rows["b"], rig.narrow[[[1, 2]]])
    assert np.array_equal(rows["c"].flat_values, rig.rows[[1, 2, 3]])
    assert np.allclose(rows["d"], [rig.narrow[[4, 6]].mean(0), rig.narrow[8]], rtol=1e-5)
    assert layer({}) == {}
    with pytest.raises(ConfigError, match="ids: expected features of a, b, c, d, got x"):
        layer({"x": tf.constant([1])})
    with pytest.raises(ConfigError, match=r"tables: expected .*, got none"):
        hps.LookupCollection("m", {})


def test_tables_of_two_configs_are_not_asked_at_once(rig: Rig) -> None:
    ids = tf.constant([1], tf.int64)
    tables = [hps.Table("m", 0, DIM, rig.path), hps.Table("m", 0, DIM, rig.config)]
    with pytest.raises(ConfigError, match="lookups: expected tables of one ps_config_file, got several"):
        hps.embedding_lookup_many([(table, ids) for table in tables])


# -- errors and threads ----------------------------------------------------------------------------------------


def bad_layers(rig: Rig) -> list[tuple[Any, type[HpsError], str]]:
    make = hps.LookupLayer
    return [
        (make("x", 0, DIM, ps_config_file=rig.path), UnknownModelError, "'x' is not deployed, deployed are m"),
        (make("m", 2, DIM, ps_config_file=rig.path), UnknownModelError, "no table 2"),
        (make("m", -1, DIM, ps_config_file=rig.path), UnknownModelError, "table_id"),
        (make("m", 0, 7, ps_config_file=rig.path), ConfigError, "emb_vec_size: expected 8, as rows of .* have, got 7"),
        (make("m", 0, DIM, ps_config_file="nothing.json"), ConfigError, "nothing.json"),
        (make("m", 0, DIM, ps_config_file=rig.path, global_batch_size=65), ConfigError, "global_batch_size: 65"),
    ]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_errors_are_raised_by_the_call(rig: Rig, mode: str, number: int) -> None:
    layer, error, match = bad_layers(rig)[number]
    with pytest.raises(error if mode == "eager" else tf.errors.OpError, match=match):
        called(layer, mode, tf.constant([1], tf.int64))


def test_more_ids_than_announced(rig: Rig) -> None:
    ids = np.random.default_rng(0).integers(0, ROWS, 64 * 4 * 10)
    assert np.array_equal(tf.function(dense(rig))(tf.constant(ids)), rig.rows[ids])


def test_a_config_that_is_neither_path_nor_dict() -> None:
    with pytest.raises(ConfigError, match="ps_config_file: expected a path or a dict, got int"):
        hps.LookupLayer("m", 0, DIM, ps_config_file=5)


@pytest.mark.parametrize("mode", MODES)
def test_many_threads_share_a_layer(rig: Rig, mode: str) -> None:
    layer = dense(rig)
    call = tf.function(layer, reduce_retracing=True) if mode == "function" else layer
    problems: list[Any] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            ids = random.integers(0, ROWS, random.integers(1, 200))
            if not np.array_equal(call(tf.constant(ids)), rig.rows[ids]):
                problems.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not problems


def test_rows_are_not_baked_into_a_graph(rig: Rig) -> None:
    layer, ids = dense(rig), tf.constant([3], tf.int64)
    call = tf.function(lambda: layer(ids))
    assert np.array_equal(call(), rig.rows[[3]])
    SERVERS.open(rig.path).update([3], np.ones((1, DIM)), "m", 0)
    assert (call().numpy() == 1).all()


@pytest.mark.parametrize("stream", [True, False])
def test_the_stream_setting_of_hugectr_changes_nothing(tmp_path: Path, stream: bool) -> None:
    rig = rig_of(tmp_path, use_context_stream=stream)
    assert np.array_equal(dense(rig)(tf.constant([1], tf.int64)), rig.rows[[1]])
    SERVERS.close()
