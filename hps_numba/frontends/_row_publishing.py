"""Trainers that publish: the rows that optimizers change go to a bus of online updates, from where servers take them.

A step only notes its keys. Every interval the rows of all keys that were noted are read, past the caches, and published: a row
that changed in a hundred steps is sent once. A row that is read is at least as new as the step that noted it, and a later step
notes it again, so the last row of each key that is published is the last one that was trained.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from hps_numba.config.arguments import as_count, as_number
from hps_numba.config.messages import show
from hps_numba.errors import ClosedError, ConfigError, HpsError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.timer import Timer
from hps_numba.storage.distinct import distinct_keys
from hps_numba.training.trainer import RowTrainer
from hps_numba.updates import UpdateProducer, open_producer

__all__ = ["RowPublisher"]

log = logging.getLogger(__name__)
_SAY_AGAIN = 60.0  # seconds between two warnings
_COMPACT_FROM = 1 << 20  # noted keys of a table


class _Changed:
    """Keys of a table whose rows changed and were not published yet."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.count, self.since_ms, self._compact_at = 0, 0, _COMPACT_FROM

    def add(self, keys: np.ndarray, time_ms: int) -> None:
        self.since_ms = min(time_ms, self.since_ms) if self.parts else time_ms
        self.parts.append(keys)
        self.count += len(keys)
        if self.count > self._compact_at:  # the bus takes nothing for a while
            self.parts = [self.distinct()]
            self.count = len(self.parts[0])
            self._compact_at = max(_COMPACT_FROM, 2 * self.count)

    def distinct(self) -> np.ndarray:
        return distinct_keys(np.concatenate(self.parts)) if self.parts else np.empty(0, np.int64)


