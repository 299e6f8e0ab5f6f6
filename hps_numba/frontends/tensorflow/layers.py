"""Keras layers: ``LookupLayer``, ``SparseLookupLayer``, ``LookupCollection``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from hps_numba.config.arguments import as_flag
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.frontends._queries import tables_given
from hps_numba.frontends._row_training import GradientAccumulator
from hps_numba.frontends._versions import of_version
from hps_numba.frontends.tensorflow.keras_version import Layer, keras, portable_config, sparse_if_ragged
from hps_numba.frontends.tensorflow.lookup import (
    Table,
    clipped,
    embedding_lookup,
    embedding_lookup_many,
    embedding_lookup_sparse,
)
from hps_numba.frontends.tensorflow.training import (
    config_of_initializer,
    initializer_of,
    named,
    table_rows,
    trained_lookup,
    trained_lookup_sparse,
)
from hps_numba.server.registry import Config, config_of

__all__ = ["LookupCollection", "LookupLayer", "SparseLookupLayer"]

_ROW_TYPES = (tf.float32, tf.float16, tf.bfloat16)


def _row_type(given: Any) -> Any:
    names = ", ".join(kind.name for kind in _ROW_TYPES)
    try:
        found = tf.as_dtype(given)
    except Exception as problem:  # TensorFlow's, or whatever a foreign object raises
        raise ConfigError(f"emb_vec_dtype: expected one of {names}, got {show(given)}") from problem
    if found not in _ROW_TYPES:
        raise ConfigError(f"emb_vec_dtype: expected one of {names}, got {found.name}")
    return found


class _Layer(Layer):
    """What all layers share: ids left as they are, rows in the dtype of the layer; no weights but the switch of rows that
    train.

    ``trainable`` is Keras's: whether the weights of a layer are frozen, true by default. So that rows train is ``train_rows``
    here, and ``trainable`` in Torch.
    """

    def __init__(self, emb_vec_dtype: Any, train_rows: bool, initializer: Any, read_only: bool, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.train_rows = as_flag(train_rows, "train_rows")
        self.read_only = as_flag(read_only, "read_only")
        self.initializer = initializer_of(initializer)
        if self.initializer is not None and not self.train_rows:
            raise ConfigError("initializer: expected train_rows=True with it: only rows that train are made for new ids")
        if self.train_rows:
            self.switch = self.add_weight(shape=(), initializer="zeros", dtype="float32", name="switch")
        self.supports_jit = False
        self.emb_vec_dtype = _row_type(emb_vec_dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """A layer from its config, of Keras 2 or Keras 3."""
        return super().from_config(portable_config(config))

    def _trains(self, training: bool | None) -> bool:
        return self.train_rows and bool(training) and self.trainable and not self.read_only

    def _rows(self, table: Table, ids: Any, training: bool | None, max_norm: Any = None) -> Any:
        if self._trains(training):
            return clipped(trained_lookup(table, ids, self.switch, named(self.initializer)), max_norm)
        return embedding_lookup(table, ids, max_norm)

    def _at(self, version: int | None, table: Table, answer: Callable[[], Any]) -> Any:
        """``answer``, all of one version of the model if one is named.

        Raises:
            As ``of_version``; ConfigError also in a graph.
        """
        if version is None:
            return answer()
        if not tf.executing_eagerly():
            raise ConfigError(f"version: expected None in a graph, got {version!r:.200}")
        return of_version(table.query(table.rows).encoded, version, answer)

    def _training_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {"read_only": True} if self.read_only else {}
        if self.train_rows:
            config |= {"train_rows": True, "initializer": config_of_initializer(self.initializer)}
        return config

    def _finished(self, rows: Any) -> Any:
        """In ``emb_vec_dtype``, or where that is float32 in the layer's ``compute_dtype`` (mixed precision)."""
        dtype = self.emb_vec_dtype if self.emb_vec_dtype != tf.float32 else tf.as_dtype(self.compute_dtype)
        return rows if rows.dtype == dtype else tf.cast(rows, dtype)


