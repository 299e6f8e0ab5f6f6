"""How large the cache of a table is, in sets, rows and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hps_numba import plugins
from hps_numba.cache.policy_memory import policy_bytes
from hps_numba.errors import ConfigError
from hps_numba.kernels.dtypes import ELEMENT_BYTES, row_stride
from hps_numba.kernels.layouts.cache import MISSED_BYTES, SET_BYTES, STATE_BYTES, WAYS
from hps_numba.kernels.policies._load import load_policy

__all__ = ["KINDS", "CacheGeometry", "CacheShape", "StagingBytes", "index_sets", "staging_bytes"]

KINDS = ("dynamic", "static", "uvm")
_WHOLE_LOAD, _FIXED_LOAD = 0.8, 0.6  # shares of ways in use where every row has to find one


def index_sets(rows: int, *, fixed: bool, whole: bool) -> int:
    """Number of sets of a cache for so many rows."""
    load = _FIXED_LOAD if fixed else _WHOLE_LOAD if whole else 1.0
    return max(2, int(-(-rows // (load * WAYS))))


class StagingBytes(NamedTuple):
    """What one batch at a time takes to be staged (``cache.staging``): where the cache lives, and in pinned host memory."""

    device: int
    pinned: int


def staging_bytes(dim: int, keys: int) -> StagingBytes:
    """Bytes that staging takes for batches of up to so many keys, for each batch at a time; as ``cache.staging`` takes them."""
    limit = max(256, 1 << (keys - 1).bit_length())
    rows = max(1, min(limit, (16 << 20) // (4 * dim)))  # of a buffer
    buffer = -(-4 * dim * rows // 64) * 64 + 8 * rows
    return StagingBytes(MISSED_BYTES + 16 * limit, 8 * limit + 3 * buffer)


@dataclass(frozen=True)
class CacheShape:
    """How a table is cached.

    Attributes:
        kind: dynamic, static or uvm.   rows: that it has room for.   whole: every row of the table is to be resident.
    """

    kind: str
    rows: int
    whole: bool

    def bytes(self, dim: int, *, row_type: str = "float32", policy: str = "lru") -> int:
        """Bytes of device memory that the cache takes, without the buffers of batches.

        Args:
            dim: elements of a row.   row_type: how the cache stores rows.
            policy: its name. The memory of a policy counts if it is built in: a user's own is code, which is not run to find
                out a size.
        """
        fixed = self.kind != "dynamic"
        sets = index_sets(self.rows, fixed=fixed, whole=self.whole and not fixed)
        rows = self.rows if fixed else sets * WAYS
        unknown = fixed or plugins.is_reference(policy)
        of_policy = 0 if unknown else policy_bytes(load_policy(policy), sets)
        return sets * SET_BYTES + rows * row_stride(dim, row_type) + 2 * STATE_BYTES + of_policy


@dataclass(frozen=True)
class CacheGeometry:
    """What one cache is from its start to its end.

    Args:
        name: of the table.   dim: elements of a row.   rows: that it is to hold.   kind: dynamic, static or uvm.
        whole: it is to hold all rows of its table.   row_type: how rows are stored.   default: element of an absent row.
        set_count: number of sets, whatever ``rows`` says; None: as many as ``rows`` take.

    Attributes:
        fixed: it holds the rows of its warming and inserts none.   sets: number of sets.   capacity: rows that it has room for.
        overflows: a key whose set is full may use another set.   row_bytes: bytes of all rows.

    Raises:
        ConfigError: an argument is out of range.
    """

    name: str
    dim: int
    rows: int
    kind: str
    whole: bool
    row_type: str
    default: np.float32
    set_count: int | None
    fixed: bool = field(init=False)
    sets: int = field(init=False)
    capacity: int = field(init=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"{self.name}: kind of cache: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.row_type not in ELEMENT_BYTES:
            raise ConfigError(f"{self.name}: row type: expected one of {', '.join(ELEMENT_BYTES)}, got {self.row_type!r}")
        for what, value, minimum in (("dim", self.dim, 1), ("rows", self.rows, 0)):
            if value < minimum:
                raise ConfigError(f"{self.name}: {what} of the cache: expected {minimum} or more, got {value}")
        fixed = self.kind != "dynamic"
        sets = self.set_count or index_sets(self.rows, fixed=fixed, whole=self.whole)
        for attribute, value in (("fixed", fixed), ("sets", sets), ("capacity", self.rows if fixed else sets * WAYS)):
            object.__setattr__(self, attribute, value)

    @property
    def overflows(self) -> bool:
        """A key whose set is full may use another set."""
        return self.whole or self.fixed

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows."""
        return self.capacity * row_stride(self.dim, self.row_type)
