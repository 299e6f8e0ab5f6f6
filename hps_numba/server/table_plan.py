"""How many bytes one table will take: in host memory, and in each of its caches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hps_numba import plugins
from hps_numba.cache.memory_use import CacheMemory, CacheUse, MemoryPlan, plan_memory
from hps_numba.cache.sizing import CacheShape
from hps_numba.config import ModelConfig, ServerConfig, TableSpec, VolatileDatabaseConfig
from hps_numba.device import driver
from hps_numba.kernels.layouts.host_store import RECENCY_NONE, index_bytes, lines_for
from hps_numba.kernels.policies._load import load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.server.cache_shape import cache_shape, geometry_of
from hps_numba.storage.host.bound import RECENCY_OF_POLICY
from hps_numba.storage.host.store_bytes import StoreBytes, plan_store
from hps_numba.storage.loading import rows_to_load
from hps_numba.storage.model_files import open_model
from hps_numba.storage.shared.content import plan_shared

__all__ = ["SHARED", "TablePlan", "plan_caches", "plan_table", "plan_tables"]

SHARED = "multi_process_hash_map"
_NO_ROWS, _NO_CACHE = StoreBytes(), CacheMemory()
_IN_HOST_MEMORY = ("hash_map", "parallel_hash_map", SHARED)


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Bytes of one table.

    Attributes:
        model: name of the model.
        table: name of the table.
        dim: elements of a row.
        rows: rows in the file, duplicates included.
        host_rows: rows that host memory will hold at the start.
        host_bytes: bytes they take, index included.
        host: the same, by what they are for (``TableStats.memory`` is what they take now).
        growth_bytes: what host memory takes on top, in one step, when a row is first written after the start
            (``allocation_rate``), or as much of it as there is. An update needs it too, as a new row is written beside the old.
        shared_bytes: of ``host_bytes``, those that are in shared memory, once for all processes.
        persistent_bytes: bytes of keys and rows in the persistent database, or 0.
        reading_bytes: what reading its file takes for a while beside its rows, such as large compressed chunks.
        cache_rows: rows that each cache has room for, or 0.
        cache_bytes: bytes of index, rows and policy of each cache, as ``cache_size_bytes`` counts them.
        cache: bytes of each cache, by what they are for, once it has had as many lookups of the largest batch at a time as
            there are worker buffers (``CacheStats.memory`` is what they take now).
        graph_bytes: what each lookup of the largest batch that a CUDA graph captures takes on top on its device.
        group_bytes: what the table takes on top, on its device, for each selection of tables that ``lookup_many`` is called
            with, if another table of the model can share its launch. With ``fuse_embedding_table`` the plan has one selection.
        listing_bytes: what a lookup of the largest batch takes on top while it runs, where there are slower tiers.
        devices: CUDA ordinals that have a cache of the table; if empty, ``cache`` is of host memory.
    """

    model: str
    table: str
    dim: int
    rows: int
    host_rows: int
    host_bytes: int
    persistent_bytes: int
    host: StoreBytes = _NO_ROWS
    growth_bytes: int = 0
    shared_bytes: int = 0
    reading_bytes: int = 0
    cache_rows: int = 0
    cache_bytes: int = 0
    cache: CacheMemory = _NO_CACHE
    graph_bytes: int = 0
    group_bytes: int = 0
    listing_bytes: int = 0
    devices: tuple[int, ...] = ()

    @property
    def index_mirror_bytes(self) -> int:
        """Bytes that the mirror of host memory's index takes beside each cache on a device, if there is room."""
        return self.cache.index_mirror

    @property
    def pinned_bytes(self) -> int:
        """Bytes of pinned host memory that all caches of the table take."""
        return len(self.devices) * self.cache.pinned_bytes

    @property
    def all_host_bytes(self) -> int:
        """Bytes of host memory: rows, what caches keep there, and caches that are there."""
        return self.host_bytes + self.pinned_bytes + (0 if self.devices else self.cache.bytes)


