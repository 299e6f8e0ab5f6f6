"""CPU time of a process and its children, from ``/proc``."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = ["tree_cpu_seconds"]

_PROC = Path("/proc")
_PARENT, _USER, _SYSTEM, _CHILDREN_USER, _CHILDREN_SYSTEM = 1, 11, 12, 13, 14  # fields of stat after the name


def tree_cpu_seconds(pid: int) -> float | None:
    """CPU seconds that a process and those that it has started have used so far, ended ones included if they were waited for.

    None where there is no ``/proc``, or no such process.
    """
    stats = dict(_stats())
    if pid not in stats:
        return None
    children = defaultdict(list)
    for number, fields in stats.items():
        children[int(fields[_PARENT])].append(number)
    ticks, left = 0, [pid]
    while left:
        number = left.pop()
        left += children[number]
        fields = stats[number]
        ticks += sum(int(fields[at]) for at in (_USER, _SYSTEM, _CHILDREN_USER, _CHILDREN_SYSTEM))
    return ticks / float(os.sysconf("SC_CLK_TCK"))


def _stats() -> Iterator[tuple[int, list[str]]]:
    for place in _PROC.glob("[0-9]*"):
        try:
            text = (place / "stat").read_text()
        except OSError:  # it has ended
            continue
        yield int(place.name), text.rpartition(")")[2].split()
