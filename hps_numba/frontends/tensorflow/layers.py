"""Keras layers: ``LookupLayer``, ``SparseLookupLayer``, ``LookupCollection`` (spec 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from hps_numba.errors import ConfigError
from hps_numba.frontends._servers import Config, config_of
from hps_numba.frontends.tensorflow.lookup import Table, embedding_lookup, embedding_lookup_many, embedding_lookup_sparse

__all__ = ["LookupCollection", "LookupLayer", "SparseLookupLayer"]

_ROW_TYPES = (tf.float32, tf.float16, tf.bfloat16)


class _Layer(keras.layers.Layer):
    """What all layers share: no weights, ids left as they are, rows in the dtype that is wanted."""

    def __init__(self, emb_vec_dtype: Any, **kwargs: Any) -> None:
        super().__init__(**{"autocast": False, **kwargs})
        self.supports_jit = False
        self.emb_vec_dtype = tf.as_dtype(emb_vec_dtype)
        if self.emb_vec_dtype not in _ROW_TYPES:
            names = ", ".join(kind.name for kind in _ROW_TYPES)
            raise ConfigError(f"emb_vec_dtype: {self.emb_vec_dtype.name} came, one of {names} is wanted")

    def _finished(self, rows: Any) -> Any:
        """In ``emb_vec_dtype``, or where that is float32 in the layer's ``compute_dtype`` (mixed precision)."""
        wanted = self.emb_vec_dtype if self.emb_vec_dtype != tf.float32 else tf.as_dtype(self.compute_dtype)
        return rows if rows.dtype == wanted else tf.cast(rows, wanted)


class _TableLayer(_Layer):
    """A layer of one table.

    Args:
        model_name: a deployed model.
        table_id: number of the table in its model, or its name.
        emb_vec_size: elements of a row.
        emb_vec_dtype: of the answer: float32, float16 or bfloat16.
        ps_config_file: path of the JSON, or its content as a dict; with an empty one ``Init`` comes first. It is read when the
            layer is first called, so the file may change after a model was saved.
        global_batch_size: as for ``Init``.
        kwargs: of ``keras.layers.Layer``.

    Rows are frozen: the layer has no weights. **Threads:** calls.
    """

    def __init__(
        self,
        model_name: str,
        table_id: int | str,
        emb_vec_size: int,
        emb_vec_dtype: Any = tf.float32,
        ps_config_file: Config = "",
        global_batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(emb_vec_dtype, **kwargs)
        self.table = Table(model_name, table_id, emb_vec_size, ps_config_file, global_batch_size)

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` makes an equal layer of."""
        return {
            **super().get_config(),
            "model_name": self.table.model_name,
            "table_id": self.table.table_id,
            "emb_vec_size": self.table.emb_vec_size,
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "ps_config_file": config_of(self.table.ps_config_file),
            "global_batch_size": self.table.global_batch_size,
        }


@keras.saving.register_keras_serializable("hps_numba")
class LookupLayer(_TableLayer):
    """The row of each id: what ``tf.nn.embedding_lookup`` gives, bit for bit, of tables of any size (spec 2.2)."""

    __doc__ = f"{__doc__}\n{_TableLayer.__doc__}"

    def call(self, ids: Any, max_norm: Any = None) -> Any:
        """float32 ``S + [emb_vec_size]`` for ids of shape ``S``, ragged for a RaggedTensor; see ``embedding_lookup``."""
        return self._finished(embedding_lookup(self.table, ids, max_norm))


@keras.saving.register_keras_serializable("hps_numba")
class SparseLookupLayer(_TableLayer):
    """The pooled row of each row of a SparseTensor of ids: as ``tf.nn.embedding_lookup_sparse`` (spec 2.3)."""

    __doc__ = f"{__doc__}\n{_TableLayer.__doc__}"

    def call(
        self,
        sp_ids: Any,
        sp_weights: Any = None,
        name: str | None = None,
        combiner: str | None = None,
        max_norm: Any = None,
        default_id: int | None = None,
    ) -> Any:
        """float32 ``[N, emb_vec_size]``; see ``embedding_lookup_sparse``. ``name`` is ignored, as in the original."""
        return self._finished(embedding_lookup_sparse(self.table, sp_ids, sp_weights, combiner, max_norm, default_id))


@keras.saving.register_keras_serializable("hps_numba")
class LookupCollection(_Layer):
    """Several tables of one model in one step: one call of Python for all of them.

    Args:
        model_name: a deployed model.
        tables: ``{feature: (table_id, emb_vec_size)}``.
        emb_vec_dtype, ps_config_file, global_batch_size, kwargs: as for ``LookupLayer``.

    Rows are frozen. **Threads:** calls.
    """

    def __init__(
        self,
        model_name: str,
        tables: Mapping[str, Any],
        emb_vec_dtype: Any = tf.float32,
        ps_config_file: Config = "",
        global_batch_size: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(emb_vec_dtype, **kwargs)
        if not tables:
            raise ConfigError("tables: none came, {feature: (table_id, emb_vec_size)} is wanted")
        self.model_name = model_name
        self._tables = {
            feature: Table(model_name, table_id, size, ps_config_file, global_batch_size)
            for feature, (table_id, size) in tables.items()
        }

    def call(self, ids: Mapping[str, Any]) -> dict[str, Any]:
        """``{feature: rows}`` for ``{feature: ids}``, of any of the features.

        Ids are dense or ragged (a row each), or a SparseTensor (the mean of each row of it).

        Raises:
            ConfigError: a feature that is none of the collection's.
        """
        strangers = [feature for feature in ids if feature not in self._tables]
        if strangers:
            raise ConfigError(f"ids: features {', '.join(strangers)} came, known are {', '.join(self._tables)}")
        rows = embedding_lookup_many([(self._tables[feature], some) for feature, some in ids.items()]) if ids else []
        return {feature: self._finished(some) for feature, some in zip(ids, rows)}

    def get_config(self) -> dict[str, Any]:
        """What ``from_config`` makes an equal layer of."""
        some = next(iter(self._tables.values()))
        return {
            **super().get_config(),
            "model_name": self.model_name,
            "tables": {feature: [table.table_id, table.emb_vec_size] for feature, table in self._tables.items()},
            "emb_vec_dtype": self.emb_vec_dtype.name,
            "ps_config_file": config_of(some.ps_config_file),
            "global_batch_size": some.global_batch_size,
        }
