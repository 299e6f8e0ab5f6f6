"""Storage of rows: the host store, slower tiers, and sparse models on disk.

``Tier``, with ``Fetched`` and ``PartialWriteError``, is the base of a storage tier, ``SparseModelFormat`` with
``SparseModelReader`` that of a file format; ``hps_numba.testing`` has the contract suites that each must pass. Names are
imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hps_numba.storage.formats._format import SparseModelFormat, SparseModelReader
    from hps_numba.storage.tiers._tier import NO_LIMIT, Fetched, PartialWriteError, Tier

__all__ = ["NO_LIMIT", "Fetched", "PartialWriteError", "SparseModelFormat", "SparseModelReader", "Tier"]

_HOMES = {
    "NO_LIMIT": "tiers._tier",
    "Fetched": "tiers._tier",
    "PartialWriteError": "tiers._tier",
    "SparseModelFormat": "formats._format",
    "SparseModelReader": "formats._format",
    "Tier": "tiers._tier",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name))
