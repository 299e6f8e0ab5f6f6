"""Detects other programs that keep the processors busy during a measurement."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Watch"]

_STAT = Path("/proc/stat")
_IDLE, _WAITING, _STOLEN = 3, 4, 7  # columns of the line for all processors, in ticks


class Watch:
    """Observes the processors from its creation on. If the system does not tell (not Linux), others are taken as idle."""

    #: cores kept busy by others, above which a measurement is disturbed
    LIMIT = 0.2

    def __init__(self) -> None:
        self._start = _now()

    def cores(self) -> float:
        """Mean number of cores kept busy by programs other than this one and its children."""
        all_busy, own, now = (after - before for after, before in zip(_now(), self._start, strict=True))
        return max(0.0, all_busy - own) / now if all_busy and now else 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other programs were so busy that times mean little."""
        return self.cores() > self.LIMIT


def _now() -> tuple[float, float, float]:
    """Seconds: busy time of all processors; busy time of this program; wall clock."""
    own = os.times()
    return _busy(), own.user + own.system + own.children_user + own.children_system, time.perf_counter()


def _busy() -> float:
    if not _STAT.exists():
        return 0.0
    with _STAT.open() as file:
        ticks = [int(tick) for tick in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[_IDLE] - ticks[_WAITING] - ticks[_STOLEN]) / os.sysconf("SC_CLK_TCK")
