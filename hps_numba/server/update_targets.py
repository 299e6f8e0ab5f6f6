"""Where online updates go: a table by its tag, and the tiers whose ``update_filters`` let the model through.

A write goes to the slowest tier first, then to host memory, then to every cache, as any other write (``table_writes``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np

from hps_numba.errors import VersionError
from hps_numba.server.catalog import Catalog
from hps_numba.server.manifest import Manifest
from hps_numba.server.model import ServedModel
from hps_numba.server.model_versions import ModelVersion, ModelVersions
from hps_numba.server.table import ServedTable
from hps_numba.server.table_writes import Applied
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers._host_tables import HostTablesTier
from hps_numba.storage.tiers._tier import Tier

__all__ = ["UpdateTarget", "UpdateTargets"]

_PREFIX = "hps_et"


class UpdateTarget:
    """One table that takes updates.

    Attributes:
        dim: elements of a row.
        version: of the model, which is in force.

    Thread safety: every method.
    """

    def __init__(self, table: ServedTable, versions: ModelVersions, tiers: frozenset[int], host: bool) -> None:
        """``tiers``: numbers of the slower tiers that take them, fastest first; ``host``: host memory takes them."""
        self.dim = table.spec.dim
        self.version: ModelVersion = versions.in_force
        self._table, self._versions = table, versions
        self._tiers, self._host = tiers, host

    def refuses(self, version: int | None, event_ms: int) -> str | None:
        """Why an update of this version of the model, or of no known one, and of this time (-1: not known) is not applied.

        ``other_version``: another one is in force, and versions are named by messages; ``older``: it does not name a version,
        and the files of that in force are newer. None: it is applied.
        """
        if not self._versions.managed:
            return None
        if version is not None:
            return None if version == self.version.number else "other_version"
        since = self.version.since_ms
        return "older" if since is not None and 0 <= event_ms < since else None

    def still_taken(self, accepted: ModelVersion, times: np.ndarray) -> np.ndarray:
        """Which updates that were accepted when another version was in force are applied now.

        Args:
            times: int64 ``[n]``, as of ``apply``.
        """
        if accepted is self.version or not self._versions.managed:
            return np.ones(len(times), bool)
        since = self.version.since_ms
        same = accepted.number == self.version.number
        return np.where(times < 0, same, True if since is None else times >= since)

    def apply(self, keys: np.ndarray, rows: np.ndarray, erased: np.ndarray, times: np.ndarray) -> Applied:
        """``TableWrites.apply``; lookups see what was written when this returns.

        Args:
            times: int64 ``[n + m]``: of the events of ``keys`` and then of ``erased``, in ms since 1970; -1: whatever the time,
                it is of this version only.

        Raises:
            VersionError: the version was switched meanwhile; nothing is written.
        """
        tag = self._table.spec.tag

        def first() -> None:
            there = self._versions.in_force
            if there is not self.version:
                raise VersionError(f"{tag}: expected version {self.version.number}, got {there.number} meanwhile")
            self._versions.note(tag, np.concatenate([keys, erased]), times)

        return self._table.writes.apply(keys, rows, erased, self._tiers, host=self._host, first=first)


class UpdateTargets:
    """The tables of a server, as sources of updates name them.

    Args:
        catalog: the deployed models.   host: the tier in host memory, or None.   slower: all other tiers.
        replace: brings the version that a manifest names into force, as ``ModelLoader.replace_by``.
        reload: loads the files of a model again, as ``ModelLoader.reload``.

    Attributes:
        one_source: the server has no other source of updates.

    Thread safety: every method.
    """

    def __init__(
        self,
        catalog: Catalog,
        host: HostTablesTier | None,
        slower: TierStack,
        replace: Callable[[Manifest], None],
        reload: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._host, self._slower = host, slower
        self._replace, self.reload = replace, reload
        self.one_source = True

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
        if model is None or table is None:
            return "unknown_table"
        takes_host = table.store is not None and (self._host is None or takes(self._host.section, tag))
        tiers = [number for number, tier in enumerate(self._slower.tiers) if takes(tier.section, tag)]
        if not takes_host and not tiers:
            return "filtered"
        writable = frozenset(number for number in tiers if not self._slower.checked[number].read_only)
        return UpdateTarget(table, model.versions, writable, takes_host) if takes_host or writable else "read_only"

    def models_of(self, tags: Container[str]) -> list[str]:
        """Names of the models of which a table that is among ``tags`` takes updates; any table, if one of the tags is empty.

        Raises:
            ClosedError: the server was closed.
        """
        return [
            name
            for name, model in self._catalog.models.items()
            if any(
                not isinstance(self.find(table.spec.tag), str) for table in model.tables if "" in tags or table.spec.tag in tags
            )
        ]

    # -- versions ---------------------------------------------------------------------

    def take(self, tag: str, manifest: Manifest) -> str | None:
        """Do what a manifest asks for; lookups see it when this returns. One that was dealt with before changes nothing.

        Args:
            tag: of the table with whose updates it came.

        Returns:
            Why it cannot be done: a reason of ``find``; ``topic``, it is of another model; ``manifest``, its tables are not
            those of the model, or it takes back what is not there; ``older``, a newer version is in force; ``not_announced``,
            updates that are newer than its files are not known, since it was announced before this server read updates.

        Raises:
            As ``HPS.replace_model``; ClosedError also if the server was closed.
        """
        target = self.find(tag)
        if isinstance(target, str):
            return target
        model = self._catalog.models.get(manifest.model)
        if model is None or not tag.startswith(f"{_PREFIX}.{manifest.model}."):
            return "topic"
        versions = model.versions
        versions.managed = True
        if manifest.issued_ms <= versions.last_issued_ms:
            return None
        problem = _problem_of(manifest, model)
        if problem is None and not manifest.tables and not manifest.roll_back:
            versions.announce(manifest.version, manifest.since_ms or 0)
        elif problem is None and manifest.version != versions.in_force.number:
            self._replace(manifest)
        self.passed_over(manifest)
        return problem

    def passed_over(self, manifest: Manifest) -> None:
        """A manifest was dealt with, or never will be."""
        model = self._catalog.models.get(manifest.model)
        if model is not None:
            model.versions.last_issued_ms = max(model.versions.last_issued_ms, manifest.issued_ms)
            if manifest.tables:
                model.versions.forget_notes(manifest.version)


def _problem_of(manifest: Manifest, model: ServedModel) -> str | None:
    """Why a manifest cannot be followed, or None."""
    versions = model.versions
    if manifest.roll_back:
        there = manifest.version == versions.in_force.number
        back = versions.previous is not None and manifest.version == versions.previous.number
        return None if there or back else "manifest"
    if manifest.version < versions.in_force.number:
        return "older"
    if not manifest.tables:
        return None if manifest.since_ms is not None else "manifest"
    if set(manifest.tables) != {table.spec.name for table in model.tables}:
        return "manifest"
    if manifest.since_ms is None or manifest.version == versions.in_force.number:
        return None
    return None if versions.announced(manifest.version, manifest.since_ms) else "not_announced"


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
