"""Bags of keys in CUDA memory, as the pooled kernel takes them: nothing is copied and no offset is read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hps_numba.arrays.cuda import DeviceKeys, as_device_floats, as_device_keys, device_of_array
from hps_numba.errors import ConfigError, DeviceError
from hps_numba.kernels.cache.pooling import COMBINERS, EQUAL, OFFSETS32, OPEN_END, PADDED
from hps_numba.kernels.layouts.cache import MAX_BATCH as MAX_KEYS

__all__ = ["EQUAL", "MAX_KEYS", "OFFSETS32", "OPEN_END", "DeviceBags", "as_device_bags", "as_key"]


@dataclass(frozen=True)
class DeviceBags:
    """Addresses of the keys of bags, of where the bags begin, and of weights.

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
    wide: bool,
    open_end: bool = False,
    stream: Any = None,
) -> DeviceBags:
    """See keys, offsets and weights in the memory of one GPU as bags. As no offset is read, none can be checked here; the
    kernel takes those beyond the keys for the end.

    Args:
        keys: integers ``[n]``.   offsets: int32 or int64 ``[bags + 1]``, ascending from 0 to ``n``; ``open_end``: without the
            last.   weights: numbers ``[n]``, or None.   wide, stream: as for ``as_device_keys``.

    Raises:
        ConfigError: shapes that do not fit, or an unknown combiner.
        DeviceError: offsets or weights are not where the keys are.
        KeyDtypeError, ArrayError: of a type that does not do.
    """
    if combiner not in COMBINERS:
        raise ConfigError(f"combiner: {combiner!r} came, one of {', '.join(COMBINERS)} is wanted")
    batch = as_device_keys(keys, wide=wide, stream=stream)
    place = device_of_array(offsets)
    if place != batch.device:
        came = "in host memory" if place is None else f"on cuda:{place}"
        raise DeviceError(f"offsets: integers {came} came, ones on cuda:{batch.device}, as the keys, are wanted")
    starts = as_device_keys(offsets, wide=True, place="offsets", stream=stream)
    count = starts.n - (not open_end)
    if len(starts.shape) != 1 or len(batch.shape) != 1 or count < 0:
        raise ConfigError(f"offsets: {list(starts.shape)} came with keys {list(batch.shape)}, both [n] are wanted")
    factors, keep = (0, None) if weights is None else as_device_floats(weights, (batch.n,), batch.device, stream=stream)
    options = (starts.form != "int64") * OFFSETS32 + open_end * OPEN_END + (padding is not None) * PADDED
    return DeviceBags(
        batch, starts.address, count, factors, combiner, options, as_key(padding or 0, wide=wide), (batch, starts, keep)
    )


def as_key(number: int, *, wide: bool) -> int:
    """An integer as kernels see a key of that value."""
    return ((number + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63) if wide else number & 0xFFFFFFFF
