"""Epoch-based reclamation: when memory may be reused (K. Fraser, "Practical lock-freedom", 2004, section 5.2.3).

A reader writes the current epoch to a record of its own before it reads and clears it after. The writer first makes memory
unreachable, then ends the epoch; that memory may be reused once no record shows that epoch or an older one. Readers never
wait, and a reader that starts later can no longer find the memory.
"""

from __future__ import annotations

import time
from collections import deque
from types import FrameType, TracebackType
from typing import Protocol

import numpy as np

from hps_numba.kernels.host.epoch import epoch_advance, epoch_enter, epoch_leave
from hps_numba.runtime.blocks import frame_of_block, has_ended
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Epochs", "Guard", "Reading"]

_WORDS = 8  # a record has a cache line of its own
_BLOCK = 64
_LATE_EPOCHS = 64  # so many epochs behind, a reader may be one that an interrupt kept from leaving
_FIRST_PAUSE, _LAST_PAUSE = 1e-5, 1e-3


class Guard(Protocol):
    """Readers that keep no record here, such as kernels on a device."""

    def oldest(self, now: int) -> int:
        """The oldest epoch that they may still be in, ``now`` (the current one) if in none; never one that is too new."""


class Epochs:
    """Records of the readers of one store, so that a writer does not wait for readers of another.

    Attributes:
        address: of the word that holds the current epoch.

    Thread safety: every method, without a lock.
    """

    def __init__(self) -> None:
        self._now = np.ones(_WORDS, np.int64)
        self.address: int = self._now.__array_interface__["data"][0]
        self._blocks: list[np.ndarray] = []
        self._idle: deque[int] = deque()
        self._guards: dict[int, Guard] = {}  # changed by single steps: caches of a store add theirs from any thread
        self._readings: dict[
            Reading, tuple[int, FrameType | None]
        ] = {}  # the record of each block, and the frame that is in it
        self._next_look = _LATE_EPOCHS
        register_fork_reset(self)

    def acquire(self) -> int:
        """Address of a record for one reader, until ``release``."""
        while True:
            try:
                return self._idle.pop()
            except IndexError:
                block = np.zeros((_BLOCK, _WORDS), np.int64)
                self._blocks.append(block)  # before any of its records is in use: the writer must see them all
                first: int = block.__array_interface__["data"][0]
                self._idle.extend(first + 8 * _WORDS * i for i in range(_BLOCK))

    def release(self, record: int) -> None:
        """Return a record, after its reader has finished."""
        self._idle.append(record)

    def reading(self) -> Reading:
        """A block that holds an epoch over several kernels."""
        return Reading(self)

    def begin(self, reading: Reading, frame: FrameType | None) -> None:
        """Enter the epoch for a block of this frame (``runtime.blocks``)."""
        record = self.acquire()
        self._readings[reading] = record, frame
        epoch_enter(self.address, record)

    def end(self, reading: Reading) -> None:
        """Leave the epoch of a block; again does nothing."""
        entry = self._readings.get(reading)
        if entry is not None:
            epoch_leave(entry[0])  # first: if an interrupt comes next, only the entry is left
            if self._readings.pop(reading, None) is not None:
                self.release(entry[0])

    def _end_lost(self) -> None:
        """End the blocks that an interrupt kept from being left."""
        for reading in list(self._readings):
            record, frame = self._readings.get(reading, (0, None))
            if has_ended(frame) and self._readings.pop(reading, None) is not None:
                epoch_leave(record)
                self.release(record)

    def add_guard(self, guard: Guard) -> None:
        """Let ``oldest`` count the readers of ``guard`` too."""
        self._guards[id(guard)] = guard

    def remove_guard(self, guard: Guard) -> None:
        """Undo ``add_guard``: its readers have finished."""
        self._guards.pop(id(guard), None)

    @property
    def now(self) -> int:
        """The current epoch."""
        return int(self._now[0])

    def advance(self) -> int:
        """End the current epoch and return it: the tag of what was made unreachable before the call."""
        return epoch_advance(self.address)

    def oldest(self) -> int:
        """The oldest epoch with a reader in it, else the current one: what has a lower tag may be reused."""
        now = int(self._now[0])
        if now >= self._next_look and self._readings:
            self._next_look = now + _LATE_EPOCHS
            self._end_lost()
        active = [int(e) for block in list(self._blocks) for e in block[:, 0] if e]
        active += [guard.oldest(now) for guard in self._guards.copy().values()]
        return min(active, default=now)

    def wait(self, tag: int, seconds: float) -> bool:
        """Wait until no reader is in epoch ``tag`` or an older one; False if some still are after ``seconds``."""
        end = time.monotonic() + seconds
        pause = _FIRST_PAUSE
        while self.oldest() <= tag:
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
            if pause == _LAST_PAUSE:
                self._end_lost()
        return True

    def reset_after_fork(self) -> None:
        """In a forked child: the readers of the parent's other threads do not exist here."""
        for block in self._blocks:
            block[:] = 0
        self._guards = {}  # devices are the parent's


class Reading:
    """What ``Epochs.reading`` gives: entered once."""

    __slots__ = ("_epochs",)

    def __init__(self, epochs: Epochs) -> None:
        self._epochs = epochs

    def __enter__(self) -> None:
        self._epochs.begin(self, frame_of_block())

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._epochs.end(self)
