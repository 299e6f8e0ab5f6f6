"""HugeCTR's lookup as a function, without a layer."""

from typing import Any

from hps_numba.frontends.tensorflow import Table, embedding_lookup

__all__ = ["lookup"]


def lookup(
    ids: Any,
    model_name: str,
    table_id: int,
    emb_vec_size: int,
    emb_vec_dtype: Any = None,
    ps_config_file: Any = "",
    global_batch_size: int = 1,
    max_norm: Any = None,
) -> Any:
    """What a ``LookupLayer`` of these arguments gives for ``ids``; rows are float32."""
    return embedding_lookup(Table(model_name, table_id, emb_vec_size, ps_config_file, global_batch_size), ids, max_norm)
