"""Where online updates go: a table by its tag, and the tiers whose ``update_filters`` let the model through.

A write goes to the slowest tier first, then to host memory, then to every cache, as any other write (``table_writes``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from hps_numba.server.catalog import Catalog
from hps_numba.server.table import ServedTable
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers._host_tables import HostTablesTier
from hps_numba.storage.tiers._tier import Tier

__all__ = ["UpdateTarget", "UpdateTargets"]

_PREFIX = "hps_et"


class UpdateTarget:
    """One table that takes updates.

    Attributes:
        dim: elements of a row.

    Thread safety: every method.
    """

    def __init__(self, table: ServedTable, tiers: frozenset[int], host: bool) -> None:
        """``tiers``: numbers of the slower tiers that take them, fastest first; ``host``: host memory takes them."""
        self.dim = table.spec.dim
        self._table = table
        self._tiers, self._host = tiers, host

    def apply(self, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray) -> int:
        """``TableWrites.apply``; lookups see it when this returns."""
        return self._table.writes.apply(keys, rows, erased, self._tiers, host=self._host)


class UpdateTargets:
    """The tables of a server, as sources of updates name them.

    Args:
        catalog: the deployed models.   host: the tier in host memory, or None.   slower: all other tiers.

    Thread safety: every method.
    """

    def __init__(self, catalog: Catalog, host: HostTablesTier | None, slower: TierStack) -> None:
        self._catalog = catalog
        self._host, self._slower = host, slower

    @property
    def closed(self) -> bool:
        """The server was closed."""
        return self._catalog.closed

    @property
    def key_bytes(self) -> int:
        """Of a key in a message: 8 or 4."""
        return self._catalog.key_bits // 8

    @property
    def outlive_the_process(self) -> bool:
        """Rows that updates wrote are still there, and in force, when the server is started again.

        They are not if a tier is filled from the files of the model at each start, which brings the old rows back, nor if they
        are in the memory of this process or host only.
        """
        filled = [tier.section for tier in (*self._slower.writable, *(() if self._host is None else (self._host,)))]
        if any(section.initialize_after_startup for section in filled):
            return False
        return any(_keeps_rows(tier.inner) for tier in self._slower.writable)

    def find(self, tag: str) -> UpdateTarget | str:
        """The table of a tag, or the reason for which an update of it is skipped.

        Reasons: ``topic``, it is not the tag of a table; ``unknown_table``; ``filtered``, no tier takes updates of the model;
        ``read_only``, none of those that do can be written.

        Raises:
            ClosedError: the server was closed.
        """
        prefix, _, rest = tag.partition(".")
        model_name, dot, table_name = rest.partition(".")
        if prefix != _PREFIX or not dot:
            return "topic"
        models = self._catalog.models
        self._catalog.check_open()  # after that: a server that is being closed has no models
        model = models.get(model_name)
        table = None if model is None else model.find(table_name)
        if table is None:
            return "unknown_table"
        takes_host = table.store is not None and (self._host is None or takes(self._host.section, tag))
        tiers = [number for number, tier in enumerate(self._slower.tiers) if takes(tier.section, tag)]
        if not takes_host and not tiers:
            return "filtered"
        writable = frozenset(number for number in tiers if not self._slower.checked[number].read_only)
        return UpdateTarget(table, writable, takes_host) if takes_host or writable else "read_only"


def takes(section: Any, tag: str) -> bool:
    """Whether a tier takes updates of the model of a table: one of its ``update_filters`` matches the model's name, or the tag.

    HugeCTR matches names of models, but its documented default ``^hps_.+$`` is written for tags.
    """
    model = tag.split(".")[1]
    filters: Iterable[str] = section.update_filters
    return any(re.fullmatch(one, model) or re.fullmatch(one, tag) for one in filters)


def _keeps_rows(tier: Tier) -> bool:
    """Rows are on a disk or in another process, whatever happens to this one."""
    return tier.persistent or (tier.shared and not isinstance(tier, HostTablesTier))
