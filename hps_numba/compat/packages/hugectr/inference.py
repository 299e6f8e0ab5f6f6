"""HugeCTR's ``hugectr.inference``: the names of ``hps_numba``, with ``HPS`` as HugeCTR calls it."""

from typing import Any

import hps_numba
from hps_numba.compat.inference import HPS
from hps_numba.compat.out_of_scope import INFERENCE, out_of_scope, unknown
from hps_numba.config import EmbeddingCacheType_t

__all__ = ["HPS", *(name for name in hps_numba.__all__ if name != "HPS"), *EmbeddingCacheType_t.__members__]

globals().update(EmbeddingCacheType_t.__members__)


def __getattr__(name: str) -> Any:
    if name in INFERENCE:
        return globals().setdefault(name, out_of_scope(__name__, name))
    if name not in hps_numba.__all__:
        raise unknown(__name__, name)
    return globals().setdefault(name, getattr(hps_numba, name))


def __dir__() -> list[str]:
    return sorted(__all__)
