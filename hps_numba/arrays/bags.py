"""Bags of keys, as pooled lookups take them: in host memory, or as addresses in CUDA memory.

On a GPU nothing is copied and no offset is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hps_numba.arrays.cuda import DeviceKeys, as_device_floats, as_device_keys, device_of_array
from hps_numba.arrays.encodings import as_key
from hps_numba.arrays.host import as_keys, as_rows
from hps_numba.errors import ConfigError, DeviceError
from hps_numba.kernels.layouts.cache import MAX_BATCH as MAX_KEYS
from hps_numba.kernels.layouts.pooling import (
    COMBINERS,
    EQUAL,
    OFFSETS32,
    OPEN_END,
    PADDED,
)

__all__ = [
    "COMBINERS",
    "EQUAL",
    "MAX_KEYS",
    "OFFSETS32",
    "OPEN_END",
    "DeviceBags",
    "HostBags",
    "as_device_bags",
    "as_host_bags",
]


class HostBags(NamedTuple):
    """Keys int64 ``[n]``, offsets int64 ``[bags + 1]`` (not checked yet), and weights float32 ``[n]`` or None."""

    keys: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None


def as_host_bags(keys: Any, offsets: Any, weights: Any, *, key_bits: int, include_last_offset: bool = True) -> HostBags:
    """Read bags of keys of any kind; ``offsets`` may come without the last one.

    Raises:
        KeyDtypeError: keys or offsets are not integers.   ArrayError: weights are not numbers, or not one a key.
    """
    flat = as_keys(keys, key_bits=key_bits).flat
    starts = as_keys(offsets, key_bits=64, place="offsets").flat
    if weights is not None:
        weights = as_rows(weights, (len(flat),), place="weights")
    if not include_last_offset:
        starts = np.append(starts, len(flat))
    return HostBags(flat, starts, weights)


@dataclass(frozen=True)
class DeviceBags:
    """Addresses of the keys of bags, of the offsets at which bags begin, and of weights.

    Attributes:
        keys: ``[n]``.   offsets: address of int32 or int64.   count: number of bags.
        weights: address of float32 ``[n]``, or 0.   combiner: one of ``COMBINERS``.
        options, padding: as ``EmbeddingCache.pool`` takes them.   keep: holds the memory of all of them.
    """

    keys: DeviceKeys
    offsets: int
    count: int
    weights: int
    combiner: str
    options: int
    padding: int
    keep: object


def as_device_bags(
    keys: Any,
    offsets: Any,
    weights: Any,
    combiner: str,
    padding: int | None = None,
    *,
    key_bits: int,
    include_last_offset: bool = True,
    stream: Any = None,
) -> DeviceBags:
    """See keys, offsets and weights in the memory of one GPU as bags. As no offset is read, none can be checked here; the
    kernel takes offsets beyond the number of keys for the end.

    Args:
        keys: integers ``[n]``.   offsets: int32 or int64 ``[bags + 1]``, ascending from 0 to ``n``; with
            ``include_last_offset`` false without the last.   weights: numbers ``[n]``, or None.
        key_bits, stream: as for ``as_device_keys``.

    Raises:
        ConfigError: shapes that do not fit, or an unknown combiner.
        DeviceError: offsets or weights are not on the GPU of the keys.
        KeyDtypeError, ArrayError: dtypes that are not supported.
    """
    if combiner not in COMBINERS:
        raise ConfigError(f"combiner: expected one of {', '.join(COMBINERS)}, got {combiner!r}")
    batch = as_device_keys(keys, key_bits=key_bits, stream=stream)
    found = device_of_array(offsets)
    if found != batch.device:
        where = "in host memory" if found is None else f"on cuda:{found}"
        raise DeviceError(f"offsets: expected integers on cuda:{batch.device}, as the keys, got integers {where}")
    starts = as_device_keys(offsets, key_bits=64, place="offsets", stream=stream)
    count = starts.n - include_last_offset
    if len(starts.shape) != 1 or len(batch.shape) != 1 or count < 0:
        raise ConfigError(f"offsets: expected [n] for offsets and keys, got {list(starts.shape)} and {list(batch.shape)}")
    factors, keep = (0, None) if weights is None else as_device_floats(weights, (batch.n,), batch.device, stream=stream)
    options = (starts.form != "int64") * OFFSETS32 + (not include_last_offset) * OPEN_END + (padding is not None) * PADDED
    ignored = as_key(padding or 0, key_bits=key_bits)
    return DeviceBags(batch, starts.address, count, factors, combiner, options, ignored, (batch, starts, keep))