def plan_tables(config: ServerConfig, specs: Iterable[TableSpec], policies: Iterable[Policy | None] = ()) -> list[TablePlan]:
    """``plan_table`` of the tables of a config, with the policies of the first ones, as far as they are known."""
    specs, known = list(specs), list(policies)
    known += [None] * (len(specs) - len(known))
    return [plan_table(config, spec, policy=policy) for spec, policy in zip(specs, known)]


def plan_table(
    config: ServerConfig,
    spec: TableSpec,
    source: str | None = None,
    *,
    fills_host: bool | None = None,
    policy: Policy | None = None,
    caches: bool = True,
) -> TablePlan:
    """Plan one table.

    Args:
        source: sparse model to load instead of the table's own.
        fills_host: rows are loaded into host memory; by default as the config says for the start.
        policy: of its caches; by default that of the config, if it is built in.
        caches: false: the caches are there already.

    Raises:
        ModelFileError: the sparse model is missing or does not fit the table.   PolicyError: there is no such policy.
    """
    with open_model(source or spec.source, spec.dim) as reader:
        rows, reading_bytes = reader.rows, reader.working_bytes
    model, host = _model_of(config, spec), config.volatile_db
    keeps_rows = _keeps_rows(config, model)
    fills_host = keeps_rows and (host.initialize_after_startup if fills_host is None else fills_host)
    host_rows = _host_rows(host, rows) if fills_host else 0
    planned = _plan_host(config, spec, host_rows, keeps_rows=keeps_rows)
    slower = [section for _, section in config.tier_sections() if section is not host]
    persistent = any(section.initialize_after_startup for section in slower)
    plan = TablePlan(
        model=spec.model,
        table=spec.name,
        dim=spec.dim,
        rows=rows,
        host_rows=host_rows,
        host_bytes=planned.bytes,
        host=planned,
        growth_bytes=_growth_bytes(host, spec.dim) if keeps_rows else 0,
        shared_bytes=planned.bytes if host.type == SHARED else 0,
        persistent_bytes=rows * (8 + 4 * spec.dim) if persistent else 0,
        reading_bytes=reading_bytes,
    )
    devices = _cache_devices(config, model.deployed_device_list)
    shape = cache_shape(model, spec, rows) if caches and devices is not None else None
    if devices is None or shape is None:
        return plan
    planned_cache = plan_caches(config, spec, shape, host_rows, policy)
    memory = planned_cache.memory
    return replace(
        plan,
        cache_rows=shape.rows,
        cache_bytes=memory.index + memory.rows + memory.pinned_rows + memory.policy,
        cache=memory,
        graph_bytes=planned_cache.graph_bytes if devices and not planned_cache.listing_bytes else 0,
        group_bytes=planned_cache.group_bytes if _is_grouped(config, spec, shape, policy) else 0,
        listing_bytes=planned_cache.listing_bytes,
        devices=devices,
    )


# -- host memory ----------------------------------------------------------------------------------------------------------


def _keeps_rows(config: ServerConfig, model: ModelConfig) -> bool:
    """Rows of the model are in memory of this process; those of static and uvm caches are there whatever the config says."""
    fixed = model.embedding_cache_type != "dynamic" and _cache_devices(config, model.deployed_device_list) is not None
    return config.volatile_db.type in _IN_HOST_MEMORY or fixed


def _plan_host(config: ServerConfig, spec: TableSpec, rows: int, *, keeps_rows: bool) -> StoreBytes:
    host = config.volatile_db
    if not keeps_rows:
        return StoreBytes()
    recency = RECENCY_OF_POLICY[host.overflow_policy] if _bound(host) else RECENCY_NONE
    if host.type == SHARED:
        return plan_shared(rows, spec.dim, recency) if rows else StoreBytes()
    if host.type not in _IN_HOST_MEMORY:
        recency = RECENCY_NONE
    pinned = driver.device_count() > 0 and any(model.deployed_device_list for model in config.models)
    return plan_store(rows, spec.dim, recency, pinned=pinned)


