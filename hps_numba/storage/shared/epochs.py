"""The epochs of a segment: those of ``storage.host.epochs``, with the records of all processes in it.

*Readers that died.* A record of a process that ended would keep memory for ever. A writer that meets an old one looks whether
its process lives, and clears it if not.

*Whoever follows a header.* Caches keep the address of an index block, and kernels on a device keep no record here. So such a
process has a guard record: the epoch up to which its caches were told and its kernels have left. A thread of its own moves it
on: it looks at the headers, tells the caches of another index, waits for the readers of this process that may have begun
before, and asks the devices. So memory that another process replaced stays as long as any cache may lead to it, and nobody
waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

import numpy as np

from hps_numba.errors import ClosedError
from hps_numba.kernels.host.epoch import epoch_enter
from hps_numba.runtime.weak import members
from hps_numba.storage.host.epochs import Epochs, Guard
from hps_numba.storage.shared.layout import GUARD_RECORD, RECORD_WORDS, RECORDS, W_EPOCH, W_PUBLISHED
from hps_numba.storage.shared.segment import Segment

__all__ = ["Followed", "SharedEpochs"]

_FOLLOW_SECONDS = 0.005
_PROBE_SECONDS = 0.01


class Followed(Protocol):
    """A header whose watchers have to be told."""

    def follow(self) -> bool:
        """Tell the watchers of the index block in force if it is another one; returns whether it was."""

    def reset_after_fork(self) -> None:
        """Have a new lock, in a forked child."""


class SharedEpochs(Epochs):
    """The epochs of a segment for the readers of this process.   Thread safety: every method.

    Attributes:
        segment: whose they are.
    """

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.segment = segment
        self._now = segment.words[W_EPOCH : W_EPOCH + RECORD_WORDS]
        self.address = segment.address + 8 * W_EPOCH
        self._followed: tuple[Followed, ...] = ()
        self._headers: WeakSet[Followed] = WeakSet()
        self._thread: threading.Thread | None = None
        self._renew()
        segment.after_fork.append(self._begin_in_child)
        segment.leaving.append(self.stop)

    def reset_after_fork(self) -> None:
        """Nothing: ``_begin_in_child`` comes once the child has a block of records."""

    def _renew(self) -> None:
        self._following = threading.RLock()
        self._claiming = threading.RLock()  # a signal handler may look up too
        self._stop = threading.Event()
        self._pending, self._published = 0, -1
        self._probed = 0.0
        self._idle = deque()
        if self.segment.blocks:
            self._offer(self.segment.blocks[0], RECORDS - 1)  # the last one is the guard

    def _begin_in_child(self) -> None:
        self._guards, self._readings, self._thread = {}, {}, None
        self._renew()
        for header in members(self._headers):  # before a thread uses them
            header.reset_after_fork()
        if self._followed:
            self._enter_guard()
            self._start()

    def renew_in_child(self, header: Followed) -> None:
        """Call its ``reset_after_fork`` in forked children."""
        self._headers.add(header)

    # -- records ------------------------------------------------------------------------------------------------------------

    def _record(self, block: int, number: int) -> int:
        return int(self.segment.records[block, number].__array_interface__["data"][0])

    def _offer(self, block: int, count: int) -> None:
        self._idle.extend(self._record(block, number) for number in range(count))

    def acquire(self) -> int:
        while True:
            try:
                return self._idle.pop()
            except IndexError:
                with self._claiming:
                    if not self._idle:
                        block = self.segment.claim_block()
                        self._offer(block, RECORDS if len(self.segment.blocks) > 1 else RECORDS - 1)

    def oldest(self) -> int:
        now = int(self._now[0])
        if now >= self._next_look and self._readings:
            self._next_look = now + 64
            self._end_lost()
        low = self._oldest_record(now)
        if low < now and time.monotonic() - self._probed > _PROBE_SECONDS:
            self._probed = time.monotonic()
            self._forget_dead(now)
            low = self._oldest_record(now)
        return min([low, *(guard.oldest(now) for guard in self._guards.copy().values())])

    def _oldest_record(self, now: int) -> int:
        """The oldest epoch with a reader of any process, or one that a process has yet to follow."""
        epochs = self.segment.records[self._used_blocks(), :, 0]
        active = epochs[epochs > 0]
        return min(now, int(active.min())) if active.size else now

    def _used_blocks(self) -> np.ndarray:
        """Blocks of processes that are there; of a copy, as NumPy raises if others change what it looks through."""
        return np.flatnonzero(self.segment.pids.copy())

    def _forget_dead(self, now: int) -> None:
        for block in self._used_blocks().tolist():
            epochs = self.segment.records[block, :, 0]
            if ((epochs > 0) & (epochs < now)).any():
                self.segment.is_dead(block)

    def _oldest_here(self) -> int:
        """The oldest epoch of a reader of this process, but its guard; a large number if there is none."""
        own = list(self.segment.blocks)
        epochs = self.segment.records[own, :, 0]
        if own:
            epochs[0, GUARD_RECORD] = 0
        active = epochs[epochs > 0]
        return int(active.min()) if active.size else 1 << 62

    def wait_for_own(self, seconds: float) -> bool:
        """Wait for the readers of this process that have begun before; False if that takes longer."""
        tag, end = self.advance(), time.monotonic() + seconds
        while self._oldest_here() <= tag:
            if time.monotonic() > end:
                return False
            time.sleep(1e-3)
            self._end_lost()
        return True

    # -- following ----------------------------------------------------------------------------------------------------------

    def follow(self, header: Followed) -> None:
        """From now on tell the watchers of ``header`` what other processes publish."""
        with self._following:
            if not self._followed:
                self._enter_guard()
            self._followed, self._published = (*self._followed, header), -1
            self._start()

    def unfollow(self, header: Followed) -> None:
        """Undo ``follow``."""
        with self._following:
            self._followed = tuple(other for other in self._followed if other is not header)
            if not self._followed and self.segment.blocks:
                self.segment.records[self.segment.blocks[0], GUARD_RECORD, 0] = 0

    def _enter_guard(self) -> None:
        if not self.segment.blocks:
            raise ClosedError(f"{self.segment.path}: this process has left the segment")
        epoch_enter(self.address, self._record(self.segment.blocks[0], GUARD_RECORD))

    def _start(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._stop = threading.Event()
            self._thread = threading.Thread(
                target=_follow_always, args=(self._stop, self.step), name="hps_numba_follow", daemon=True
            )
            self._thread.start()

    def step(self) -> None:
        """Tell the watchers what is new, and move the guard on."""
        with self._following:
            if not self._followed or not self.segment.blocks:
                return
            guard = self.segment.records[self.segment.blocks[0], GUARD_RECORD]
            epoch = int(self._now[0])  # before anything else is read
            published = int(self.segment.words[W_PUBLISHED])
            if published == self._published and not self._pending and guard[0] == epoch:
                return  # as always, where nobody writes
            if published != self._published:
                changed = [header.follow() for header in self._followed]
                self._published = published
                if any(changed):
                    self._pending = self.advance()
            if self._pending and self._oldest_here() <= self._pending:
                return
            self._pending = 0
            guard[0] = max(1, min([epoch, *(guard.oldest(epoch) for guard in self._guards.copy().values())]))

    def stop(self) -> None:
        """Follow no header any more."""
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._following:
            self._followed = ()

    def add_guard(self, guard: Guard) -> None:
        with self._following:
            super().add_guard(guard)

    def remove_guard(self, guard: Guard) -> None:
        with self._following:
            super().remove_guard(guard)


def _follow_always(stop: threading.Event, step: Callable[[], None]) -> None:
    while not stop.wait(_FOLLOW_SECONDS):
        step()
