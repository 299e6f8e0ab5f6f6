"""Where a server's metrics come from: collectors, which are asked whenever somebody wants to see the metrics.

Nothing is pushed: the parts of a server count for themselves, and a collector reads their counts. Front ends add their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hps_numba.metrics.families import Family, merged

__all__ = ["Collector", "Registry"]

Collector = Callable[[], Iterable[Family]]
"""Gives families with the values of now."""


class Registry:
    """The collectors of a server.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self._collectors: tuple[Collector, ...] = ()

    def add(self, collector: Collector) -> Callable[[], None]:
        """Ask a collector too, from now on; returns a function that ends this."""
        self._collectors = (*self._collectors, collector)

        def remove() -> None:
            self._collectors = tuple(one for one in self._collectors if one is not collector)

        return remove

    def collect(self) -> list[Family]:
        """All metrics now, each once.

        Raises:
            ClosedError: the server was closed.   ConfigError: two collectors give different metrics of one name.
        """
        return merged(family for collector in self._collectors for family in collector())
