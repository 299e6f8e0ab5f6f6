"""The bytes of one table in host memory, by what they are for: as planned, and as taken now."""

from __future__ import annotations

from dataclasses import dataclass

from hps_numba.device.host_memory import pinned_size
from hps_numba.kernels.layouts.host_store import RECENCY_NONE, index_bytes, lines_for

__all__ = ["StoreBytes", "plan_store"]


@dataclass(frozen=True, kw_only=True)
class StoreBytes:
    """Bytes of a table in host memory.

    Attributes:
        rows: of slots that hold rows, or held some.
        index: of the index; in shared memory also of the list of slots and the recency words.
        recency: of what the overflow policy keeps for each row.
        spare: of memory that is there for more rows; in a plan, what comes with the steps in which memory is pinned or shared.
    """

    rows: int = 0
    index: int = 0
    recency: int = 0
    spare: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.rows + self.index + self.recency + self.spare

    def __add__(self, other: StoreBytes) -> StoreBytes:
        return StoreBytes(
            rows=self.rows + other.rows,
            index=self.index + other.index,
            recency=self.recency + other.recency,
            spare=self.spare + other.spare,
        )


def plan_store(rows: int, dim: int, recency: int = RECENCY_NONE, *, pinned: bool = False) -> StoreBytes:
    """What a table of so many distinct rows takes in memory of this process once it is loaded.

    Args:
        recency: a ``RECENCY_*`` mode.   pinned: for devices.
    """
    row_bytes, index = 4 * dim * rows, index_bytes(lines_for(rows))
    of_recency = 0 if recency == RECENCY_NONE else 8 * rows
    if not pinned:
        return StoreBytes(rows=row_bytes, index=index, recency=of_recency)
    return StoreBytes(
        rows=row_bytes,
        index=pinned_size(index, index),
        recency=of_recency,
        spare=pinned_size(row_bytes) - row_bytes + pinned_size(of_recency) - of_recency,
    )
