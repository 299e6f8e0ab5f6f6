"""Every argument of the lookups, beside the function of TensorFlow that has it: the same rows, or an error of the same class.

Cases in which this package differs on purpose are listed by name, with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from support.framework_rig import DIM, ROWS, Rig, rig_of, tensorflow

from hps_numba import KeyDtypeError
from hps_numba.server.registry import SERVERS

tf, keras, hps = tensorflow()

STRICTER = {
    "sparse-max_norm nan": "TensorFlow gives NaN",
    "sparse-complex weights": "TensorFlow drops the imaginary part",
    "sparse-weights of another dense shape": "weights must have the indices and the shape of the ids",
    "ragged-weights of other row lengths": "weights must have the indices of the ids",
}
OTHER = {"dense-ragged ids int8": KeyDtypeError}  # a TypeError, as for ids that are not ragged
MORE = {
    "dense-ids uint32": "keys of 32-bit models",
    "dense-ids uint64": "64-bit keys",
    "dense-ragged ids uint32": "keys of 32-bit models",
    "sparse-ids uint32": "keys of 32-bit models",
    "sparse-ids uint64": "64-bit keys",
    "sparse-ids int16": "TensorFlow takes them only with weights",
    "sparse-without weights": "weights are optional",
}


class Case(NamedTuple):
    """Arguments behind the table, made when the test runs."""

    name: str
    arguments: Callable[[], dict[str, Any]]


INDICES = [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0], [3, 0], [3, 3]]
IDS = [5, 7, 5, 199, 0, 42, 42, 3]
LENGTHS = [2, 3, 1, 2]
WEIGHTS = [0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 1.0, 0.75]


def sparse_of(values: Any, dtype: Any = None, indices: Any = INDICES, shape: Any = (4, 4)) -> Any:
    return tf.SparseTensor(tf.constant(indices, tf.int64), tf.cast(tf.constant(values), dtype or tf.int64), shape)


def ragged_of(values: Any, dtype: Any = None, lengths: Any = LENGTHS) -> Any:
    return tf.RaggedTensor.from_row_lengths(tf.cast(tf.constant(values), dtype or tf.int64), lengths)


def both(**more: Any) -> dict[str, Any]:
    return {"sp_ids": sparse_of(IDS), "sp_weights": None, **more}


def numeric(name: str) -> Any:
    return tf.as_dtype(name)


NORMS = {
    "none": lambda: None,
    "0": lambda: 0,
    "0.1": lambda: 0.1,
    "10": lambda: 10.0,
    "-1": lambda: -1.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "NumPy's": lambda: np.float64(0.5),
    "True": lambda: True,
    "int tensor": lambda: tf.constant(1),
    "double tensor": lambda: tf.constant(0.5, tf.float64),
    "variable": lambda: tf.Variable(0.5),
    "array of one": lambda: np.array([0.5], np.float32),
    "text": lambda: "x",
    "two": lambda: [1.0, 2.0],
}


def dense_cases() -> Iterator[Case]:
    some = [[5, 7, 5], [199, 0, 42]]
    for name, make in NORMS.items():
        yield Case(f"max_norm {name}", lambda make=make: {"ids": tf.constant(some), "max_norm": make()})
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "float64", "bool"):
        yield Case(f"ids {name}", lambda name=name: {"ids": tf.cast([[0, 1], [1, 0]], name)})
    for name, value in {
        "list": [1, 2],
        "list of lists": some,
        "scalar": 3,
        "array": np.array(some),
        "array of int32": np.array(some, np.int32),
        "array of float64": np.array([1.0]),
        "floats": [1.0],
        "empty list": [],
        "ragged list": [[1, 2], [3]],
        "None": None,
        "text": "a",
        "texts": ["a", "b"],
        "booleans": [True],
        "no rows": np.empty((2, 0, 3), np.int64),
    }.items():
        yield Case(f"ids as {name}", lambda value=value: {"ids": value})
    yield Case("ids as a variable", lambda: {"ids": tf.Variable([1, 2])})
    yield Case("ids as a SparseTensor", lambda: {"ids": sparse_of(IDS)})
    for name in ("int32", "int64", "uint32", "int8"):
        yield Case(
            f"ragged ids {name}", lambda name=name: {"ids": ragged_of(np.array(IDS) % 100, numeric(name)), "max_norm": 0.5}
        )
    yield Case("name", lambda: {"ids": [1, 2], "name": "rows"})
    yield Case("an unknown argument", lambda: {"ids": [1, 2], "norm": 1.0})


def combined(kind: str) -> Iterator[Case]:
    """Combiners, norms and types of weights together."""
    make = {"sparse": sparse_of, "ragged": ragged_of}[kind]
    weights = [None, "float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8", "bool"]
    for combiner, dtype in itertools.product(("sum", "mean", "sqrtn", None), weights):
        for norm in ("none", "0.1") if dtype in (None, "float32") else ("none",):
            yield Case(
                f"{combiner}, weights {dtype}, max_norm {norm}",
                lambda combiner=combiner, dtype=dtype, norm=norm: {
                    "sp_ids": make(IDS),
                    "sp_weights": None if dtype is None else make(WEIGHTS, numeric(dtype)),
                    "combiner": combiner,
                    "max_norm": NORMS[norm](),
                },
            )


def sparse_cases() -> Iterator[Case]:
    yield from combined("sparse")
    for name, make in NORMS.items():
        yield Case(f"max_norm {name}", lambda make=make: both(max_norm=make()))
    for combiner in ("max", "SUM", "", 5, b"sum", ["sum"]):
        yield Case(f"combiner {combiner!r}", lambda combiner=combiner: both(combiner=combiner))
    for name in ("int8", "int16", "int32", "uint8", "uint32", "uint64", "float32", "bool"):
        yield Case(
            f"ids {name}", lambda name=name: {"sp_ids": sparse_of(np.array(IDS) % 100, numeric(name)), "sp_weights": None}
        )
    yield Case(
        "ids int16 with weights", lambda: {"sp_ids": sparse_of(IDS, tf.int16), "sp_weights": sparse_of(WEIGHTS, tf.float32)}
    )
    yield Case("complex weights", lambda: both(sp_weights=sparse_of(WEIGHTS, tf.complex64)))
    yield Case(
        "texts as weights",
        lambda: both(sp_weights=tf.SparseTensor(INDICES, tf.fill([8], "a"), (4, 4))),
    )
    yield Case("without weights", lambda: {"sp_ids": sparse_of(IDS)})
    for name, value in {"a tensor": [[1, 2]], "None": None, "an array": np.array([[1, 2]])}.items():
        yield Case(f"ids as {name}", lambda value=value: both(sp_ids=value))
    yield Case("weights as a tensor", lambda: both(sp_weights=tf.ones([4, 4])))
    yield Case("ragged weights", lambda: both(sp_weights=ragged_of(WEIGHTS, tf.float32)))
    yield Case("fewer weights", lambda: both(sp_weights=sparse_of(WEIGHTS[:7], tf.float32, INDICES[:7])))
    yield Case("weights of another dense shape", lambda: both(sp_weights=sparse_of(WEIGHTS, tf.float32, shape=(5, 4))))
    yield Case("rank 1", lambda: both(sp_ids=sparse_of([1, 2], indices=[[0], [2]], shape=(3,)), combiner="sum"))
    yield Case(
        "rank 3",
        lambda: both(sp_ids=sparse_of([1, 2, 3], indices=[[0, 0, 1], [0, 1, 0], [1, 0, 0]], shape=(2, 2, 2)), combiner="sum"),
    )
    yield Case("rows out of order", lambda: both(sp_ids=sparse_of([1, 2], indices=[[1, 0], [0, 0]], shape=(2, 2))))
    yield Case("columns out of order", lambda: both(sp_ids=sparse_of([1, 2], indices=[[0, 1], [0, 0]], shape=(1, 2))))
    yield Case("an index twice", lambda: both(sp_ids=sparse_of([1, 2], indices=[[0, 1], [0, 1]], shape=(1, 2)), combiner="sum"))
    yield Case(
        "rows without ids", lambda: both(sp_ids=sparse_of([1, 2], indices=[[1, 0], [3, 0]], shape=(6, 2)), combiner="sum")
    )
    yield Case("name and allow_fast_lookup", lambda: both(name="rows", allow_fast_lookup=True))
    yield Case("an unknown argument", lambda: both(norm=1.0))


def ragged_cases() -> Iterator[Case]:
    yield from combined("ragged")
    ids = {"sp_ids": ragged_of(IDS), "combiner": "sum"}
    yield Case("sparse weights", lambda: {**ids, "sp_weights": sparse_of(WEIGHTS, tf.float32)})
    yield Case("weights as a tensor", lambda: {**ids, "sp_weights": tf.ones([8])})
    yield Case("fewer weights", lambda: {**ids, "sp_weights": ragged_of(WEIGHTS[:7], tf.float32, [2, 3, 1, 1])})
    yield Case("weights of other row lengths", lambda: {**ids, "sp_weights": ragged_of(WEIGHTS, tf.float32, [3, 2, 1, 2])})
    yield Case("rows without ids", lambda: {"sp_ids": ragged_of([1, 2, 3], lengths=[0, 2, 0, 1, 0]), "sp_weights": None})
    yield Case("no ids", lambda: {"sp_ids": ragged_of(np.empty(0, np.int64), lengths=[0, 0]), "sp_weights": None})
    yield Case("no rows", lambda: {"sp_ids": ragged_of(np.empty(0, np.int64), lengths=[]), "sp_weights": None})
    deep = lambda: tf.ragged.constant([[[1, 2], [3]], [[4]]], dtype=tf.int64)  # noqa: E731
    yield Case("rank 3", lambda: {"sp_ids": deep(), "sp_weights": None})
    inner = lambda: tf.RaggedTensor.from_row_splits(tf.constant([[1, 2], [3, 4]], tf.int64), [0, 2])  # noqa: E731
    yield Case("rows of equal length inside", lambda: {"sp_ids": inner(), "sp_weights": None})
    for name in ("int8", "int32", "float32"):
        yield Case(
            f"ids {name}", lambda name=name: {"sp_ids": ragged_of(np.array(IDS) % 100, numeric(name)), "sp_weights": None}
        )
    yield Case(
        "row splits of int32 and int64",
        lambda: {
            "sp_ids": ragged_of(IDS).with_row_splits_dtype(tf.int32),
            "sp_weights": ragged_of(WEIGHTS, tf.float32),
            "combiner": "sqrtn",
        },
    )
    uniform = lambda: tf.RaggedTensor.from_uniform_row_length(tf.constant([1, 2, 3, 4], tf.int64), 2)  # noqa: E731
    yield Case("rows of one length", lambda: {"sp_ids": uniform(), "sp_weights": None, "combiner": "mean"})
    yield Case("text as max_norm", lambda: {**ids, "sp_weights": None, "max_norm": "x"})


KINDS = {"dense": dense_cases, "sparse": sparse_cases, "ragged": ragged_cases}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield rig_of(tmp_path)
    SERVERS.close()


def outcome(call: Callable[..., Any], *first: Any, **arguments: Any) -> Any:
    """What a call returned, or the exception that it raised."""
    try:
        return call(*first, **arguments)
    except Exception as problem:
        return problem


def assert_same(name: str, got: Any, wanted: Any, graph: bool) -> None:
    if name in MORE:
        assert not isinstance(got, Exception) and isinstance(wanted, Exception)
    elif name in OTHER:
        assert isinstance(got, OTHER[name]) and isinstance(wanted, ValueError)
    elif name in STRICTER or isinstance(wanted, Exception):
        assert (name in STRICTER) != isinstance(wanted, Exception)
        expected = type(wanted) if isinstance(wanted, (TypeError, ValueError)) else (TypeError, ValueError)
        also = tf.errors.InvalidArgumentError if graph else type(wanted)
        assert isinstance(got, (expected, also)), repr(got)
    else:
        assert not isinstance(got, Exception), repr(got)
        assert isinstance(got, tf.RaggedTensor) == isinstance(wanted, tf.RaggedTensor) and got.dtype == wanted.dtype
        if isinstance(wanted, tf.RaggedTensor):
            assert np.array_equal(got.row_splits, wanted.row_splits)
            got, wanted = got.flat_values, wanted.flat_values
        rows = np.zeros_like(got)
        rows[: len(wanted)] = wanted  # TensorFlow leaves out the last rows without ids, which are 0
        np.testing.assert_allclose(got, rows, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_each_argument_does_what_it_does_in_tensorflow(rig: Rig, kind: str) -> None:
    names = [f"{kind}-{case.name}" for case in KINDS[kind]()]
    assert len(set(names)) == len(names)
    assert {name for name in {**STRICTER, **OTHER, **MORE} if name.startswith(f"{kind}-")} <= set(names)
    table, params = hps.Table("m", 0, DIM, rig.path), tf.constant(rig.rows)
    own, theirs = {
        "dense": (hps.embedding_lookup, tf.nn.embedding_lookup),
    }.get(kind, (hps.embedding_lookup_sparse, tf.nn.embedding_lookup_sparse))
    layer = {"dense": hps.LookupLayer}.get(kind, hps.SparseLookupLayer)("m", 0, DIM, ps_config_file=rig.path)
    wrong = []
    for case in KINDS[kind]():
        name = f"{kind}-{case.name}"
        wanted = outcome(theirs, params, **case.arguments())
        calls = [lambda **more: own(table, **more)]
        if not {"name", "allow_fast_lookup"} & set(case.arguments()):
            calls += [lambda **more: tf.function(lambda: own(table, **more), autograph=False)(), layer.call]
        for number, call in enumerate(calls):
            got = outcome(call, **case.arguments())
            try:
                assert_same(name, got, wanted, number == 1)
            except AssertionError as problem:
                wrong.append(f"{name}, call {number}: wanted {wanted!r:.200}, {problem}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("combiner", ["sum", "mean", "sqrtn"])
def test_rows_that_train_take_the_same_arguments(rig: Rig, combiner: str) -> None:
    """Forward, and the gradient of weights, of ragged and sparse ids; rows as ``tf.keras.layers.Embedding`` gives them."""
    layer = hps.SparseLookupLayer("m", 0, DIM, ps_config_file=rig.path, train_rows=True)
    for make in (sparse_of, ragged_of):
        found = []
        for lookup in (
            lambda ids, weights: layer(ids, weights, combiner=combiner, max_norm=2.0, training=True),
            lambda ids, weights: hps.embedding_lookup_sparse(layer.table, ids, weights, combiner, 2.0),
            lambda ids, weights: tf.nn.embedding_lookup_sparse(tf.constant(rig.rows), ids, weights, combiner, 2.0),
        ):
            values = tf.Variable(WEIGHTS)
            with tf.GradientTape() as tape:
                ids = make(IDS)
                weights = ids.with_flat_values(values) if make is ragged_of else ids.with_values(values)
                loss = tf.reduce_sum(lookup(ids, weights) ** 2)
            found.append((loss, tape.gradient(loss, values)))
        for got in found[:2]:
            np.testing.assert_allclose(got[0], found[2][0], rtol=1e-4)
            np.testing.assert_allclose(got[1], found[2][1], rtol=1e-3, atol=1e-4)
    dense = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, train_rows=True)
    embedding = keras.layers.Embedding(ROWS, DIM)
    embedding.build([None])
    embedding.set_weights([rig.rows])
    for ids in (tf.constant([[1, 2], [3, 3]]), tf.constant([5], tf.int64), np.array([[7]]), tf.constant([1], tf.int16)):
        assert np.array_equal(dense(ids, training=True), embedding(ids)) and np.array_equal(dense(ids), embedding(ids))
    layer.trained_tables()[0].take()


def test_positions_of_the_original_layers(rig: Rig) -> None:
    ids, weights = sparse_of(IDS), sparse_of(WEIGHTS, tf.float32)
    pooled = hps.SparseLookupLayer("m", 0, DIM, tf.float32, rig.path, 1)
    by_name = pooled(sp_ids=ids, sp_weights=weights, name=None, combiner="sqrtn", max_norm=0.5)
    assert np.array_equal(pooled(ids, weights, "ignored", "sqrtn", 0.5), by_name)
    inputs = [keras.Input([4], dtype="int64", sparse=True), keras.Input([4], sparse=True)]
    model = keras.Model(inputs, pooled(*inputs, None, "sqrtn", 0.5))
    assert np.array_equal(model([ids, weights]), by_name)
    rows = hps.LookupLayer("m", 0, DIM, tf.float32, rig.path, 1)
    assert np.array_equal(rows(tf.constant([1, 2]), 0.5), rows(ids=tf.constant([1, 2]), max_norm=0.5))


def test_ragged_ids_keep_the_static_number_of_rows(rig: Rig) -> None:
    shapes = []

    @tf.function(input_signature=[tf.RaggedTensorSpec([3, None], tf.int64), tf.RaggedTensorSpec([None, None], tf.int64)])
    def trace(some: Any, any_number: Any) -> None:
        table = hps.Table("m", 0, DIM, rig.path)
        shapes.extend(hps.embedding_lookup_sparse(table, ids).shape.as_list() for ids in (some, any_number))

    trace.get_concrete_function()
    assert shapes == [[3, DIM], [None, DIM]]


def test_default_id_and_ragged_ids(rig: Rig) -> None:
    ids = ragged_of([1, 2, 3], lengths=[0, 2, 0, 1])
    wanted = tf.nn.safe_embedding_lookup_sparse(tf.constant(rig.rows), ids, combiner="mean", default_id=4)
    table = hps.Table("m", 0, DIM, rig.path)
    np.testing.assert_allclose(hps.embedding_lookup_sparse(table, ids, default_id=4), wanted, rtol=1e-5)
