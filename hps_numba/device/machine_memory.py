"""How much memory and address space this process may take: of the machine, its control groups and its resource limits.

A process is in one control group (``/proc/self/cgroup``), and every group above it has a limit of its own: systemd services,
Slurm jobs and containers set theirs at different levels. The tightest one decides. Version 2 and version 1 are read.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["address_space_left", "available_bytes", "total_bytes"]

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self")
#: names in version 2 and version 1 of: the limit, what is used, the entry of memory.stat that the system can take back
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def total_bytes() -> int:
    """Physical memory of the machine, or the tightest limit of this process's control groups if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 36
    return min([machine, *(limit for limit, _ in _group_limits())])


def available_bytes() -> int:
    """Memory that can be allocated without swapping: the system's estimate, and at most what each control group has left."""
    free = min([total_bytes(), *(left for _, left in _group_limits())])
    try:
        with Path("/proc/meminfo").open() as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return min(free, int(line.split()[1]) * 1024)
    except OSError:  # not Linux
        return free
    return free


def address_space_left() -> int | None:
    """Bytes of private memory that can still be mapped under ``ulimit -v`` and ``ulimit -d``; None without such a limit."""
    if resource is None:
        return None
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if all(limit == resource.RLIM_INFINITY for limit in limits):
        return None
    try:
        pages = [int(field) for field in (_PROCESS / "statm").read_text().split()]
    except (OSError, ValueError):  # not Linux: nothing tells what is used
        pages = [0] * 7
    used = (pages[0] * mmap.PAGESIZE, pages[5] * mmap.PAGESIZE)
    return max(0, min(limit - taken for limit, taken in zip(limits, used) if limit != resource.RLIM_INFINITY))


def _group_limits() -> Iterator[tuple[int, int]]:
    """``(limit, left)`` in bytes of each control group of this process that has a limit."""
    for folder, (limit_name, used_name, cache_name) in _groups():
        limit, used = _read_number(folder / limit_name), _read_number(folder / used_name)
        if limit is not None:
            left = limit if used is None else limit - used + _page_cache(folder, cache_name)
            yield limit, min(limit, max(0, left))


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's control groups, from its own up to the root, each with its file names."""
    try:
        lines = os.fsdecode((_PROCESS / "cgroup").read_bytes()).splitlines()  # names of groups are any bytes
    except OSError:  # not Linux
        lines = []
    own = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    version_1 = next((path for controllers, path in own.items() if "memory" in controllers.split(",")), "/")
    for root, path, names in ((_CGROUPS, own.get("", "/"), _V2), (_CGROUPS / "memory", version_1, _V1)):
        # a path outside of a container's own view begins with "..": the container sees its own group as the root
        parts = [part for part in path.split("/") if part]
        parts = [] if ".." in parts else parts
        for length in range(len(parts), -1, -1):
            yield root.joinpath(*parts[:length]), names


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _page_cache(folder: Path, name: str) -> int:
    """Bytes of files in memory that a group gives back when it needs them."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))
    except (OSError, ValueError, IndexError):  # absent, or nothing that Linux writes
        return 0
