"""Writes updates to tables, and goes on with what it can write while a part of a slower tier is out of order.

Problem: updates go to the slowest tier first. If a node of Redis is down, its keys cannot be written; if everything waited for
it, the rows of all other keys would grow old too. Choice: what a tier could not take is held, by key, and tried again; all
other keys are written. A held key stays as it was in faster tiers and caches, as one that host memory evicts would show the old
row of the tier again. Held updates count as waiting: their memory is that of the backlog, which ends reading when it is full,
and no position is committed while there are any. Turned down: to commit what is before the oldest held one, as a key that
nobody writes again keeps that where it is anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hps_numba.runtime.threads import in_one_range
from hps_numba.updates._batches import TableBatch, batch_of
from hps_numba.updates._held import HeldUpdates
from hps_numba.updates._source_counts import SourceCounts
from hps_numba.updates._update import NO_TIME, Message, Update
from hps_numba.updates._wire.messages import Skip

if TYPE_CHECKING:
    from hps_numba.config import UpdateSourceConfig
    from hps_numba.server.update_targets import UpdateTarget, UpdateTargets

__all__ = ["RowWriter"]


class RowWriter:
    """See above.

    Args:
        backoff: seconds until the next attempt, after so many failures in a row.

    Thread safety: one thread; ``held_bytes`` by any.
    """

    def __init__(
        self, targets: UpdateTargets, section: UpdateSourceConfig, counts: SourceCounts, backoff: Callable[[int], float]
    ) -> None:
        self._targets, self._section, self._counts, self._backoff = targets, section, counts, backoff
        self._held: dict[str, HeldUpdates] = {}

    # -- what came ---------------------------------------------------------------------

    def write(self, tag: str, target: UpdateTarget, items: Sequence[Update | Message]) -> list[tuple[Update | Message, Skip]]:
        """Decode and write what came for a table, in order; returns what is malformed, or not of the version in force.

        Raises:
            As ``UpdateTarget.apply``: nothing is written, or it may be written again.
        """
        skips: list[tuple[Update | Message, Skip]] = []
        batch = batch_of(
            items,
            dim=target.dim,
            key_bytes=self._targets.key_bytes,
            finite=self._section.refuse_not_finite,
            on_skip=lambda item, skip: skips.append((item, skip)),
            refuses=target.refuses,
        )
        unwritten = self._apply(tag, target, batch) if batch.writes else np.empty(0, bool)
        held = int(np.count_nonzero(unwritten))
        self._counts.of(tag).applied(batch, {item.position.partition: item.position for item in items}, unwritten)
        if held:
            self._held[tag].messages += len(items)
        self._note_held(tag)
        return skips

    def _apply(self, tag: str, target: UpdateTarget, batch: TableBatch) -> np.ndarray:
        """Write a batch, and hold what cannot be written now: bool ``[n + m]``."""
        counts = self._counts.of(tag)
        held = self._held_for(tag, target)
        with in_one_range():  # one thread writes ten times as many rows a second as a bus brings
            done = target.apply(batch.keys, batch.rows, batch.erased, batch.times)
        if done.left_out:
            self._counts.add_left_out(done.left_out, counts)
        if done.problem is not None:
            counts.retries += 1
            self._counts.add_problem(f"{tag}: keys that cannot be written wait and are tried again", done.problem)
            if held is None:
                held = self._held[tag] = HeldUpdates(tag, target.dim, target.version)
                held.due += self._backoff(1)
        if held is not None:
            held.note(batch, done.unwritten)
        return done.unwritten

    def _held_for(self, tag: str, target: UpdateTarget) -> HeldUpdates | None:
        """What is held of a table, without what is not applied any more as another version is in force now."""
        held = self._held.get(tag)
        if held is None or held.version is target.version:
            return held
        if held.dim != target.dim:  # the model was unloaded, and another one with its name was loaded
            self._skip_held(tag, Skip("width", f"expected rows of {4 * target.dim} bytes, got {4 * held.dim}"))
            return None
        dropped = held.forget(lambda times: ~target.still_taken(held.version, times))
        of_version = int(np.count_nonzero(dropped == NO_TIME))
        number = target.version.number
        self._counts.add_held_skip(tag, of_version, Skip("other_version", f"expected version {number}, got another one"))
        newer = f"expected updates that are newer than the files of version {number}"
        self._counts.add_held_skip(tag, len(dropped) - of_version, Skip("older", newer))
        held.version = target.version
        return held

    # -- what is held ---------------------------------------------------------------------

    @property
    def held_bytes(self) -> int:
        """Of everything that is held."""
        return sum(held.bytes for held in tuple(self._held.values()))

    @property
    def due(self) -> float | None:
        """``time.monotonic()`` of the next attempt; None if nothing is held."""
        return min((held.due for held in self._held.values()), default=None)

    def holds(self, model: str) -> float | None:
        """As ``due``, of the tables of a model."""
        return min((held.due for tag, held in self._held.items() if tag.split(".")[1] == model), default=None)

    def try_again(self, goes_on: Callable[[], bool]) -> None:
        """Write some of what is due, a table at a time while it ``goes_on``.

        Raises:
            As ``UpdateTargets.find`` and ``UpdateTarget.apply``; what could not be written is tried again.
        """
        now = time.monotonic()
        for tag in [tag for tag, held in self._held.items() if held.due <= now]:
            if not goes_on():
                return
            self._try_again(tag)

    def _try_again(self, tag: str) -> None:
        held = self._held[tag]
        held.failures += 1  # unless it turns out that this attempt is none
        held.due = time.monotonic() + self._backoff(held.failures)
        target = self._targets.find(tag)
        if isinstance(target, str):
            self._skip_held(tag, Skip(target, "expected a table that takes updates"))
        if isinstance(target, str) or self._held_for(tag, target) is None:  # the model was unloaded
            self._note_held(tag)
            return
        batch = held.some(self._section.max_batch_size)
        unwritten = self._apply(tag, target, batch) if batch.writes else np.empty(0, bool)
        self._counts.of(tag).caught_up(batch, unwritten)
        if not unwritten.all() or not batch.writes:
            held.failures, held.due = 0, time.monotonic()
        if not len(held):
            del self._held[tag]
        self._note_held(tag)

    def _skip_held(self, tag: str, skip: Skip) -> None:
        """Nothing of a table is held any more, and none of it will be applied."""
        self._counts.add_held_skip(tag, len(self._held.pop(tag)), skip)

    def drop(self) -> None:
        """Nothing is held any more: it comes again, or goes to another process."""
        tags = list(self._held)
        self._held.clear()
        for tag in tags:
            self._note_held(tag)

    def _note_held(self, tag: str) -> None:
        """Count it."""
        held = self._held.get(tag)
        counts = self._counts.of(tag)
        counts.held_rows, counts.held_messages = (0, 0) if held is None else (len(held), held.messages)
