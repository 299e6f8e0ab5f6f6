"""The bytes of one cache, by what they are for: as planned before it is opened, and as taken now.

Both are the same dataclass, so that a plan and ``stats`` can be read side by side. Sizes come from what allocates by them
(``WorkspaceShape.bytes``, ``policy_bytes``), so a plan cannot say anything else than what is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from hps_numba.cache.gathering import GATHERED_FROM, gathering_bytes, listed_from
from hps_numba.cache.index_mirror import is_translated, may_mirror
from hps_numba.cache.policy_memory import policy_bytes
from hps_numba.cache.residency import listing_from
from hps_numba.cache.shares import forced_share
from hps_numba.cache.sizing import CacheGeometry, StagingBytes, staging_bytes
from hps_numba.cache.staging import NEVER
from hps_numba.cache.workspace import WorkspaceShape
from hps_numba.kernels.layouts.cache import MAX_BATCH, SET_BYTES, STATE_BYTES, TABLE_BYTES
from hps_numba.kernels.policies._policy import Policy

__all__ = ["CacheMemory", "CacheUse", "MemoryPlan", "plan_memory", "with_pinned"]

_PAGE = 4096  # pinned memory comes in pages


@dataclass(frozen=True, kw_only=True)
class CacheMemory:
    """Bytes of one cache.

    All but the last two are where the cache lives: on its device, or in host memory.

    Attributes:
        index: keys, scores and versions, and the state of the cache.
        rows: rows.
        policy: counts of hits, states of sets and the frequency sketch of the policy. Counts of hits stay if another policy
            comes that has no use for them.
        index_mirror: the copy of the host store's index (``miss_path`` auto).
        workspaces: buffers of lookups, as many as there are worker buffers. Each stream of a static or uvm cache may have one
            beyond that, up to 64; they are small unless batches have 131,072 keys or there are slower tiers. Of a table that
            is written also at most 32 MiB for keys and rows on their way to the cache, which no plan has.
        group_workspaces: buffers of lookups of several tables in one launch (``lookup_many``).
        graphs: buffers that captured CUDA graphs keep.
        staging: lists of missed keys that host threads gather, and rows that they have brought (``miss_path`` staged, or auto
            with tables and batches so large that host threads help).
        pinned_rows: rows in pinned host memory instead (``enable_pagelock``).
        pinned_staging: gathered rows on their way to the device, in pinned host memory.
    """

    index: int = 0
    rows: int = 0
    policy: int = 0
    index_mirror: int = 0
    workspaces: int = 0
    group_workspaces: int = 0
    graphs: int = 0
    staging: int = 0
    pinned_rows: int = 0
    pinned_staging: int = 0

    @property
    def bytes(self) -> int:
        """All that is where the cache lives."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.pinned_bytes

    @property
    def needed_bytes(self) -> int:
        """``bytes`` without the index mirror, which is left out where there is no room."""
        return self.bytes - self.index_mirror

    @property
    def pinned_bytes(self) -> int:
        """All that is in pinned host memory beside it."""
        return self.pinned_rows + self.pinned_staging


@dataclass(frozen=True, kw_only=True)
class CacheUse:
    """How a cache is going to be used.

    Attributes:
        on_device: it lives on a device.   pagelock: rows of a static cache are in pinned host memory.
        keys: of the largest lookup.   buffers: lookups at a time.
        slower_tiers: lookups list the keys that host memory lacks too, and what slower tiers have of them is inserted.
        miss_path: as for ``EmbeddingCache``.
        index: bytes of the index of its host store; 0 if there is none, or if other processes write to it.
        has_store: it has a host store.   host_rows: of which there is room in it.
        grouped: it is looked up together with caches of other tables.
    """

    on_device: bool
    keys: int
    buffers: int
    miss_path: str
    has_store: bool
    index: int = 0
    host_rows: int = 0
    pagelock: bool = False
    slower_tiers: bool = False
    grouped: bool = False


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a cache will take.

    Attributes:
        memory: once each worker buffer has had the largest lookup.
        graph_bytes: each captured lookup of that size takes on top, for as long as the cache is open.
        group_bytes: each selection of tables that is looked up together takes on top for this table.
        listing_bytes: a lookup takes on top while it runs, for the keys that slower tiers are asked for.
    """

    memory: CacheMemory
    graph_bytes: int
    group_bytes: int
    listing_bytes: int


def with_pinned(memory: CacheMemory, *, on_device: bool) -> CacheMemory:
    """The same bytes where a cache lives in host memory: there, pinned memory is memory like any other."""
    if on_device:
        return memory
    values = {field.name: getattr(memory, field.name) for field in fields(memory)}
    values["rows"] += values.pop("pinned_rows")
    values["staging"] += values.pop("pinned_staging")
    return CacheMemory(**values)


def plan_memory(geometry: CacheGeometry, policy: Policy | None, use: CacheUse) -> MemoryPlan:
    """What a cache will take, computed as it will be allocated.

    Args:
        policy: None if it is not known what it keeps; then it counts for nothing.
    """
    fixed, sets = geometry.fixed, geometry.sets
    mirrors = use.index > 0 and may_mirror(geometry.kind, geometry.whole, use.miss_path)
    lists_from = listing_from(0 if use.on_device else None, mirrors)
    counts = policy is not None and policy.needs_count
    shape = WorkspaceShape.of(geometry, listed_from(lists_from, mirrors), inserts=True, counts=counts, keys=use.keys)
    largest = min(max(1, use.keys), MAX_BATCH)
    keys, in_graph = shape.limit(largest), shape.captured()
    of_lookups = use.buffers * shape.bytes(keys, use.slower_tiers)
    if use.slower_tiers and not fixed:  # rows from there are inserted by a workspace of the cache's own
        of_lookups += shape.bytes(keys, True)
    staged = use.miss_path == "staged" and use.has_store
    staging = staging_bytes(geometry.dim, largest) if staged else StagingBytes(0, 0)
    gathers = mirrors and use.on_device and largest >= GATHERED_FROM
    if gathers and (is_translated(use.host_rows, 4 * geometry.dim) or forced_share()):
        staging = StagingBytes(*gathering_bytes(geometry.dim, keys))
    grouped = WorkspaceShape.of(geometry, NEVER, inserts=True, counts=counts, keys=use.keys)
    of_group = use.buffers * (grouped.bytes(keys, False) + 2 * TABLE_BYTES)
    pinned = use.pagelock and fixed
    memory = CacheMemory(
        index=sets * SET_BYTES + 2 * STATE_BYTES,
        rows=0 if pinned else geometry.row_bytes,
        policy=0 if fixed or policy is None else policy_bytes(policy, sets),
        index_mirror=use.index if mirrors and use.on_device else 0,
        workspaces=of_lookups,
        group_workspaces=of_group if use.grouped else 0,
        staging=use.buffers * staging.device,
        pinned_rows=0 if not pinned else _pages(geometry.row_bytes) if use.on_device else geometry.row_bytes,
        pinned_staging=use.buffers * staging.pinned,
    )
    return MemoryPlan(
        memory=with_pinned(memory, on_device=use.on_device),
        graph_bytes=in_graph.bytes(in_graph.limit(largest), False),
        group_bytes=of_group,
        listing_bytes=8 * (1 + 2 * largest) if use.slower_tiers else 0,
    )


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
