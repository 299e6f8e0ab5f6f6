"""What a consumer does when the bus has dropped updates that it had not read: the same as a server that starts now.

The files of the models are loaded again, those of the version in force, and everything that the bus still has is applied once
more, in order. So if the files are newer than what the bus drops, nothing is missing in the end. Turned down: to go on after
the gap, as rows would then be wrong until they change again; to load the files and go on, as what was applied since the files
were written would be gone. Rows on a disk may be newer than the files by months: there it is only done if the config says so.

A process that is killed meanwhile finds the gap again: the bus is told of the new positions only where nothing was lost, before
the files are loaded, and of the others when they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from hps_numba.updates._backlog import Backlog
from hps_numba.updates._polled import Polled
from hps_numba.updates._update import Lost

__all__ = ["Recovery", "Reload"]

_SLICE = 0.05  # seconds between two looks
_KEEP_ALIVE_AFTER = 0.5  # seconds


@dataclass(frozen=True)
class Reload:
    """Waits in the backlog: load the files again, and say so.

    Attributes:
        lost: what the bus has dropped.   done: gets an entry when the files are loaded, or cannot be.
    """

    lost: Sequence[Lost]
    done: SimpleQueue[None] = field(default_factory=SimpleQueue)
    size: int = 0


class Recovery:
    """One recovery.

    Args:
        drop: nothing that waits is applied any more.   forget: no position is known any more.

    Thread safety: the thread that reads.
    """

    def __init__(
        self, source: Polled, backlog: Backlog, lost: Sequence[Lost], drop: Callable[[], object], forget: Callable[[], object]
    ) -> None:
        self._source, self._backlog, self._forget = source, backlog, forget
        self._reload = Reload(lost)
        self._asked = self._loaded = False
        self._alive = time.monotonic()
        drop()

    def go_on(self) -> bool:
        """Do some more, for a moment; returns whether it is done. It can be called again after an exception.

        Raises:
            TierError: the source failed for now.
        """
        if not self._asked:
            if self._backlog.messages:  # what is being applied
                self._wait()
                return False
            self._source.start_over(self._reload.lost)
            self._forget()
            self._backlog.put([self._reload])
            self._asked = True
        if not self._loaded:
            self._wait()
            if not self._loaded:
                return False
        self._source.losses_handled()
        return True

    def _wait(self) -> None:
        try:
            self._reload.done.get(timeout=_SLICE)
            self._loaded = True
        except Empty:
            if time.monotonic() - self._alive > _KEEP_ALIVE_AFTER:
                self._alive = time.monotonic()
                self._source.keep_alive()