def _growth_bytes(host: VolatileDatabaseConfig, dim: int) -> int:
    """One step of growth of memory of this process; a table in shared memory has spare rows from the start instead."""
    if host.type == SHARED:
        return 0
    recency = 8 if _bound(host) and RECENCY_OF_POLICY[host.overflow_policy] != RECENCY_NONE else 0
    return max(1, host.allocation_rate // (4 * dim)) * (4 * dim + recency)


def _bound(section: VolatileDatabaseConfig) -> int | None:
    """The most rows that host memory keeps of a table, or None: any number."""
    bound = section.overflow_margin * section.num_partitions
    return None if bound >= 2**64 - 1 else bound


def _host_rows(section: VolatileDatabaseConfig, rows: int) -> int:
    """Rows that host memory has room for once a file of so many is loaded."""
    loaded = rows_to_load(rows, section.initial_cache_rate)
    bound = _bound(section)
    return loaded if bound is None else min(loaded, bound + section.max_batch_size)


# -- caches ---------------------------------------------------------------------------------------------------------------


def plan_caches(
    config: ServerConfig, spec: TableSpec, shape: CacheShape, host_rows: int, policy: Policy | None = None
) -> MemoryPlan:
    """What each cache of a table takes.

    Args:
        host_rows: rows that host memory holds at the start.   policy: as for ``plan_table``.
    """
    model = _model_of(config, spec)
    has_store, shared = _keeps_rows(config, model), config.volatile_db.type == SHARED
    use = CacheUse(
        on_device=driver.device_count() > 0,
        keys=spec.max_keys,
        buffers=model.num_of_worker_buffer_in_pool,
        miss_path=model.miss_path,
        has_store=has_store,
        index=index_bytes(lines_for(host_rows)) if has_store and not shared else 0,
        host_rows=host_rows,
        pagelock=model.enable_pagelock and shape.kind == "static",
        slower_tiers=_has_slower_tiers(config),
        grouped=config.fuse_embedding_table and model.fuse_embedding_table and _is_grouped(config, spec, shape, policy),
    )
    return plan_memory(geometry_of(spec, shape), _policy(spec, shape, policy), use)


def _policy(spec: TableSpec, shape: CacheShape, policy: Policy | None) -> Policy | None:
    """The policy of a table, if it is known without running code that the config names."""
    if policy is not None or shape.kind != "dynamic" or plugins.is_reference(spec.cache_policy):
        return policy
    return load_policy(spec.cache_policy)


def _model_of(config: ServerConfig, spec: TableSpec) -> ModelConfig:
    return next(model for model in config.models if model.model == spec.model)


def _has_slower_tiers(config: ServerConfig) -> bool:
    host = config.volatile_db
    return any(section is not host or host.type not in _IN_HOST_MEMORY for _, section in config.tier_sections())


def _is_grouped(config: ServerConfig, spec: TableSpec, shape: CacheShape, policy: Policy | None) -> bool:
    """Another table of the model can be looked up in the same launch as this one (``KernelSet.fusion_key``)."""
    model = _model_of(config, spec)
    own = _policy(spec, shape, policy)
    if not _cache_devices(config, model.deployed_device_list) or _has_slower_tiers(config) or (own and own.admit):
        return False
    alike = [
        other
        for other in model.tables(config.folder)
        if (other.dim, other.cache_row_dtype) == (spec.dim, spec.cache_row_dtype)
        and (shape.kind != "dynamic" or other.cache_policy == spec.cache_policy)
    ]
    return len(alike) > 1


def _cache_devices(config: ServerConfig, listed: tuple[int, ...]) -> tuple[int, ...] | None:
    """The devices with a cache of a table; empty if the cache is in host memory, None if there is none."""
    if listed and driver.device_count():
        return listed
    return () if config.cache_on_cpu and not driver.device_count() else None
