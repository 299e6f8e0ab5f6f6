"""Fetches from the slower tiers of a table that are under way, their answers, and how lookups find those to join."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from queue import SimpleQueue
from types import FrameType

import numpy as np

__all__ = ["Flight", "SharedAnswer", "common_keys", "samples_of"]


@dataclass
class SharedAnswer:
    """Rows of the slower tiers for distinct keys; read by several threads, so nobody changes it once it is shared.

    Attributes:
        rows: float32 ``[n, dim]``, the table's default value where there is none.
        found: bool ``[n]``.   unsure: bool ``[n]``, as in ``StackAnswer``.
        errors: calls of tiers that failed, of those that this thread made.
        joined: keys that another thread asked for.
    """

    rows: np.ndarray
    found: np.ndarray
    unsure: np.ndarray
    errors: int = 0
    joined: int = 0

    def at(self, places: np.ndarray) -> SharedAnswer:
        """The answer for some of the keys, by their places."""
        return SharedAnswer(self.rows[places], self.found[places], self.unsure[places], joined=len(places))

    def copied(self) -> SharedAnswer:
        """The same in memory of its own."""
        return replace(self, rows=self.rows.copy(), found=self.found.copy(), unsure=self.unsure.copy())

    def put(self, positions: np.ndarray, part: SharedAnswer) -> None:
        """Take over the answer for the keys at some positions."""
        self.rows[positions], self.found[positions], self.unsure[positions] = part.rows, part.found, part.unsure
        self.errors += part.errors
        self.joined += part.joined


_FACTOR = np.int64(-7046029254386353131)  # 2**64 divided by the golden ratio, odd: mixes the bits of keys


def samples_of(keys: np.ndarray) -> frozenset[int]:
    """The least and the greatest hash of some keys.

    Lookups with a share ``s`` of all their keys in common have one of them in common with a chance of ``1 - (1 - s)**2``.
    """
    if not len(keys):
        return frozenset()
    hashes = keys * _FACTOR
    return frozenset((int(np.minimum.reduce(hashes)), int(np.maximum.reduce(hashes))))


class Flight:
    """One fetch under way. All that threads need is in attributes; queues only end their sleep.

    Attributes:
        keys: int64 ``[n]``, distinct.
        count: of the writes when it began; None if one was in progress.
        deadline: of the thread that asks.   thread, frame: which that is, and where.
        answer: None until it is there, after an error, and if nobody had asked to be woken when it was there.
        ended: it has ended, whatever became of it.
    """

    def __init__(self, keys: np.ndarray, samples: frozenset[int], count: int | None, deadline: float | None) -> None:
        self.keys, self._samples = keys, samples
        self.count = count
        self.deadline = deadline
        self.thread = threading.get_ident()
        self.frame: FrameType | None = None
        self.answer: SharedAnswer | None = None
        self.ended = False
        self._waiting: list[SimpleQueue[None]] = []
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def is_like(self, samples: frozenset[int]) -> bool:
        """Whether it has one of some samples, in its keys or those of a lookup that it asks for."""
        if not self._samples:
            self._samples = samples_of(self.keys)
        return not samples.isdisjoint(self._samples)

    def answered(self, answer: SharedAnswer, *, lasting: bool) -> None:
        """Keep an answer for those that wait; a copy unless it is ``lasting``, which is made only if somebody waits.

        Who asks to be woken after that finds none, and asks the tiers.
        """
        if lasting or self._waiting:
            self.answer = answer if lasting else answer.copied()

    def end(self) -> None:
        """Wake all that wait."""
        self.ended = True
        for inbox in list(self._waiting):
            inbox.put(None)

    def wake_at_end(self, inbox: SimpleQueue[None]) -> None:
        """Put something in ``inbox`` when it ends; if it has ended, perhaps not."""
        self._waiting.append(inbox)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the ascending ``keys`` are fetched, bool ``[n]``, and their places in the answer, where they are."""
        if self._index is None:
            order = np.argsort(self.keys)
            self._index = order, self.keys[order]
        order, ascending = self._index
        slots = np.searchsorted(ascending, keys)
        slots[slots == len(ascending)] = 0
        return ascending[slots] == keys, order[slots]

    def cut_short(self, deadline: float | None) -> bool:
        """Its time was over before that of a lookup with another ``deadline``."""
        return self.deadline is not None and (deadline is None or deadline > self.deadline)


Join = tuple[Flight, np.ndarray, np.ndarray]
"""A fetch under way, the positions of keys that it asks for too, and their places in its answer."""


def common_keys(flights: Iterable[Flight], keys: np.ndarray) -> tuple[np.ndarray, list[Join]]:
    """Positions of the keys that none of some fetches asks for, and which ask for the others."""
    joins: list[Join] = []
    rest = np.argsort(keys)
    for flight in flights:
        has, places = flight.find(keys[rest])
        if has.any():
            joins.append((flight, rest[has], places[has]))
            rest = rest[~has]
        if not len(rest):
            break
    return rest, joins
