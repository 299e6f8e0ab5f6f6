"""How many bytes a config will take, computed before anything is allocated.

What is not in a plan: the context of the CUDA driver, which is on a device before its free bytes are asked for, the code of
kernels (some MiB a device), answers and whatever else belongs to callers, arguments of a write while it runs, memory of slower
tiers, and the interpreter. Devices hand out memory in blocks of 2 MiB, so that many small tables may take a little more than is
planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from hps_numba.cache.index_mirror import with_room
from hps_numba.cache.memory_use import CacheMemory
from hps_numba.cache.promised import promised_bytes
from hps_numba.config import ServerConfig
from hps_numba.device import driver
from hps_numba.device import memory as device_memory
from hps_numba.device.host_memory import human_bytes
from hps_numba.device.machine_memory import address_space_left, available_bytes
from hps_numba.errors import CapacityError, ConfigError
from hps_numba.kernels.policies._policy import Policy
from hps_numba.server.table_plan import SHARED, TablePlan, plan_table, plan_tables
from hps_numba.storage.shared.segment import present_bytes

__all__ = ["DevicePlan", "Plan", "TablePlan", "make_plan", "plan_config", "plan_of", "plan_table", "room_on"]

#: bytes of keys that are in flight while a table is loaded
LOADING_BYTES = 16 << 20


class DeviceRoom(NamedTuple):
    """Bytes of a device: all, and those that are free and not promised to caches that are open."""

    total: int
    free: int


def room_on(device: int) -> DeviceRoom | None:
    """The room on a device now, or None: this machine has no such device."""
    if device >= driver.device_count():
        return None
    free = device_memory.free_bytes(device) - promised_bytes(device)
    return DeviceRoom(driver.device_info(device).total_bytes, max(0, free))


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """Bytes of one device.

    Attributes:
        device: CUDA ordinal.
        memory: of all caches, by what they are for, with those index mirrors for which there is room.
        free_bytes: bytes that are free for it: on the device when the plan was made, less what open caches will still take; of
            a server that is open, with what it has taken. None: this machine has no such device.
        total_bytes: bytes of the device, or None.
    """

    device: int
    memory: CacheMemory
    free_bytes: int | None
    total_bytes: int | None

    @property
    def bytes(self) -> int:
        """Bytes that are planned."""
        return self.memory.bytes

    @property
    def needed_bytes(self) -> int:
        """Those without which the server does not work: index mirrors only make it faster."""
        return self.memory.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether that is free, as far as it is known."""
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes

    def check(self) -> None:
        """Raise CapacityError unless it fits."""
        if self.free_bytes is None or self.fits:
            return
        sizes = {field.name.replace("_", " "): getattr(self.memory, field.name) for field in fields(self.memory)}
        largest = sorted((name for name in sizes if sizes[name]), key=lambda name: -sizes[name])
        parts = ", ".join(f"{name} {human_bytes(sizes[name])}" for name in largest if name != "index mirror")
        raise CapacityError(
            f"the plan takes {human_bytes(self.needed_bytes)} ({self.needed_bytes} bytes) of device {self.device}, "
            f"{human_bytes(self.free_bytes)} ({self.free_bytes} bytes) are free; it is {parts}; gpucacheper or "
            "cache_size_bytes makes caches smaller, max_batch_size or num_of_worker_buffer_in_pool workspaces"
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of a server, by tier.

    Attributes:
        tables: one plan a table.
        devices: one plan a device that has caches.
        loading_bytes: what loading takes beyond the tables, for as long as it lasts.
        available_bytes: memory that this process could take when the plan was made: free on the machine, and within the limits
            of its control groups, ``ulimit -v`` and ``ulimit -d``.
        present_bytes: shared memory that the segment of the config has taken already.
    """

    tables: tuple[TablePlan, ...]
    devices: tuple[DevicePlan, ...] = ()
    loading_bytes: int
    available_bytes: int
    present_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """Host memory of all tables, of caches in host memory, and what caches of devices have pinned."""
        return sum(table.all_host_bytes for table in self.tables)

    @property
    def pinned_bytes(self) -> int:
        """Of ``host_bytes``, those that caches of devices have pinned."""
        return sum(table.pinned_bytes for table in self.tables)

    @property
    def device_bytes(self) -> dict[int, int]:
        """Bytes on each device: of caches, workspaces, and those index mirrors for which there is room."""
        return {device.device: device.bytes for device in self.devices}

    @property
    def index_mirror_bytes(self) -> dict[int, int]:
        """Of ``device_bytes``, those of the index mirrors (``miss_path`` auto)."""
        return {device.device: device.memory.index_mirror for device in self.devices}

    @property
    def fits(self) -> bool:
        """Whether the machine has that much host memory free, and each device that much of its own."""
        return self.fits_host and all(device.fits for device in self.devices)

    @property
    def fits_host(self) -> bool:
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
            CapacityError: the plan does not fit; the message names the device, or the largest table in host memory.
        """
        for device in self.devices:
            device.check()
        if self.fits_host:
            return
        largest = max(self.tables, key=lambda table: table.all_host_bytes)
        raise CapacityError(
            f"the plan takes {human_bytes(self._missing_bytes)} of host memory, "
            f"{human_bytes(self.available_bytes)} are free; the largest table is {largest.model}/{largest.table} "
            f"with {human_bytes(largest.all_host_bytes)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sizes = {"device_bytes": self.device_bytes, "index_mirror_bytes": self.index_mirror_bytes}
        by_device = {name: {str(device): size for device, size in of.items()} for name, of in sizes.items()}
        tables = [
            {**asdict(table), "index_mirror_bytes": table.index_mirror_bytes, "pinned_bytes": table.pinned_bytes}
            for table in self.tables
        ]
        return {
            **asdict(self),
            "tables": tables,
            "host_bytes": self.host_bytes,
            "pinned_bytes": self.pinned_bytes,
            "shared_bytes": self.shared_bytes,
            **by_device,
            "fits": self.fits,
        }


def make_plan(config: ServerConfig) -> Plan:
    """Plan all tables of a config; opens the sparse models and reads their sizes only.

    A cache policy that the config names by a reference is code, which is not run to find out a size: its memory does not count.

    Raises:
        ConfigError: not a config.   ModelFileError: a sparse model is missing or does not fit its table.
        DeviceError: a device of the config does not answer.
    """
    if not isinstance(config, ServerConfig):
        raise ConfigError(f"config: expected what read_config returns, got {type(config).__name__}")
    return plan_config(config)


def plan_config(config: ServerConfig, policies: Iterable[Policy | None] = ()) -> Plan:
    """``make_plan`` with the policies of the caches, one a table, as far as they are known."""
    host = config.volatile_db
    present = present_bytes(host.shared_memory_name) if host.type == SHARED else 0
    return plan_of(plan_tables(config, config.tables(), policies), present)


def plan_of(tables: Iterable[TablePlan], present: int = 0, taken: Mapping[int, int] | None = None) -> Plan:
    """A plan of some tables on this machine as it is now.

    Args:
        present: bytes of shared memory that are there for them.   taken: bytes that they have taken of each device already.
    """
    planned = tuple(tables)
    devices = sorted({device for table in planned for device in table.devices})
    loading = LOADING_BYTES + max((table.reading_bytes for table in planned), default=0)  # they are read one after the other
    left = address_space_left()
    free = available_bytes() if left is None else min(available_bytes(), left)
    return Plan(
        tables=planned,
        devices=tuple(_plan_device(device, planned, (taken or {}).get(device, 0)) for device in devices),
        loading_bytes=loading,
        available_bytes=free,
        present_bytes=present,
    )


def _plan_device(device: int, tables: Iterable[TablePlan], taken: int) -> DevicePlan:
    caches = [table.cache for table in tables if device in table.devices]
    sizes = {field.name: sum(getattr(cache, field.name) for cache in caches) for field in fields(CacheMemory)}
    room = room_on(device)
    if room is None:
        return DevicePlan(device=device, memory=CacheMemory(**sizes), free_bytes=None, total_bytes=None)
    free = room.free + taken
    left = free - CacheMemory(**sizes).needed_bytes
    sizes["index_mirror"] = with_room([cache.index_mirror for cache in caches], room.total, left)
    return DevicePlan(device=device, memory=CacheMemory(**sizes), free_bytes=free, total_bytes=room.total)
