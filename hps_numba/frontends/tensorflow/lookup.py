"""Lookups as functions, like ``tf.nn.embedding_lookup`` and ``tf.nn.embedding_lookup_sparse``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import tensorflow as tf

from hps_numba.arrays.bags import COMBINERS as ALL_COMBINERS
from hps_numba.config.arguments import as_count
from hps_numba.errors import ConfigError, KeyDtypeError
from hps_numba.frontends._queries import Query, TableQuery
from hps_numba.frontends.tensorflow.initialize import replica_count
from hps_numba.frontends.tensorflow.keras_version import explain_symbolic
from hps_numba.frontends.tensorflow.operator import lookup_op
from hps_numba.server.registry import Config, config_of

__all__ = [
    "COMBINERS",
    "ID_TYPES",
    "Table",
    "as_sparse",
    "checked_ids",
    "clipped",
    "embedding_lookup",
    "embedding_lookup_many",
    "embedding_lookup_sparse",
]

ID_TYPES = (tf.int64, tf.int32, tf.uint32, tf.uint64)  # int16 too, as TensorFlow; it is widened
COMBINERS = tuple(name for name in ALL_COMBINERS if name != "max")  # as tf.nn.embedding_lookup_sparse


@dataclass(frozen=True)
class Table:
    """One embedding table of a deployed model.

    Args:
        model_name, table_id: a table of the config, by number or name.
        emb_vec_size: elements of a row.
        ps_config_file: path or content of the config; if it is empty, the existing server is used.
        global_batch_size: as for ``Init``, if this table's lookup is what builds the server.
    """

    model_name: str
    table_id: int | str
    emb_vec_size: int
    ps_config_file: Config = ""
    global_batch_size: int = 1
    #: a row a key of this table
    rows: TableQuery = field(init=False, repr=False, compare=False)
    _queries: dict[Any, Query] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = TableQuery(self.model_name, self.table_id, self.emb_vec_size)  # checked there, once
        for name, value in (
            ("ps_config_file", config_of(self.ps_config_file)),
            ("rows", rows),
            ("table_id", rows.table),
            ("emb_vec_size", rows.dim),
            ("global_batch_size", as_count(self.global_batch_size, "global_batch_size", 1, (1 << 63) - 1)),
        ):
            object.__setattr__(self, name, value)

    def query(self, *tables: TableQuery) -> Query:
        """The request that looks up ``tables`` in this table's server; cached."""
        replicas = replica_count()
        made = self._queries.get((tables, replicas))
        if made is None:
            made = Query(self.ps_config_file, tables, self.global_batch_size, replicas)
            self._queries[tables, replicas] = made
        return made


@tf.autograph.experimental.do_not_convert
def embedding_lookup(table: Table, ids: Any, max_norm: Any = None, name: str | None = None) -> Any:
    """The row of each id.

    Args:
        ids: int64, int32, int16, uint32 or uint64 tensor of any shape ``S`` (or what converts to one), or a RaggedTensor.
        max_norm: number or scalar tensor; rows are clipped to this norm by ``tf.clip_by_norm``.
        name: accepted, as ``tf.nn.embedding_lookup`` has it, and ignored.

    Returns:
        float32 ``S + [emb_vec_size]``, ragged if ``ids`` are. An id that no tier has gets the table's default value.

    Raises:
        KeyDtypeError (a TypeError): ids of another type.   ConfigError (a ValueError): a SparseTensor.
        Otherwise as ``lookup_op``.
    """
    if isinstance(ids, tf.SparseTensor):
        raise ConfigError("ids: expected a tensor or a RaggedTensor, got a SparseTensor: SparseLookupLayer pools its rows")
    (rows,) = embedding_lookup_many([(table, ids)])
    return clipped(rows, max_norm)


@tf.autograph.experimental.do_not_convert
def embedding_lookup_many(lookups: Any) -> list[Any]:
    """``embedding_lookup`` of several tables of one server in one call of Python.

    Args:
        lookups: (table, ids) pairs; ``ids`` may also be a SparseTensor, whose rows are then pooled by their mean.

    Raises:
        ConfigError: tables of different configs.   Otherwise as ``embedding_lookup``.
    """
    if any(table.ps_config_file != lookups[0][0].ps_config_file for table, _ in lookups):
        raise ConfigError("lookups: expected tables of one ps_config_file, got several")
    try:
        pieces = [_piece(table, ids) for table, ids in lookups]
        query = lookups[0][0].query(*(one for one, _, _, _ in pieces))
        inputs = [tensor for _, tensors, _, _ in pieces for tensor in tensors]
        answers = lookup_op(query, inputs, [shape for _, _, shape, _ in pieces])
    except (TypeError, ValueError) as problem:
        explain_symbolic(problem, [ids for _, ids in lookups])
        raise
    return [answer if ragged is None else ragged.with_flat_values(answer) for answer, (_, _, _, ragged) in zip(answers, pieces)]


