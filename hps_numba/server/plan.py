"""How many bytes a config will take, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hps_numba.cache.index_mirror import may_mirror
from hps_numba.config import ServerConfig, TableSpec, VolatileDatabaseConfig
from hps_numba.device import driver
from hps_numba.device import memory as device_memory
from hps_numba.device.host_memory import human_bytes
from hps_numba.device.machine_memory import address_space_left, available_bytes
from hps_numba.errors import CapacityError, ConfigError
from hps_numba.kernels.layouts.host_store import index_bytes, lines_for
from hps_numba.server.cache_shape import cache_shape, shape_bytes
from hps_numba.storage.host.bound import RECENCY_OF_POLICY
from hps_numba.storage.host.content import content_bytes
from hps_numba.storage.loading import rows_to_load
from hps_numba.storage.model_files import open_model
from hps_numba.storage.shared.content import shared_bytes
from hps_numba.storage.shared.segment import present_bytes

__all__ = ["Plan", "TablePlan", "make_plan", "plan_table"]

_SHARED = "multi_process_hash_map"
_IN_HOST_MEMORY = ("hash_map", "parallel_hash_map", _SHARED)
#: bytes of keys that are in flight while a table is loaded
LOADING_BYTES = 16 << 20


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
        shared_bytes: of those, the ones that are in shared memory, once for all processes.
        persistent_bytes: bytes of keys and rows in the persistent database, or 0.
        reading_bytes: what reading its file takes for a while beside its rows, such as large compressed chunks.
        cache_rows: rows that each cache has room for, or 0.
        cache_bytes: bytes that each cache takes, without the workspaces of lookups.
        index_mirror_bytes: bytes that the mirror of host memory's index takes beside each cache on a device, if there is room.
        devices: CUDA ordinals that have a cache of the table; if empty, ``cache_bytes`` are of host memory.
    """

    model: str
    table: str
    dim: int
    rows: int
    host_rows: int
    host_bytes: int
    persistent_bytes: int
    shared_bytes: int = 0
    reading_bytes: int = 0
    cache_rows: int = 0
    cache_bytes: int = 0
    index_mirror_bytes: int = 0
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a server, by tier.

    Attributes:
        tables: one plan a table.
        loading_bytes: what loading takes beyond the tables, for as long as it lasts.
        available_bytes: memory that this process could take when the plan was made: free on the machine, and within the limits
            of its control groups, ``ulimit -v`` and ``ulimit -d``.
        present_bytes: shared memory that the segment of the config has taken already.
    """

    tables: tuple[TablePlan, ...]
    loading_bytes: int
    available_bytes: int
    present_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory of all tables, and of caches in host memory."""
        return sum(table.host_bytes + (0 if table.devices else table.cache_bytes) for table in self.tables)

    @property
    def device_bytes(self) -> dict[int, int]:
        """Bytes of the caches on each device."""
        return self._on_devices(lambda table: table.cache_bytes)

    @property
    def index_mirror_bytes(self) -> dict[int, int]:
        """Bytes of the index mirrors on each device, if there is room for all of them (``cache.index_mirror``)."""
        return self._on_devices(lambda table: table.index_mirror_bytes)

    def _on_devices(self, size_of: Callable[[TablePlan], int]) -> dict[int, int]:
        devices = sorted({device for table in self.tables for device in table.devices})
        return {device: sum(size_of(table) for table in self.tables if device in table.devices) for device in devices}

    @property
    def fits(self) -> bool:
        """Whether the machine has that much host memory free."""
        return self._missing_bytes <= self.available_bytes

    @property
    def shared_bytes(self) -> int:
        """Of ``host_bytes``, those that are in shared memory."""
        return sum(table.shared_bytes for table in self.tables)

    @property
    def _missing_bytes(self) -> int:
        """Host memory that this process would take beyond what is there."""
        return self.host_bytes - min(self.shared_bytes, self.present_bytes) + self.loading_bytes

    def check(self) -> None:
        """Compare the plan with the free memory of the machine and its devices.

        Raises:
            CapacityError: the plan does not fit; the message names the largest table.
        """
        for device, size in self.device_bytes.items():
            free = device_memory.free_bytes(device)
            if size > free:
                raise CapacityError(
                    f"the plan takes {human_bytes(size)} of device {device}, {human_bytes(free)} are free; "
                    "gpucacheper or cache_size_bytes makes caches smaller"
                )
        if self.fits:
            return
        largest = max(self.tables, key=lambda table: table.host_bytes)
        raise CapacityError(
            f"the plan takes {human_bytes(self._missing_bytes)} of host memory, "
            f"{human_bytes(self.available_bytes)} are free; the largest table is {largest.model}/{largest.table} "
            f"with {human_bytes(largest.host_bytes)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sizes = {"device_bytes": self.device_bytes, "index_mirror_bytes": self.index_mirror_bytes}
        by_device = {name: {str(device): size for device, size in of.items()} for name, of in sizes.items()}
        return {
            **asdict(self),
            "host_bytes": self.host_bytes,
            "shared_bytes": self.shared_bytes,
            **by_device,
            "fits": self.fits,
        }


def make_plan(config: ServerConfig) -> Plan:
    """Plan all tables of a config; opens the sparse models and reads their sizes only.

    Raises:
        ConfigError: not a config.   ModelFileError: a sparse model is missing or does not fit its table.
    """
    if not isinstance(config, ServerConfig):
        raise ConfigError(f"config: expected what read_config returns, got {type(config).__name__}")
    host = config.volatile_db
    present = present_bytes(host.shared_memory_name) if host.type == _SHARED else 0
    return plan_of((plan_table(config, spec) for spec in config.tables()), present)


def plan_of(tables: Iterable[TablePlan], present: int = 0) -> Plan:
    """A plan of some tables on this machine as it is now; ``present``: bytes of shared memory that are there for them."""
    planned = tuple(tables)
    loading = LOADING_BYTES + max((table.reading_bytes for table in planned), default=0)  # they are read one after the other
    left = address_space_left()
    free = available_bytes() if left is None else min(available_bytes(), left)
    return Plan(tables=planned, loading_bytes=loading, available_bytes=free, present_bytes=present)


def plan_table(
    config: ServerConfig, spec: TableSpec, source: str | None = None, *, fills_host: bool | None = None
) -> TablePlan:
    """Plan one table.

    Args:
        source: sparse model to load instead of the table's own.
        fills_host: rows are loaded into host memory; by default as the config says for the start.

    Raises:
        ModelFileError: the sparse model is missing or does not fit the table.
    """
    with open_model(source or spec.source, spec.dim) as reader:
        rows, reading_bytes = reader.rows, reader.working_bytes
    host = config.volatile_db
    keeps_rows = host.type in _IN_HOST_MEMORY
    fills_host = keeps_rows and (host.initialize_after_startup if fills_host is None else fills_host)
    host_rows = _host_rows(host, rows) if fills_host else 0
    recency = RECENCY_OF_POLICY[host.overflow_policy] if _bound(host) else 0
    slower = [section for _, section in config.tier_sections() if section is not host]
    persistent = any(section.initialize_after_startup for section in slower)
    shared = shared_bytes(host_rows, spec.dim, recency) if host.type == _SHARED else 0
    private = content_bytes(host_rows, spec.dim, recency) if keeps_rows else 0
    plan = TablePlan(
        model=spec.model,
        table=spec.name,
        dim=spec.dim,
        rows=rows,
        host_rows=host_rows,
        host_bytes=shared or private,
        shared_bytes=shared,
        persistent_bytes=rows * (8 + 4 * spec.dim) if persistent else 0,
        reading_bytes=reading_bytes,
    )
    return _with_caches(plan, config, spec, host_rows if fills_host else rows, keeps_rows=keeps_rows)


def _with_caches(plan: TablePlan, config: ServerConfig, spec: TableSpec, rows: int, *, keeps_rows: bool) -> TablePlan:
    """The plan of a table with that of its caches, which are opened for so many rows."""
    model = next(model for model in config.models if model.model == spec.model)
    devices = _cache_devices(config, model.deployed_device_list)
    shape = None if devices is None else cache_shape(model, spec, rows)
    if devices is None or shape is None:
        return plan
    mirrors = devices and keeps_rows and may_mirror(shape.kind, shape.whole, model.miss_path)
    return replace(
        plan,
        cache_rows=shape.rows,
        cache_bytes=shape_bytes(spec, shape),
        index_mirror_bytes=index_bytes(lines_for(plan.host_rows)) if mirrors else 0,
        devices=devices,
    )


def _cache_devices(config: ServerConfig, listed: tuple[int, ...]) -> tuple[int, ...] | None:
    """The devices with a cache of a table; empty if the cache is in host memory, None if there is none."""
    if listed and driver.device_count():
        return listed
    return () if config.cache_on_cpu and not driver.device_count() else None


def _bound(section: VolatileDatabaseConfig) -> int | None:
    """The most rows that host memory keeps of a table, or None: any number."""
    bound = section.overflow_margin * section.num_partitions
    return None if bound >= 2**64 - 1 else bound


def _host_rows(section: VolatileDatabaseConfig, rows: int) -> int:
    """Rows that host memory has room for once a file of so many is loaded."""
    loaded = rows_to_load(rows, section.initial_cache_rate)
    bound = _bound(section)
    return loaded if bound is None else min(loaded, bound + section.max_batch_size)
