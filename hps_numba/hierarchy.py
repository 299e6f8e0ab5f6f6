"""An ordered stack of slower tiers that looks like one.

A row is in a slower tier before a faster one may drop it: writes go from the slowest to the fastest tier, reads the other
way, and each tier is asked only for keys that the ones before it lack.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from hps_numba.errors import TierError
from hps_numba.storage.tiers._tier import Tier

__all__ = ["StackAnswer", "TierStack"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StackAnswer:
    """What the stack found.

    Attributes:
        found: bool ``[n]``, which keys some tier had.
        unsure: bool ``[n]``, which keys were not found while a tier was late or failed: they may exist.
        errors: calls that failed.
    """

    found: np.ndarray
    unsure: np.ndarray
    errors: int


class TierStack:
    """Slower tiers, fastest first.   **Threads:** every method."""

    def __init__(self, tiers: Iterable[Tier]) -> None:
        self.tiers: Sequence[Tier] = tuple(tiers)

    @property
    def writable(self) -> Sequence[Tier]:
        """The tiers that can be written, fastest first."""
        return [tier for tier in self.tiers if not tier.read_only]

    def __bool__(self) -> bool:
        return bool(self.tiers)

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> StackAnswer:
        """Copy the rows of those keys that some tier has to ``rows``; the others stay as they are.

        A tier that fails is passed over: its keys are looked for in the next one and, if found nowhere, reported as unsure.
        """
        found = np.zeros(len(keys), bool)
        unsure = np.zeros(len(keys), bool)
        errors = 0
        for tier in self.tiers:
            wanted = np.flatnonzero(~found)
            if not len(wanted):
                break
            some = np.ascontiguousarray(rows[wanted])
            try:
                answer = tier.fetch(table, keys[wanted], some, deadline=deadline)
            except TierError as problem:
                log.debug("%s: %s: fetch failed: %s", table, type(tier).__name__, problem)
                errors += 1
                unsure[wanted] = True
                continue
            rows[wanted[answer.found]] = some[answer.found]
            found[wanted[answer.found]] = True
            unsure[wanted[answer.asked :]] = True
        return StackAnswer(found, unsure & ~found, errors)

    def contains(self, table: str, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys some tier has."""
        found = np.zeros(len(keys), bool)
        for tier in self.tiers:
            found |= tier.contains(table, keys)
        return found

    def insert(self, table: str, keys: np.ndarray, rows: np.ndarray) -> None:
        """Write rows to every tier that can be written, slowest first.

        Raises:
            TierError: a tier failed; faster ones were not written.
        """
        self._write(lambda tier: tier.insert(table, keys, rows))

    def update(self, table: str, keys: np.ndarray, rows: np.ndarray) -> None:
        """Write the rows of those keys that a tier has already, in each tier that can be written."""

        def update_one(tier: Tier) -> None:
            present = tier.contains(table, keys)
            tier.insert(table, keys[present], rows[present])

        self._write(update_one)

    def erase(self, table: str, keys: np.ndarray | None = None) -> None:
        """Remove keys, or the whole table, from every tier that can be written."""
        self._write(lambda tier: tier.erase(table, keys))

    def _write(self, change: Callable[[Tier], object]) -> None:
        for tier in reversed(self.writable):
            change(tier)

    def close(self) -> None:
        """Close every tier, also those after one that fails to."""
        with ExitStack() as closing:
            for tier in reversed(self.tiers):
                closing.callback(tier.close)