def _piece(table: Table, ids: Any, combiner: str | None = None) -> tuple[TableQuery, list[Any], Any, Any]:
    """``(query, inputs, static shape, ids if they are ragged)`` of one table."""
    ragged = None
    if isinstance(ids, tf.SparseTensor):
        query = replace(table.rows, combiner=combiner or "mean")
        inputs = [checked_ids(ids.values, "sp_ids"), ids.indices, ids.dense_shape[0]]
        return query, inputs, tf.TensorShape([ids.shape[0], table.emb_vec_size]), None
    if isinstance(ids, tf.RaggedTensor):
        ragged, ids = ids, ids.flat_values
    elif not tf.is_tensor(ids):
        ids = tf.convert_to_tensor(ids)
    return table.rows, [checked_ids(ids, "ids")], ids.shape.concatenate([table.emb_vec_size]), ragged


def checked_ids(ids: Any, place: str) -> Any:
    """Ids of one of ``ID_TYPES``."""
    if ids.dtype in ID_TYPES:
        return ids
    if ids.dtype == tf.int16:
        return tf.cast(ids, tf.int32)
    raise KeyDtypeError(f"{place}: expected one of {', '.join(kind.name for kind in ID_TYPES)}, got {ids.dtype.name}")


def clipped(rows: Any, max_norm: Any) -> Any:
    """Rows, ragged or not, clipped to a norm, or as they are for None."""
    if max_norm is None:
        return rows
    if isinstance(rows, tf.RaggedTensor):
        return rows.with_flat_values(clipped(rows.flat_values, max_norm))
    return tf.clip_by_norm(rows, max_norm, axes=[-1 if rows.shape.rank is None else rows.shape.rank - 1])


def as_sparse(sp_ids: Any, sp_weights: Any, combiner: str | None) -> tuple[Any, Any, str]:
    """Ids and weights as SparseTensors, and the combiner. Raises as ``embedding_lookup_sparse``."""
    combiner = "mean" if combiner is None else combiner
    if combiner not in COMBINERS:
        raise ConfigError(f"combiner: expected one of {', '.join(COMBINERS)}, got {combiner!r}")
    if not isinstance(sp_ids, (tf.SparseTensor, tf.RaggedTensor)):
        problem = TypeError(f"sp_ids: expected a SparseTensor or RaggedTensor, got {type(sp_ids).__name__}")
        explain_symbolic(problem, [sp_ids])
        raise problem
    kind = tf.RaggedTensor if isinstance(sp_ids, tf.RaggedTensor) else tf.SparseTensor
    if sp_weights is not None and not isinstance(sp_weights, kind):
        expected = f"a {kind.__name__}, as sp_ids are, or None"
        raise TypeError(f"sp_weights: expected {expected}, got {type(sp_weights).__name__}")
    if sp_weights is not None:
        dtype = sp_weights.dtype
        if not (dtype.is_floating or dtype.is_integer or dtype.is_bool):
            raise TypeError(f"sp_weights: expected numbers, got {dtype.name}")
    if kind is tf.RaggedTensor:
        if sp_weights is not None:
            sp_ids.shape.assert_is_compatible_with(sp_weights.shape)
            sp_weights = _sparse_of_ragged(sp_weights, "sp_weights")
        sp_ids = _sparse_of_ragged(sp_ids, "sp_ids")
    return sp_ids, sp_weights, combiner


def _sparse_of_ragged(ragged: Any, place: str) -> Any:
    """A ragged matrix as a SparseTensor that shares its values."""
    if ragged.ragged_rank != 1 or ragged.shape.rank not in (2, None):
        raise ConfigError(f"{place}: expected a ragged matrix (rank 2), got rank {ragged.shape.rank}")
    positions = ragged.with_flat_values(tf.zeros_like(ragged.flat_values, tf.int8)).to_sparse()
    sparse = tf.SparseTensor(positions.indices, ragged.flat_values, positions.dense_shape)
    sparse.set_shape([ragged.shape[0], None])
    return sparse


def _scalar(max_norm: Any) -> Any:
    """A norm as a float32 scalar from 0 on, as ``tf.clip_by_norm`` reads it: a negative one is 0.

    Raises:
        TypeError: it is not a number.   ConfigError: it is several.
    """
    norm = tf.convert_to_tensor(max_norm)
    if norm.dtype == tf.string:
        raise TypeError(f"max_norm: expected a number, got {max_norm!r}")
    if norm.shape.num_elements() not in (1, None):
        raise ConfigError(f"max_norm: expected a number, got an array of shape {norm.shape.as_list()}")
    return tf.maximum(tf.reshape(tf.cast(norm, tf.float32), []), 0.0)