class RowPublisher:
    """Publishes the rows that some trainers change, until it is closed.

    It is a context manager, which ends with ``close``.

    Attributes:
        published: rows and deletions that were given to the bus.
        failures: attempts that failed; each is repeated after the next interval.
        last_problem: the last of them in words, or empty.

    Thread safety: every method.
    """

    def __init__(
        self,
        trainers: Sequence[RowTrainer],
        bus: Mapping[str, Any] | UpdateProducer,
        *,
        interval_ms: float = 100.0,
        version: int | None = None,
    ) -> None:
        """
        Args:
            trainers: of the tables.
            bus: as for ``hps_numba.updates.open_producer``; or a producer, which stays open.
            interval_ms: between two times of publishing, at least 1.
            version: of the model that the rows are of; None: they are of any, and kept by snapshots that are announced.

        Raises:
            ConfigError: a value is not as above.   TierUnavailable: the bus is not there.   CapacityError: no thread for it.
        """
        if not as_number(interval_ms, "interval_ms") >= 1:
            raise ConfigError(f"interval_ms: expected at least 1, got {interval_ms}")
        self.version = None if version is None else as_count(version, "version", 0, 2**63 - 1)
        self.published = self.failures = 0
        self.last_problem = ""
        self._trainers = tuple(trainers)
        self._owned = not isinstance(bus, UpdateProducer)
        self._producer = bus if isinstance(bus, UpdateProducer) else self._open(bus)
        self._said = -_SAY_AGAIN
        self._closed = self._unsettled = False
        self._timer = Timer("row_publishing")
        self.reset_after_fork()
        register_fork_reset(self)
        self._ends = [trainer.watch(partial(self._note, number)) for number, trainer in enumerate(self._trainers)]
        self._timer.add("publish", self._publish_some, delay=0.0, interval=interval_ms / 1000)

    def _open(self, bus: Mapping[str, Any]) -> UpdateProducer:
        if not isinstance(bus, Mapping):
            raise ConfigError(f"bus: expected the type and the keys of a producer, or a producer, got {show(bus)}")
        bits = self._trainers[0].server.direct.key_bits
        return open_producer({"key_bits": bits, **bus})

    def reset_after_fork(self) -> None:
        """A forked child has its own copy of what waits, which its parent publishes: it drops that, and publishes nothing."""
        self._publishing = threading.RLock()  # one at a time, so that a row is never followed by an older one
        self._noting = threading.RLock()  # also for a signal handler
        self._changed = [_Changed() for _ in self._trainers]

    def _note(self, number: int, keys: np.ndarray) -> None:
        with self._noting:
            self._changed[number].add(keys, time.time_ns() // 1_000_000)

    # -- what users call ---------------------------------------------------------------------

    def flush(self, seconds: float = 30.0) -> None:
        """Publish every row that has changed, and wait until the bus has it.

        Raises:
            TierError: the bus does not take it, or not within so many seconds.
            ClosedError: the publisher is closed.   Otherwise as ``HPS.lookup``.
            What was not published is kept for the next time.
        """
        with self._publishing:
            if self._closed:
                raise ClosedError("the publisher is closed")
            self._publish_all(seconds)

    def announce_snapshot(self, version: int) -> dict[str, int]:
        """Say that files of the tables are going to be written, as a version to come; steps may go on meanwhile.

        Call it before rows are read for the files, and then ``replace_model``.

        Returns:
            Since when updates are newer than the files, in ms since 1970, by model.

        Raises:
            As ``flush``; ConfigError: ``version`` is not an integer of at least 0.
        """
        with self._publishing:
            self.flush()
            tables = self._tables()
            return {model: self._producer.announce_snapshot(model, version, names) for model, names in tables.items()}

    def replace_model(
        self, model: str, version: int, files: Mapping[str, str], *, dense: str | None = None, since_ms: int | None = None
    ) -> None:
        """Let servers switch to a version, as ``UpdateProducer.replace_model``; what changed before is published before it."""
        with self._publishing:
            self.flush()
            self._producer.replace_model(model, version, files, dense=dense, since_ms=since_ms)
            self._producer.flush()

    def close(self, seconds: float = 30.0) -> None:
        """``flush``, and end, whatever ``flush`` raises. A second call does nothing."""
        for end in self._ends:
            end()
        self._timer.close()  # not inside the lock, for which its call may wait
        with self._publishing:
            if self._closed:
                return
            try:
                self._publish_all(seconds)
            finally:
                self._closed = True
                if self._owned:
                    self._producer.close(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- publishing ---------------------------------------------------------------------

    def _tables(self) -> dict[str, list[str]]:
        tables: dict[str, list[str]] = {}
        for trainer in self._trainers:
            tables.setdefault(trainer.spec.model, []).append(trainer.spec.name)
        return tables

    def _publish_some(self) -> None:
        """What the timer calls."""
        with self._publishing:
            try:
                if not self._closed:
                    self._publish_all(30.0)
            except HpsError as problem:
                self.failures += 1
                self.last_problem = " ".join(str(problem).split())
                if time.monotonic() - self._said >= _SAY_AGAIN:
                    self._said = time.monotonic()
                    log.warning("trained rows are not published, and will be tried again: %s", self.last_problem)

    def _publish_all(self, seconds: float) -> None:
        """Publish every row that has changed. Inside ``_publishing``."""
        for number, trainer in enumerate(self._trainers):
            with self._noting:
                changed, self._changed[number] = self._changed[number], _Changed()
            if changed.parts:
                self._unsettled = True
                try:
                    self._publish(trainer, changed)
                except BaseException:
                    with self._noting:
                        self._changed[number].add(changed.distinct(), changed.since_ms)
                    raise
        if self._unsettled:
            self._producer.flush(seconds)
            self._unsettled = False

    def _publish(self, trainer: RowTrainer, changed: _Changed) -> None:
        keys, spec = changed.distinct(), trainer.spec
        rows, found = trainer.server.direct.read(keys, spec.model, spec.name)
        about: dict[str, Any] = {"event_time_ms": changed.since_ms, "version": self.version}
        if found.any():
            self._producer.update(spec.model, spec.name, keys[found], rows[found], **about)
        if not found.all():  # erased since the step
            self._producer.erase(spec.model, spec.name, keys[~found], **about)
        self.published += len(keys)