class _TableLayer(_Layer):
    """A layer of one table.

    Args:
        model_name: a deployed model.
        table_id: number of the table in its model, or its name.
        emb_vec_size: elements of a row.
        emb_vec_dtype: of the answer: float32, float16 or bfloat16.
        ps_config_file: path of the JSON, or its content as a dict; if it is empty, call ``Init`` first. It is read when the
            layer is first called, so the file may change after a model was saved.
        global_batch_size: as for ``Init``.
        train_rows: calls with ``training=True`` accumulate gradients of rows, for the optimizers of this package.
        initializer: creates trained rows that do not exist, in such calls: ``zeros``, ``normal``, ``uniform`` or a function
            (``hps_numba/training/initializers.py``). With None, such ids get the table's default value, and a row with their
            first gradient.
        read_only: neither create nor train rows, whatever ``train_rows`` says: for models that serve what others train. The
            attribute may be changed; functions that were traced before, as by ``fit``, keep what it was.
        kwargs: of ``keras.layers.Layer``; ``trainable=False`` freezes rows even with ``train_rows``.

    Rows are frozen by default: the layer has no weights. Thread safety: any thread may call it.
    """

    def __init__(
        self,
        model_name: str,
        table_id: int | str,
        emb_vec_size: int,
        emb_vec_dtype: Any = tf.float32,
        ps_config_file: Config = "",
        global_batch_size: int = 1,
        *,
        train_rows: bool = False,
        initializer: Any = None,
        read_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(emb_vec_dtype, train_rows, initializer, read_only, **kwargs)
        self.table = Table(model_name, table_id, emb_vec_size, ps_config_file, global_batch_size)

    @property
    def model_name(self) -> str:
        """Of the constructor, as the properties that follow."""
        return self.table.model_name

    @property
    def table_id(self) -> int | str:
        return self.table.table_id

    @property
    def emb_vec_size(self) -> int:
        return self.table.emb_vec_size

    @property
    def ps_config_file(self) -> Config:
        return self.table.ps_config_file

    @property
    def global_batch_size(self) -> int:
        return self.table.global_batch_size

    def trained_tables(self) -> list[GradientAccumulator]:
        """What the optimizers of this package train; builds the server if this process has none."""
        return [table_rows(self.table, self.initializer)] if self.train_rows and not self.read_only else []

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """The shape of the answer to ids of a shape, for wrappers such as ``TimeDistributed``."""
        return (*input_shape, self.emb_vec_size)

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build an equal layer."""
        return {
            **super().get_config(),
            "model_name": self.model_name,
            "table_id": self.table_id,
            "emb_vec_size": self.emb_vec_size,
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "ps_config_file": config_of(self.ps_config_file),
            "global_batch_size": self.global_batch_size,
            **self._training_config(),
        }


@keras.utils.register_keras_serializable("hps_numba")
class LookupLayer(_TableLayer):
    """Looks up the row of each id: the rows of ``tf.nn.embedding_lookup``, bit for bit, from tables of any size."""

    __doc__ = f"{__doc__}\n{_TableLayer.__doc__}"

    def call(self, ids: Any, max_norm: Any = None, training: bool | None = None, version: int | None = None) -> Any:
        """float32 ``S + [emb_vec_size]`` for ids of shape ``S``, ragged for a RaggedTensor; see ``embedding_lookup``.

        ``version``: as for ``HPS.lookup``, in eager calls.
        """
        return self._at(version, self.table, lambda: self._finished(self._rows(self.table, ids, training, max_norm)))


@keras.utils.register_keras_serializable("hps_numba")
class SparseLookupLayer(_TableLayer):
    """Pools the rows of the ids in each row of a SparseTensor or RaggedTensor, as ``tf.nn.embedding_lookup_sparse`` does."""

    __doc__ = f"{__doc__}\n{_TableLayer.__doc__}"

    def call(
        self,
        sp_ids: Any,
        sp_weights: Any = None,
        name: str | None = None,
        combiner: str | None = None,
        max_norm: Any = None,
        default_id: int | None = None,
        training: bool | None = None,
        version: int | None = None,
    ) -> Any:
        """float32 ``[N, emb_vec_size]``; see ``embedding_lookup_sparse``. ``name`` is ignored, as in HugeCTR HPS.

        ``version``: as for ``HPS.lookup_pooled``, in eager calls.
        """
        if version is not None:
            return self._at(
                version, self.table, lambda: self.call(sp_ids, sp_weights, None, combiner, max_norm, default_id, training)
            )
        if self._trains(training):
            how = (sp_weights, combiner, max_norm, default_id, self.switch, named(self.initializer))
            return self._finished(trained_lookup_sparse(self.table, sp_ids, *how))
        return self._finished(embedding_lookup_sparse(self.table, sp_ids, sp_weights, combiner, max_norm, default_id))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, ...]:
        """``(N, emb_vec_size)`` for ids of shape ``(N, M)``; a pair of shapes is that of ids and weights."""
        if isinstance(input_shape[0], (tuple, list, tf.TensorShape)):
            input_shape = input_shape[0]
        return (input_shape[0], self.emb_vec_size)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Of Keras 3, which traces ragged inputs as dense ones: here they are traced as sparse ones, pooled alike."""
        args, kwargs = tf.nest.map_structure(sparse_if_ragged, (args, kwargs))
        return super().compute_output_spec(*args, **kwargs)


@keras.utils.register_keras_serializable("hps_numba")
class LookupCollection(_Layer):
    """Looks up several tables of one model in one step, with one call into Python for all of them.

    Args:
        model_name: a deployed model.
        tables: ``{feature: (table_id, emb_vec_size)}``.
        emb_vec_dtype, ps_config_file, global_batch_size, train_rows, initializer, read_only, kwargs: as for ``LookupLayer``;
            calls that train look up one table after the other.

    Rows are frozen by default. Thread safety: any thread may call it.
    """

    def __init__(
        self,
        model_name: str,
        tables: Mapping[str, Any],
        emb_vec_dtype: Any = tf.float32,
        ps_config_file: Config = "",
        global_batch_size: int = 1,
        *,
        train_rows: bool = False,
        initializer: Any = None,
        read_only: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(emb_vec_dtype, train_rows, initializer, read_only, **kwargs)
        self.model_name = model_name
        self._tables = {
            feature: Table(model_name, table_id, size, ps_config_file, global_batch_size)
            for feature, (table_id, size) in tables_given(tables).items()
        }

    @property
    def ps_config_file(self) -> Config:
        """Of the constructor, as ``global_batch_size``."""
        return self._first.ps_config_file

    @property
    def global_batch_size(self) -> int:
        return self._first.global_batch_size

    @property
    def _first(self) -> Table:
        first: Table = next(iter(self._tables.values()))
        return first

    def trained_tables(self) -> list[GradientAccumulator]:
        """As for ``LookupLayer``."""
        if not self.train_rows or self.read_only:
            return []
        return [table_rows(table, self.initializer) for table in self._tables.values()]

    def compute_output_shape(self, input_shape: Mapping[str, Any]) -> dict[str, tuple[int | None, ...]]:
        """As for ``LookupLayer``, by feature."""
        return {feature: (*shape, self._tables[feature].emb_vec_size) for feature, shape in input_shape.items()}

    def call(self, ids: Mapping[str, Any], training: bool | None = None, version: int | None = None) -> dict[str, Any]:
        """``{feature: rows}`` for ``{feature: ids}``, with any of the features.

        Dense and ragged ids give a row each; a SparseTensor gives the mean of each of its rows. ``version``: as for
        ``HPS.lookup_many``, in eager calls.

        Raises:
            ConfigError: a feature is not in the collection.
        """
        if version is not None:
            answer: dict[str, Any] = self._at(version, next(iter(self._tables.values())), lambda: self.call(ids, training))
            return answer
        unknown = [feature for feature in ids if feature not in self._tables]
        if unknown:
            raise ConfigError(f"ids: expected features of {', '.join(self._tables)}, got {', '.join(unknown)}")
        if self._trains(training):
            return {feature: self._finished(self._trained(self._tables[feature], some)) for feature, some in ids.items()}
        rows = embedding_lookup_many([(self._tables[feature], some) for feature, some in ids.items()]) if ids else []
        return {feature: self._finished(some) for feature, some in zip(ids, rows)}

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` needs to build an equal layer."""
        return {
            **super().get_config(),
            "model_name": self.model_name,
            "tables": {feature: [table.table_id, table.emb_vec_size] for feature, table in self._tables.items()},
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "ps_config_file": config_of(self.ps_config_file),
            "global_batch_size": self.global_batch_size,
            **self._training_config(),
        }

    def _trained(self, table: Table, ids: Any) -> Any:
        initializer = named(self.initializer)
        if isinstance(ids, tf.SparseTensor):
            return trained_lookup_sparse(table, ids, None, None, None, None, self.switch, initializer)
        return trained_lookup(table, ids, self.switch, initializer)
