"""HugeCTR's ``hugectr``, as far as it serves embeddings: ``hugectr.inference`` and the enums of configs."""

import importlib
import importlib.abc
import sys
from typing import Any

import _hps_numba_found  # noqa: F401

from hps_numba import __version__
from hps_numba.compat.out_of_scope import TRAINING, no_module, out_of_scope, unknown
from hps_numba.config import (
    DatabaseOverflowPolicy_t,
    DatabaseType_t,
    EmbeddingCacheType_t,
    UpdateSourceParams,
    UpdateSourceType_t,
)

__all__ = [
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "EmbeddingCacheType_t",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "__version__",
    "inference",
]

for _enum in (DatabaseType_t, DatabaseOverflowPolicy_t, UpdateSourceType_t):
    globals().update(_enum.__members__)
    __all__ += list(_enum.__members__)


def __getattr__(name: str) -> Any:
    if name == "inference":
        return importlib.import_module("hugectr.inference")
    if name in TRAINING:
        return globals().setdefault(name, out_of_scope(__name__, name))
    raise unknown(__name__, name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _NoOtherModule(importlib.abc.MetaPathFinder):
    """Asked last, so only for modules that are not there."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.startswith("hugectr."):
            raise no_module(name)


sys.meta_path.append(_NoOtherModule())
