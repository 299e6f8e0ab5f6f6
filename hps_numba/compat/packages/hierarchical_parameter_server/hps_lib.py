"""HugeCTR's library of operators for TensorFlow, ``Init`` and ``Lookup``, as functions of their attributes.

The inputs that say which replica of how many calls are taken and not used: the front end finds that out by itself.
"""

from typing import Any

from hps_numba.frontends.tensorflow import Init, Table, embedding_lookup

__all__ = ["init", "lookup"]


def init(*replica: Any, ps_config_file: Any, global_batch_size: int, **other: Any) -> Any:
    """``Init`` of the front end: a string tensor "OK"."""
    return Init(ps_config_file=ps_config_file, global_batch_size=global_batch_size)


def lookup(values: Any, *replica: Any, model_name: str, table_id: int, emb_vec_size: int, **other: Any) -> Any:
    """float32 rows ``S + [emb_vec_size]`` of a table of the server that ``init`` built, for ids of shape ``S``."""
    return embedding_lookup(Table(model_name, table_id, emb_vec_size), values)
