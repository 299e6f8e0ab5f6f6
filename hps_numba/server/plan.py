"""How many bytes a config will take, said before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.cache.index_mirror import may_mirror
from hps_numba.config import ServerConfig, TableSpec, VolatileDatabaseConfig
from hps_numba.device import driver
from hps_numba.device.host_memory import available_bytes, human_bytes
from hps_numba.errors import CapacityError
from hps_numba.kernels.layouts.host_store import index_bytes, lines_for
from hps_numba.server.cache_shape import cache_shape, shape_bytes
from hps_numba.storage.host.content import content_bytes
from hps_numba.storage.host.store import RECENCY_OF_POLICY
from hps_numba.storage.loading import rows_to_load
from hps_numba.storage.model_files import open_model

__all__ = ["Plan", "TablePlan", "make_plan", "plan_table"]

_IN_HOST_MEMORY = ("hash_map", "parallel_hash_map")
#: keys that are in flight while a table is loaded
LOADING_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Bytes of one table.

    Attributes:
        rows: rows in the file, duplicates included.
        host_rows: rows that host memory will hold at the start.
        host_bytes: bytes they take, index included.
        persistent_bytes: bytes of keys and rows in the persistent database, or 0.
        cache_rows: rows that each cache has room for, or 0.
        cache_bytes: bytes that each cache takes, without the buffers of batches.
        index_mirror_bytes: bytes that a copy of host memory's index takes beside each cache on a device, if there is room.
        devices: CUDA ordinals that have a cache of the table; with none, ``cache_bytes`` are of host memory.
    """

    model: str
    table: str
    dim: int
    rows: int
    host_rows: int
    host_bytes: int
    persistent_bytes: int
    cache_rows: int = 0
    cache_bytes: int = 0
    index_mirror_bytes: int = 0
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a server, a tier at a time.

    Attributes:
        tables: one plan a table.
        loading_bytes: what loading takes beyond the tables, for as long as it lasts.
        available_bytes: free memory of the machine when the plan was made.
    """

    tables: tuple[TablePlan, ...]
    loading_bytes: int
    available_bytes: int

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
        """Bytes of the copies of indexes on each device, if there is room for all of them (``cache.index_mirror``)."""
        return self._on_devices(lambda table: table.index_mirror_bytes)

    def _on_devices(self, size_of: Callable[[TablePlan], int]) -> dict[int, int]:
        devices = sorted({device for table in self.tables for device in table.devices})
        return {device: sum(size_of(table) for table in self.tables if device in table.devices) for device in devices}

    @property
    def fits(self) -> bool:
        """The machine has that much free."""
        return self.host_bytes + self.loading_bytes <= self.available_bytes

    def check(self) -> None:
        """Raise CapacityError if the plan does not fit, naming the largest table."""
        for device, size in self.device_bytes.items():
            free = driver.free_bytes(device)
            if size > free:
                raise CapacityError(
                    f"the plan takes {human_bytes(size)} of device {device}, {human_bytes(free)} are free; "
                    "gpucacheper or cache_size_bytes makes caches smaller"
                )
        if self.fits:
            return
        largest = max(self.tables, key=lambda table: table.host_bytes)
        raise CapacityError(
            f"the plan takes {human_bytes(self.host_bytes + self.loading_bytes)} of host memory, "
            f"{human_bytes(self.available_bytes)} are free; the largest table is {largest.model}/{largest.table} "
            f"with {human_bytes(largest.host_bytes)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sizes = {"device_bytes": self.device_bytes, "index_mirror_bytes": self.index_mirror_bytes}
        by_device = {name: {str(device): size for device, size in of.items()} for name, of in sizes.items()}
        return {**asdict(self), "host_bytes": self.host_bytes, **by_device, "fits": self.fits}


def make_plan(config: ServerConfig) -> Plan:
    """Plan all tables of a config; opens the sparse models and reads their sizes only.

    Raises:
        ModelFileError: a sparse model is missing or does not fit its table.
    """
    return plan_of(plan_table(config, spec) for spec in config.tables())


def plan_of(tables: Iterable[TablePlan]) -> Plan:
    """A plan of some tables on this machine as it is now."""
    return Plan(tables=tuple(tables), loading_bytes=LOADING_BYTES, available_bytes=available_bytes())


def plan_table(
    config: ServerConfig, spec: TableSpec, source: str | None = None, *, fills_host: bool | None = None
) -> TablePlan:
    """Plan one table.

    Args:
        source: sparse model to load instead of the table's own.
        fills_host: rows are loaded into host memory; by default what the config says of the start.
    """
    with open_model(source or spec.source, spec.dim) as reader:
        rows = reader.rows
    if fills_host is None:
        fills_host = config.volatile_db.initialize_after_startup
    keeps_rows = config.volatile_db.type in _IN_HOST_MEMORY
    fills_host = fills_host and keeps_rows
    host_rows = _host_rows(config.volatile_db, rows) if fills_host else 0
    recency = RECENCY_OF_POLICY[config.volatile_db.overflow_policy] if _bound(config.volatile_db) else 0
    model = next(model for model in config.models if model.model == spec.model)
    places = _cache_places(config, model.deployed_device_list)
    shape = None if places is None else cache_shape(model, spec, host_rows if keeps_rows and fills_host else rows)
    copies = shape is not None and places and keeps_rows and may_mirror(shape.kind, shape.whole, model.miss_path)
    index_mirror = index_bytes(lines_for(host_rows)) if copies else 0
    persistent = config.persistent_db.type != "disabled" and config.persistent_db.initialize_after_startup
    return TablePlan(
        model=spec.model,
        table=spec.name,
        dim=spec.dim,
        rows=rows,
        host_rows=host_rows,
        host_bytes=content_bytes(host_rows, spec.dim, recency) if keeps_rows else 0,
        persistent_bytes=rows * (8 + 4 * spec.dim) if persistent else 0,
        cache_rows=0 if shape is None else shape.rows,
        cache_bytes=0 if shape is None else shape_bytes(spec, shape),
        index_mirror_bytes=index_mirror,
        devices=places if shape is not None and places else (),
    )


def _cache_places(config: ServerConfig, listed: tuple[int, ...]) -> tuple[int, ...] | None:
    """The devices with a cache of a table; none of them if it is in host memory, and None if there is no cache."""
    if listed and driver.device_count():
        return listed
    return () if config.cache_on_cpu and not driver.device_count() else None


def _bound(section: VolatileDatabaseConfig) -> int | None:
    bound = section.overflow_margin * section.num_partitions
    return None if bound >= 2**64 - 1 else bound


def _host_rows(section: VolatileDatabaseConfig, rows: int) -> int:
    wanted = rows_to_load(rows, section.initial_cache_rate)
    bound = _bound(section)
    return wanted if bound is None else min(wanted, bound + section.max_batch_size)