@tf.autograph.experimental.do_not_convert
def embedding_lookup_sparse(
    table: Table,
    sp_ids: Any,
    sp_weights: Any = None,
    combiner: str | None = None,
    max_norm: Any = None,
    default_id: int | None = None,
    *,
    name: str | None = None,
    allow_fast_lookup: bool = False,
) -> Any:
    """One row for each row of a sparse matrix of ids: their rows, combined in the pass that reads them.

    Args:
        sp_ids: SparseTensor ``[N, M]`` of ids, ordered by row, or RaggedTensor ``[N, None]``.
        sp_weights: None, or numbers of the same kind of tensor, with the same indices. Gradients flow to it.
        combiner: ``sum``; ``mean`` (also for None), over the sum of weights; ``sqrtn``, over the root of the sum of their
            squares; 0 where the divisor is 0.
        max_norm: number or scalar tensor; rows are clipped to this norm before they are weighted.
        default_id: the id that rows without ids are taken to have, with weight 1; by default such rows are 0.
        name, allow_fast_lookup: accepted, as ``tf.nn.embedding_lookup_sparse`` has them, and ignored.

    Returns:
        float32 ``[N, emb_vec_size]``.

    Raises:
        TypeError: ids are neither a SparseTensor nor a RaggedTensor, or weights are of another kind.
        ValueError: an unknown combiner, or static shapes that differ.
        ConfigError (a ValueError): other indices of weights, ids not ordered by row, ragged ids of another rank than 2.
        Otherwise as ``lookup_op``.
    """
    sp_ids, sp_weights, combiner = as_sparse(sp_ids, sp_weights, combiner)
    query, inputs, shape, _ = _piece(table, sp_ids, combiner)
    query = replace(query, default_id=default_id)
    if max_norm is not None:
        max_norm = _scalar(max_norm)
        query = replace(query, clipped=True)
    norm = [] if max_norm is None else [max_norm]
    if sp_weights is None:
        (rows,) = lookup_op(table.query(query), [*inputs, *norm], [shape])
        return rows
    sp_ids.shape.assert_is_compatible_with(sp_weights.shape)
    paired = sp_weights.indices is not sp_ids.indices
    summed = "sum" if combiner == "sqrtn" else combiner  # ``_divided`` does the rest
    query = replace(query, combiner=summed, weighted=True, paired=paired)
    others = [*([sp_weights.indices] if paired else []), *norm]

    @tf.custom_gradient
    def pooled(weights: Any) -> tuple[Any, Any]:
        (rows,) = lookup_op(table.query(query), [*inputs, weights, *others], [shape])
        if combiner == "sqrtn":
            rows = _divided(rows, sp_ids, weights, default_id)

        def gradient(upstream: Any) -> Any:
            return _gradient_of_weights(table, sp_ids, weights, combiner, max_norm, rows, upstream)

        return rows, gradient

    return pooled(tf.cast(sp_weights.values, tf.float32))


def _divided(rows: Any, sp_ids: Any, weights: Any, default_id: int | None) -> Any:
    """Weighted sums, each divided by the root of the sum of the squares of its weights.

    TensorFlow does it: bit for bit, the squares are those of its own ``pow``, which rounds differently in a graph.
    """
    bags, n = sp_ids.indices[:, 0], tf.cast(sp_ids.dense_shape[0], tf.int64)
    squares = tf.math.unsorted_segment_sum(tf.pow(weights, 2), bags, n)
    if default_id is not None:
        filled = tf.math.unsorted_segment_sum(tf.ones_like(bags), bags, n)
        squares = tf.where(filled > 0, squares, tf.ones_like(squares))
    return tf.math.divide_no_nan(rows, tf.sqrt(squares)[:, tf.newaxis])


def _gradient_of_weights(
    table: Table, sp_ids: Any, weights: Any, combiner: str, max_norm: Any, pooled: Any, upstream: Any
) -> Any:
    """Of ``sum(pooled * upstream)`` by each weight: float32 ``[n]``."""
    bags = sp_ids.indices[:, 0]
    toward = tf.gather(upstream, bags)
    along = tf.reduce_sum(embedding_lookup(table, sp_ids.values, max_norm) * toward, -1)
    if combiner == "sum":
        return along
    against = tf.reduce_sum(tf.gather(pooled, bags) * toward, -1)
    rows = tf.cast(sp_ids.dense_shape[0], tf.int64)
    if combiner == "mean":
        divisor = tf.gather(tf.math.unsorted_segment_sum(weights, bags, rows), bags)
        return tf.math.divide_no_nan(along - against, divisor)
    divisor = tf.sqrt(tf.gather(tf.math.unsorted_segment_sum(weights * weights, bags, rows), bags))
    return tf.math.divide_no_nan(along - tf.math.divide_no_nan(against * weights, divisor), divisor)
