"""The sources of online updates of a server: opened with it, running beside lookups, closed with it.

A source is a plugin of ``hps_numba.updates``, a room above this one, so it is found by name only: its class makes the consumer
that reads and applies (``updates._consumer``).
"""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol

from hps_numba import plugins
from hps_numba.config import ServerConfig, checked_options
from hps_numba.config.messages import dotted
from hps_numba.errors import ConfigError, HpsError, TierUnavailable
from hps_numba.server.stats import TableStats
from hps_numba.server.update_stats import SourceStats
from hps_numba.server.update_targets import UpdateTargets

__all__ = ["OnlineUpdates"]

log = logging.getLogger(__name__)
_SOURCES = "hps_numba.updates"
_SHOWN = 4  # tags that a line lists


class _Consumer(Protocol):
    """What the class of a source makes."""

    def start(self) -> None:
        """Begin to read and apply."""

    def stop(self) -> None:
        """Ask it to end, without waiting."""

    def close(self) -> None:
        """End it: what was applied is committed."""

    def stats(self) -> SourceStats:
        """A snapshot."""


class OnlineUpdates:
    """Consumers of all sources of a config.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self._consumers: tuple[_Consumer, ...] = ()

    def open(self, config: ServerConfig, targets: UpdateTargets, owner: object, *, allow_code: bool) -> None:
        """Open the sources of a config and start them; they end with ``owner``.

        Raises:
            TierUnavailable: a source does not exist or is not installed.   ConfigError: an option of it is not valid.
            CapacityError: the system gives no thread.
        """
        with ExitStack() as undo:
            opened = []
            sections = config.source_sections()
            targets.one_source = len(sections) == 1
            for number, (place, given) in enumerate(sections):
                name = given.name or (given.type if len(sections) == 1 else f"{given.type}-{number}")
                kind = _source_class(f"{dotted(place)}.type", given.type, config, allow_code)
                section = checked_options(given, kind.Options, place, strict=config.strict)
                with plugins.typed_errors(f"{dotted(place)}.type: {given.type!r}: cannot open", TierUnavailable, HpsError):
                    opened.append(kind.consumer(section, targets, name))
                undo.callback(opened[-1].close)
                _log_opened(dotted(place), name, given.type, config, targets)
            self._consumers = tuple(opened)  # before they start: an interrupt leaves none behind that ``close`` does not find
            for consumer in opened:
                consumer.start()
            undo.pop_all()
        if opened:
            weakref.finalize(owner, _stop, self._consumers)

    def add_to(self, tables: dict[str, dict[str, TableStats]]) -> dict[str, dict[str, TableStats]]:
        """The stats of tables, with what updates did to them."""
        for source in self.stats():
            for tag, updates in source.tables.items():
                _, model, table = tag.split(".", 2)
                stats = tables.get(model, {}).get(table)
                if stats is not None:
                    tables[model][table] = replace(stats, updates=(*stats.updates, updates))
        return tables

    def stats(self) -> tuple[SourceStats, ...]:
        """A snapshot of each source."""
        return tuple(consumer.stats() for consumer in self._consumers)

    def stop(self) -> None:
        """Ask all to end, without waiting."""
        _stop(self._consumers)

    def close(self) -> None:
        """Wait until what is being applied is, commit, and close the sources."""
        self.stop()
        with ExitStack() as closing:
            for consumer in self._consumers:
                closing.callback(consumer.close)


def _stop(consumers: tuple[_Consumer, ...]) -> None:
    for consumer in consumers:
        consumer.stop()


def _log_opened(place: str, name: str, kind: str, config: ServerConfig, targets: UpdateTargets) -> None:
    """Which tables a source brings updates for."""
    if log.isEnabledFor(logging.INFO):
        taken = [spec.tag for spec in config.tables() if not isinstance(targets.find(spec.tag), str)]
        shown = ", ".join(taken[:_SHOWN]) + (", ..." if len(taken) > _SHOWN else "")
        log.info("%s: %s %r brings updates of %d tables%s", place, kind, name, len(taken), f": {shown}" if taken else "")


def _source_class(place: str, name: str, config: ServerConfig, allow_code: bool) -> Any:
    kind = plugins.load(_SOURCES, name, allow_code=allow_code, folder=config.folder, error=TierUnavailable)
    if not (isinstance(kind, type) and callable(getattr(kind, "consumer", None)) and hasattr(kind, "Options")):
        raise ConfigError(f"{place}: expected a subclass of UpdateSource, got {name!r}, which is {kind!r}")
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise ConfigError(f"{place}: expected a source with {', '.join(missing)}, got {name!r}, which lacks them")
    return kind
