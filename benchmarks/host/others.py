"""How busy other programs keep the processors while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["Watch"]

_STAT = Path("/proc/stat")
_IDLE, _WAITING, _STOLEN = 3, 4, 7  # places in the line of all processors, in ticks


class Watch:
    """Looks at the processors from its making on. Where the system does not tell (not Linux), others count as idle."""

    #: cores that others may keep busy before a measurement counts as disturbed
    LIMIT = 0.2

    def __init__(self) -> None:
        self._start = _now()

    def cores(self) -> float:
        """Cores that programs other than this one and its children have kept busy since."""
        all_busy, own, now = (after - before for after, before in zip(_now(), self._start, strict=True))
        return max(0.0, all_busy - own) / now if all_busy and now else 0.0

    @property
    def disturbed(self) -> bool:
        """Others were so busy that times mean little."""
        return self.cores() > self.LIMIT


def _now() -> tuple[float, float, float]:
    """Seconds: busy, of all processors; busy, of this program; on the clock."""
    own = os.times()
    return _busy(), own.user + own.system + own.children_user + own.children_system, time.perf_counter()


def _busy() -> float:
    if not _STAT.exists():
        return 0.0
    with _STAT.open() as file:
        ticks = [int(tick) for tick in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[_IDLE] - ticks[_WAITING] - ticks[_STOLEN]) / os.sysconf("SC_CLK_TCK")
