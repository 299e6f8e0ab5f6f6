"""``torch.ops.hps_torch.hps_embedding_lookup``, the operator that models scripted with HugeCTR's ``hps_torch`` call.

It is our operator with other arguments: compilers, exporters and ``vmap`` see ``hps_numba::lookup``, so it needs nothing of its
own for them. It is registered when this module is imported, which is when ``hps_torch`` is: HugeCTR's own library could not be
loaded into a process that has it already.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from hps_numba.frontends._queries import Query, TableQuery
from hps_numba.frontends.torch import operator

__all__ = ["library"]

library = torch.library.Library("hps_torch", "FRAGMENT")
library.define(
    "hps_embedding_lookup(Tensor keys, str ps_config_file, str model_name, int table_id, int emb_vec_size) -> Tensor"
)


@lru_cache(maxsize=1024)
def _request(ps_config_file: str, model_name: str, table_id: int, emb_vec_size: int) -> str:
    return Query(ps_config_file, (TableQuery(model_name, table_id, emb_vec_size),)).to_json()


def _lookup(keys: torch.Tensor, ps_config_file: str, model_name: str, table_id: int, emb_vec_size: int) -> torch.Tensor:
    rows: torch.Tensor = operator.lookup(keys, _request(ps_config_file, model_name, table_id, emb_vec_size), emb_vec_size)
    return rows


library.impl("hps_embedding_lookup", _lookup, "CompositeImplicitAutograd")
