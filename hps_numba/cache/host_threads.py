"""Threads of this process that gather rows for devices: one set for all caches, started with the first user.

They run one compiled function for as long as the process lives (``kernels.host.gathering``), so no exception and no signal
reaches them, they never need the GIL, and an interpreter that exits does not wait for them: what they read outlives it. Whoever
starts them waits until they are in that function: one that could not be loaded ends its thread before any batch relies on it.
In a forked child there are none, as there is no device.
"""

from __future__ import annotations

import logging
import sys
import threading
import time

import numpy as np

from hps_numba.errors import CapacityError
from hps_numba.kernels.host.gathering import FUTEX, begin_batch, gather_for_devices, wake_gatherers
from hps_numba.kernels.layouts.gathering import (
    CONTROL_BYTES,
    COUNT,
    MAX_THREADS,
    MAX_USERS,
    SLEEPERS,
    STATES,
    TABLE,
)
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.immortal import keep_forever
from hps_numba.runtime.threads import available_cores, start_thread

__all__ = ["HostThreads", "host_threads"]

log = logging.getLogger(__name__)
_MOST = 15  # more bring little: from there on memory is the limit
_PAUSE = 2e-5


class HostThreads:
    """The threads of a process and those for whom they gather.

    Attributes:
        count: of threads; 0: none can be had here.

    Thread safety: all methods.
    """

    def __init__(self) -> None:
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have no threads, as at the start and in a forked child."""
        self._changing = threading.RLock()
        self._control = np.zeros(CONTROL_BYTES // 8, np.int64)
        self._address: int = self._control.__array_interface__["data"][0]
        self._started: list[threading.Thread] = []
        self._users: dict[int, object] = {}
        self.count = min(_MOST, MAX_THREADS, max(1, available_cores() - 1)) if FUTEX and sys.platform == "linux" else 0

    def add(self, shared: int, memory: object) -> bool:
        """Gather for a user from now on, whose words are at this address; False if nobody can.

        ``memory``: keeps all memory of the user until ``remove``, or the end of the process.
        """
        with self._changing:
            table = self._control[TABLE // 8 : TABLE // 8 + MAX_USERS]
            free = np.flatnonzero(table == 0)
            if not len(free) or not self._start():
                return False
            self._users[shared] = memory
            table[free[0]] = shared
            self._control[COUNT // 8] = max(self._control[COUNT // 8], free[0] + 1)
            return True

    @property
    def at_work(self) -> bool:
        """There is a thread that gathers."""
        return any(thread.is_alive() for thread in self._started)

    def _start(self) -> bool:
        """Have the threads; False if there is none."""
        if not self._started:
            keep_forever((self._control, self._users))
        while len(self._started) < self.count:
            state = self._address + STATES + 64 * len(self._started)
            name = f"hps_numba_gather_{len(self._started)}"
            try:
                args = (self._address, state)
                self._started.append(start_thread(_gather, args, name=name, purpose="gathering rows for devices"))
            except CapacityError:
                self.count = len(self._started)  # as many as there are
        while self._still_starting() > 0:
            time.sleep(_PAUSE)
        return self.at_work

    def _still_starting(self) -> int:
        """Threads that have neither begun to look at the table nor ended."""
        alive = [number for number, thread in enumerate(self._started) if thread.is_alive()]
        looking = sum(self._control[(STATES + 64 * number) // 8] != 0 for number in alive)
        return len(alive) - looking - int(self._control[SLEEPERS // 8])

    def remove(self, shared: int) -> None:
        """Gather for a user no more; when this returns no thread looks at its words. All its batches are over."""
        with self._changing:
            table = self._control[TABLE // 8 : TABLE // 8 + MAX_USERS]
            table[table == shared] = 0
            wake_gatherers(self._address)
            for number, thread in enumerate(self._started):
                place = (STATES + 64 * number) // 8
                seen = self._control[place]
                while seen and self._control[place] == seen and thread.is_alive():
                    time.sleep(_PAUSE)
            self._users.pop(shared, None)

    def begin(self, shared: int) -> None:
        """A batch of a user is about to be started on its device."""
        begin_batch(self._address, shared)


def _gather(control: int, state: int) -> None:
    try:
        gather_for_devices(control, state)
    except Exception as problem:  # of the compiler, or of the memory: devices read rows themselves
        log.warning("a thread that gathers rows for devices has ended: %s: %s", type(problem).__name__, problem)


host_threads = HostThreads()
