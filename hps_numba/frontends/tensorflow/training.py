"""Train rows from TensorFlow: lookups with a gradient, and optimizers that apply it.

A lookup that trains takes ``switch`` besides, a number that is 0 and that a tape watches. The gradient of rows goes to Python
by the same kind of op as the lookup, under a token of its own; that gives the 0 that is the gradient of ``switch``, so that no
graph leaves it out.

::

    layer = hps.LookupLayer("model", 0, 16, ps_config_file="ps_config.json", train_rows=True, initializer="normal")
    model = keras.Sequential([keras.Input([3], dtype="int64"), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    rows = hps.Adagrad(model, lr=0.05)
    model.fit(ids, labels, callbacks=[rows.callback()])    # or rows.step() after each batch of a loop of one's own
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from hps_numba.arrays.host import as_keys
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import tables_of
from hps_numba.frontends._row_publishing import RowPublisher
from hps_numba.frontends._row_training import GradientAccumulator, RowOptimizer, accumulator_of
from hps_numba.frontends.tensorflow.keras_version import keras
from hps_numba.frontends.tensorflow.lookup import Table, as_sparse, checked_ids, clipped, embedding_lookup
from hps_numba.frontends.tensorflow.operator import python_op
from hps_numba.training import trainer
from hps_numba.training.checkpoints import load_trained, save_trained
from hps_numba.training.initializers import Initializer, Normal, Uniform, Zeros, as_initializer
from hps_numba.updates import UpdateProducer

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "config_of_initializer",
    "initializer_of",
    "load_checkpoint",
    "named",
    "publish_rows",
    "save_checkpoint",
    "table_rows",
    "trained_lookup",
    "trained_lookup_sparse",
]

_initializers: dict[str, Initializer] = {}


def named(initializer: Initializer | None) -> str:
    """A text for an initializer, by which the ops of this process find it; empty for None."""
    if initializer is None:
        return ""
    _initializers[repr(initializer)] = initializer
    return repr(initializer)


_CLASSES = {kind.__name__: kind for kind in (Normal, Uniform, Zeros)}


def initializer_of(given: Any) -> Initializer | None:
    """What a user or a saved config gave.

    Raises:
        ConfigError: it is not an initializer.
    """
    if isinstance(given, Mapping):
        kind: Any = given.get("class")
        try:
            made: Initializer = _CLASSES[kind](**{name: value for name, value in given.items() if name != "class"})
        except (TypeError, LookupError) as problem:
            raise ConfigError(f"initializer: expected what get_config returned, got {show(dict(given))}") from problem
        return made
    return as_initializer(given)


def config_of_initializer(initializer: Initializer | None) -> dict[str, Any] | None:
    """What a saved config keeps of an initializer.

    Raises:
        ConfigError: it is a function, of which nothing can be kept.
    """
    if initializer is None:
        return None
    if type(initializer).__name__ not in _CLASSES:
        raise ConfigError(f"initializer: {initializer!r} cannot be saved with a model, one of {', '.join(_CLASSES)} can")
    return {"class": type(initializer).__name__, **vars(initializer)}


def _create(request: Any, initializer: Any, keys: Any) -> np.ndarray:
    ((server, query),) = tables_of(bytes(request))
    flat = as_keys(keys, key_bits=server.direct.key_bits).flat
    trainer.create_rows(server, query.model, query.table, flat, _initializers[bytes(initializer).decode()])
    return np.asarray(keys)


def _note(request: Any, keys: Any, gradients: Any) -> np.ndarray:
    ((server, query),) = tables_of(bytes(request))
    accumulator_of(server, query.model, query.table).add(np.asarray(keys), np.asarray(gradients))
    return np.zeros((), np.float32)


_create_op = python_op("hps_numba.create_rows.1", _create)
_note_op = python_op("hps_numba.note_gradient.1", _note)


def table_rows(table: Table, initializer: Initializer | None = None) -> GradientAccumulator:
    """The accumulated gradients of a table; builds its server if this process has none.

    Raises:
        As ``HPS``.   ConfigError: another layer gave the table another initializer.
    """
    ((server, query),) = tables_of(table.query(table.rows).encoded)
    rows = accumulator_of(server, query.model, query.table)
    if initializer is not None:
        if rows.initializer not in (None, initializer):
            expected = f"{rows.initializer!r}, as another layer of the table has"
            raise ConfigError(f"initializer: expected {expected}, got {initializer!r}")
        rows.initializer = initializer
    return rows


@tf.autograph.experimental.do_not_convert
def trained_lookup(table: Table, ids: Any, switch: Any, initializer: str = "") -> Any:
    """``embedding_lookup`` whose gradient is accumulated for an optimizer.

    Args:
        ids: a tensor, or a RaggedTensor.   switch: float32 scalar, 0, that a tape watches.
        initializer: ``named``; ids without a row get one from it first. Empty: they get the table's default value.
    """
    if isinstance(ids, tf.RaggedTensor):
        return ids.with_flat_values(trained_lookup(table, ids.flat_values, switch, initializer))
    ids = checked_ids(tf.convert_to_tensor(ids), "ids")
    request = tf.constant(table.query(table.rows).encoded, tf.string)
    if initializer:
        shape = ids.shape
        ids = _create_op([request, tf.constant(initializer, tf.string), ids], ids.dtype)
        ids.set_shape(shape)

    @tf.custom_gradient
    def looked(switch: Any) -> tuple[Any, Any]:
        def gradient(upstream: Any) -> Any:
            zero = _note_op([request, ids, tf.convert_to_tensor(upstream)], tf.float32)
            zero.set_shape([])
            return zero

        return embedding_lookup(table, ids), gradient

    return looked(tf.convert_to_tensor(switch))


@tf.autograph.experimental.do_not_convert
def trained_lookup_sparse(
    table: Table,
    sp_ids: Any,
    sp_weights: Any,
    combiner: str | None,
    max_norm: Any,
    default_id: int | None,
    switch: Any,
    initializer: str = "",
) -> Any:
    """``embedding_lookup_sparse`` whose gradient is accumulated: rows are looked up one by one, and combined by TensorFlow.

    Raises:
        As ``embedding_lookup_sparse``.
    """
    sp_ids, sp_weights, combiner = as_sparse(sp_ids, sp_weights, combiner)
    weights = tf.ones_like(sp_ids.values, tf.float32) if sp_weights is None else tf.cast(sp_weights.values, tf.float32)
    if default_id is not None:
        sp_weights = tf.sparse.fill_empty_rows(tf.SparseTensor(sp_ids.indices, weights, sp_ids.dense_shape), 1.0)[0]
        sp_ids, weights = tf.sparse.fill_empty_rows(sp_ids, tf.cast(default_id, sp_ids.dtype))[0], sp_weights.values
    rows = clipped(trained_lookup(table, sp_ids.values, switch, initializer), max_norm)
    bags, count = sp_ids.indices[:, 0], sp_ids.dense_shape[0]
    total = tf.math.unsorted_segment_sum(rows * weights[:, None], bags, count)
    total.set_shape([sp_ids.shape[0], table.emb_vec_size])
    if combiner == "sum":
        return total
    squares = tf.math.unsorted_segment_sum(weights if combiner == "mean" else weights * weights, bags, count)
    return tf.math.divide_no_nan(total, (squares if combiner == "mean" else tf.sqrt(squares))[:, None])


# -- optimizers ---------------------------------------------------------------------


def _tables_in(layers: Any) -> Iterator[GradientAccumulator]:
    if isinstance(layers, keras.layers.Layer):
        own = getattr(layers, "trained_tables", None)
        if own is not None:
            yield from own()
        for layer in layers._flatten_layers(include_self=False, recursive=False):
            yield from _tables_in(layer)
    elif isinstance(layers, (list, tuple, set, frozenset)) or (
        isinstance(layers, Iterable) and not isinstance(layers, (str, bytes, Mapping, np.ndarray))
    ):
        for layer in layers:
            yield from _tables_in(layer)
    else:
        raise ConfigError(f"layers: expected Keras layers or models, got {type(layers).__name__}")


class _Optimizer(RowOptimizer):
    def __init__(self, layers: Any, rule: Any, **settings: float) -> None:
        super().__init__(list({id(rows): rows for rows in _tables_in(layers)}.values()), rule, **settings)

    def callback(self) -> Any:
        """A Keras callback that makes a step after each batch of ``fit`` (each execution, if those have several batches)."""
        return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: self.step())


class SGD(_Optimizer):
    """``row -= lr * gradient``, for the trained tables of layers or models."""

    def __init__(self, layers: Any, lr: float = 0.01) -> None:
        super().__init__(layers, trainer.Sgd, lr=lr)


class Adagrad(_Optimizer):
    """Row-wise Adagrad: one number is kept a row, the sum of the mean squares of its gradients."""

    def __init__(self, layers: Any, lr: float = 0.01, *, eps: float = 1e-10, initial_accumulator_value: float = 0.0) -> None:
        super().__init__(layers, trainer.Adagrad, lr=lr, eps=eps, initial_accumulator_value=initial_accumulator_value)


class Adam(_Optimizer):
    """Lazy Adam: only rows that have a gradient move, and only their moments are updated."""

    def __init__(self, layers: Any, lr: float = 0.001, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__(layers, trainer.Adam, lr=lr, beta1=beta1, beta2=beta2, eps=eps)


def _checked(optimizer: Any) -> RowOptimizer:
    if not isinstance(optimizer, RowOptimizer):
        raise ConfigError(f"optimizer: expected one of hps_numba.frontends.tensorflow, got {type(optimizer).__name__}")
    return optimizer


def publish_rows(
    optimizer: RowOptimizer, bus: Mapping[str, Any] | UpdateProducer, *, interval_ms: float = 100.0, version: int | None = None
) -> RowPublisher:
    """Publish the rows that an optimizer changes to a bus of online updates, until the answer is closed.

    Args:
        bus: ``type`` and the keys of a producer (``hps_numba.updates.open_producer``), or a producer.
        interval_ms: between two times of publishing; a row is sent once however many steps changed it meanwhile.
        version: of the model that the rows are of, or None.

    Raises:
        ConfigError: an argument is not as above.   TierUnavailable: the bus is not there.
    """
    return RowPublisher(_checked(optimizer).trainers, bus, interval_ms=interval_ms, version=version)


def save_checkpoint(path: str | os.PathLike[str], optimizer: RowOptimizer) -> int:
    """Write the rows of an optimizer's tables, and its state, to one file, atomically; returns the number of rows.

    Raises:
        ModelFileError: it cannot be written, or there is something else than a checkpoint at ``path``.
        Otherwise as ``HPS.locked_table``.
    """
    return save_trained(path, _checked(optimizer).trainers)


def load_checkpoint(path: str | os.PathLike[str], optimizer: RowOptimizer) -> None:
    """Restore tables and optimizer from a checkpoint; rows that are not in it are erased, gradients are dropped.

    Raises:
        ModelFileError: the file is missing or damaged.   ConfigError: it is that of other tables or of another optimizer.
        Otherwise as ``HPS.insert``. Nothing changed then, nor after an interrupt: rows that were written are taken back.
    """
    load_trained(path, _checked(optimizer).trainers, then=lambda _: optimizer.zero_grad())
