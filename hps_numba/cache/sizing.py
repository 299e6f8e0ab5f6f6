"""How large the cache of a table is, in sets and in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from hps_numba import plugins
from hps_numba.cache.policy_memory import policy_bytes
from hps_numba.kernels.dtypes import row_stride
from hps_numba.kernels.layouts.cache import SET_BYTES, STATE_BYTES, WAYS
from hps_numba.kernels.policies._load import load_policy

__all__ = ["CacheShape", "index_sets"]

_WHOLE_LOAD, _FIXED_LOAD = 0.8, 0.6  # shares of ways in use where every row has to find one


def index_sets(rows: int, *, fixed: bool, whole: bool) -> int:
    """Number of sets of a cache for so many rows."""
    load = _FIXED_LOAD if fixed else _WHOLE_LOAD if whole else 1.0
    return max(2, int(-(-rows // (load * WAYS))))


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
            policy: its name. The memory of a policy counts if it is built in: a user's own is code, which is not run to tell
                a size.
        """
        fixed = self.kind != "dynamic"
        sets = index_sets(self.rows, fixed=fixed, whole=self.whole and not fixed)
        rows = self.rows if fixed else sets * WAYS
        unknown = fixed or plugins.is_reference(policy)
        of_policy = 0 if unknown else policy_bytes(load_policy(policy), sets)
        return sets * SET_BYTES + rows * row_stride(dim, row_type) + 2 * STATE_BYTES + of_policy
