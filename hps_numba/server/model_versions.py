"""Which version of a model is in force, which came before it, and who is told when it changes.

A version has a number: 1 for the files of the config, one more with each replacement, or what the replacement says. It changes
in the moment in which all tables are switched (``cache.version_switch``), so whoever reads it and rows between two turns has
the number of these rows.

While a snapshot is taken, the trainer goes on. From its announcement on, the keys that online updates change are noted with the
times of their events; when its files take over, the rows of those that are newer than the files are carried over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, VersionError

__all__ = ["ModelVersion", "ModelVersions", "NotedWrites", "VersionHook"]

log = logging.getLogger(__name__)
_COMPACT_FROM = 1 << 16  # noted writes
_MAX_HOOKS = 1000

#: Called with the number of a version and its manifest when its rows are loaded; returns what is called at the switch, or None.
VersionHook = Callable[[int, Mapping[str, Any]], "Callable[[], object] | None"]


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """One version of a model.

    Attributes:
        number: of the version.   sources: sparse models of its tables, in table order.
        manifest: what the message or call that brought it said (``Manifest.to_dict``); empty for that of the config.
        since_ms: updates without a version whose events are older are in its files already; None: not known.
        again: it is in force, and its files are loaded once more.
    """

    number: int
    sources: tuple[str, ...]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    since_ms: int | None = None
    again: bool = False


class NotedWrites:
    """The keys that updates wrote or deleted, each with the time of its last event.

    Thread safety: calls take turns (writes to a table do).
    """

    def __init__(self) -> None:
        self._keys: list[np.ndarray] = []
        self._times: list[np.ndarray] = []
        self._count, self._compact_at = 0, _COMPACT_FROM

    def add(self, keys: np.ndarray, times: np.ndarray) -> None:
        """Note int64 keys ``[n]`` and the times of their events, int64 ``[n]``, in ms since 1970."""
        self._keys.append(keys)
        self._times.append(times)
        self._count += len(keys)
        if self._count > self._compact_at:
            self._compact()
            self._compact_at = max(_COMPACT_FROM, 2 * self._count)

    def since(self, time_ms: int) -> np.ndarray:
        """int64: the keys whose last event was at ``time_ms`` or later, ascending."""
        self._compact()
        return self._keys[0][self._times[0] >= time_ms]

    def _compact(self) -> None:
        """Keep the last note of each key."""
        keys = np.concatenate([np.empty(0, np.int64), *self._keys])[::-1]
        times = np.concatenate([np.empty(0, np.int64), *self._times])[::-1]
        distinct, first = np.unique(keys, return_index=True)
        self._keys, self._times, self._count = [distinct], [times[first]], len(distinct)


class ModelVersions:
    """The versions of one model.

    Attributes:
        in_force: whose rows lookups see.   previous: what was in force before it, or None.
        managed: a message has named a version: rows of other versions are not applied from then on.
        last_issued_ms: of the manifests that were dealt with.
        since_ns: ``time.monotonic_ns`` when the version in force became so, or was loaded.

    Thread safety: ``take`` in the moment of the switch, by one thread at a time; everything else from any thread.
    """

    def __init__(self, model: str, sources: tuple[str, ...]) -> None:
        self.in_force = ModelVersion(number=1, sources=sources)
        self.previous: ModelVersion | None = None
        self.managed = False
        self.since_ns = time.monotonic_ns()
        self.last_issued_ms = -1
        self._model = model
        self._hooks: tuple[tuple[object, VersionHook], ...] = ()
        self._announced: dict[int, int] = {}  # version -> since when updates are newer than its files
        self._noted: dict[str, NotedWrites] | None = None

    def check(self, number: int) -> None:
        """
        Raises:
            VersionError: another version is in force.
        """
        there = self.in_force.number
        if there != number:
            raise VersionError(f"version: expected {there}, which is in force of model {self._model!r}, got {show(number)}")

    # -- who is told ---------------------------------------------------------------------

    def add_hook(self, hook: VersionHook) -> Callable[[], None]:
        """Tell ``hook`` of each version; returns what ends that."""
        if len(self._hooks) >= _MAX_HOOKS:
            raise ConfigError(f"on_version: expected at most {_MAX_HOOKS} functions for model {self._model!r}, got one more")
        mark = object()
        self._hooks = (*self._hooks, (mark, hook))

        def end() -> None:
            self._hooks = tuple(pair for pair in self._hooks if pair[0] is not mark)

        return end

    def prepare(self, new: ModelVersion) -> list[Callable[[], object]]:
        """Tell all hooks of a version whose rows are loaded; returns what they want called at the switch.

        Raises:
            What a hook raises; ConfigError: it returns something else.
        """
        switches = []
        for _, hook in self._hooks if not new.again else ():
            switch = hook(new.number, new.manifest)
            if switch is not None and not callable(switch):
                raise ConfigError(f"on_version: expected a function to call at the switch, or None, got {show(switch)}")
            if switch is not None:
                switches.append(switch)
        return switches

    def take(self, new: ModelVersion, switches: list[Callable[[], object]]) -> None:
        """``new`` is in force now; nothing in it may wait for lookups."""
        self.previous, self.in_force = self.previous if new.again else self.in_force, new
        self.since_ns = time.monotonic_ns()
        for switch in switches:
            try:
                switch()
            except Exception:
                log.exception("%s: a function that on_version asked for failed at the switch to %d", self._model, new.number)

    # -- rows that are newer than a snapshot ---------------------------------------------------

    def announce(self, number: int, since_ms: int) -> None:
        """A snapshot is being taken; from now on the keys that updates change are noted."""
        self._noted = {} if self._noted is None else self._noted
        self._announced = {number: since_ms, **self._announced}

    def announced(self, number: int, since_ms: int) -> bool:
        """Keys were noted since the announcement of this snapshot."""
        return self._announced.get(number) == since_ms

    def note(self, table: str, keys: np.ndarray, times: np.ndarray) -> None:
        """Updates change these keys of a table now; that matters if a snapshot is being taken."""
        if self._noted is not None:
            self._noted.setdefault(table, NotedWrites()).add(keys, times)

    def newer_keys(self, table: str, since_ms: int) -> np.ndarray:
        """int64: the keys of a table that updates have changed since then."""
        noted = None if self._noted is None else self._noted.get(table)
        return np.empty(0, np.int64) if noted is None else noted.since(since_ms)

    def forget_notes(self, number: int) -> None:
        """The snapshot has taken over, or never will; so have those that were announced before it."""
        since = self._announced.pop(number, -1)
        self._announced = {other: time for other, time in self._announced.items() if time > since}
        if not self._announced:
            self._noted = None
