"""One model in service: its tables, opened, loaded, replaced and let go of together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import numpy as np

from hps_numba.config import ModelConfig, ServerConfig, TableSpec
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.hierarchy import TierStack
from hps_numba.session import Background, TableSession
from hps_numba.storage.host_store import HostStore
from hps_numba.storage.loading import load_table, stream_table
from hps_numba.storage.model_files import open_model
from hps_numba.storage.tiers._tier import Tier
from hps_numba.storage.tiers.hash_map import HashMapTier

__all__ = ["Deployment", "Progress"]

log = logging.getLogger(__name__)
Progress = Callable[[str, int], None]


def _no_progress(what: str, rows: int) -> None:
    del what, rows


class Deployment:
    """The tables of one model.

    Args:
        config: the server's config; ``model``: this model's part of it.
        host: the volatile tier, if it keeps rows in this process.
        slower: all other tiers.
        background: runs a job on the server's background thread.

    **Threads:** lookups from any thread; ``load``, ``replace`` and ``close`` by one at a time.
    """

    def __init__(
        self, config: ServerConfig, model: ModelConfig, host: HashMapTier | None, slower: TierStack, background: Background
    ) -> None:
        self.config = config
        self.model = model
        self.name = model.model
        self._host = host
        self._slower = slower
        budget = model.time_budget_ms / 1000 or None
        keep = config.volatile_db.cache_missed_embeddings
        self.tables: tuple[TableSession, ...] = tuple(
            TableSession(
                spec,
                None if host is None else host.store(spec.tag, spec.dim),
                slower,
                time_budget=budget,
                keep_missed=keep,
                background=background,
            )
            for spec in model.tables(config.folder)
        )
        self._by_name = {table.spec.name: table for table in self.tables}
        #: even while one version of all tables is in force, odd while they are being switched
        self.switches = 0

    @property
    def version(self) -> int:
        """Number of the content: 1 at first, one more with each replacement."""
        return 1 + self.switches // 2

    def table(self, table_id: int | str) -> TableSession:
        """A table by number or name.

        Raises:
            UnknownModelError: there is none.
        """
        if isinstance(table_id, str):
            if table_id in self._by_name:
                return self._by_name[table_id]
        elif 0 <= table_id < len(self.tables):
            return self.tables[table_id]
        known = ", ".join(f"{number} ({table.spec.name})" for number, table in enumerate(self.tables))
        raise UnknownModelError(f"table_id: model {self.name!r} has no table {table_id!r}, it has {known}")

    def load(self, on_rows: Progress = _no_progress) -> None:
        """Bring the rows of the sparse models into all tiers that are to be initialised."""
        if self._writable_slower():
            for table in self.tables:
                self._insert_slower(table.spec, table.spec.source, on_rows)
        if self._fills_host():
            for table in self.tables:
                table.adopt(self._filled(table, table.spec.source, on_rows))
        for table in self.tables:
            log.info("%s: %d rows in host memory", table.spec.tag, table.stats(self.version).rows)
        if self._host is None and not self._slower:
            log.warning("model %s: no volatile_db and no persistent_db: every key gets its table's default value", self.name)

    def replace(self, sources: Iterable[str] | None = None, on_rows: Progress = _no_progress) -> None:
        """Load a new version aside, then switch all tables to it; then drop from slower tiers what it no longer has.

        Args:
            sources: sparse models of the new version, one a table; by default the present ones, read anew.

        Raises:
            ConfigError: not one source a table.
            ModelFileError: a sparse model cannot be loaded; the old version stays in force.
        """
        paths = [table.spec.source for table in self.tables] if sources is None else list(sources)
        if len(paths) != len(self.tables):
            raise ConfigError(f"sparse_files: {len(paths)} for the {len(self.tables)} tables of model {self.name!r}")
        with ExitStack() as unused:
            filled: list[HostStore | None] = []
            for table, path in zip(self.tables, paths, strict=True):
                new = self._filled(table, path, on_rows) if self._host is not None else None
                if new is not None:
                    unused.callback(new.close)
                filled.append(new)
            if self._writable_slower():
                for table, path in zip(self.tables, paths, strict=True):
                    self._insert_slower(table.spec, path, on_rows)
            self.switches += 1
            for table, new in zip(self.tables, filled, strict=True):
                table.adopt(new)
            self.switches += 1
        if self._writable_slower():
            for table, path in zip(self.tables, paths, strict=True):
                self._drop_stale(table.spec, path)

    def close(self, *, erase: bool = False) -> None:
        """Free the host memory of all tables; with ``erase`` also drop their rows from slower tiers."""
        for table in self.tables:
            if self._host is not None:
                self._host.erase(table.spec.tag)
            if erase:
                self._slower.erase(table.spec.tag)

    # -- the parts of loading ---------------------------------------------------------------------

    def _fills_host(self) -> bool:
        return self._host is not None and self.config.volatile_db.initialize_after_startup

    def _writable_slower(self) -> list[Tier]:
        if not self.config.persistent_db.initialize_after_startup:
            return []
        return [tier for tier in self._slower.tiers if not tier.read_only]

    def _filled(self, table: TableSession, path: str, on_rows: Progress) -> HostStore:
        assert table.store is not None
        with open_model(path, table.spec.dim) as reader:
            return load_table(
                table.store,
                reader,
                wide=self.config.supportlonglong,
                rate=self.config.volatile_db.initial_cache_rate,
                on_rows=lambda rows: on_rows(table.spec.tag, rows),
            )

    def _insert_slower(self, spec: TableSpec, path: str, on_rows: Progress) -> None:
        with open_model(path, spec.dim) as reader:
            for keys, rows in stream_table(reader, reader.rows, wide=self.config.supportlonglong):
                self._slower.insert(spec.tag, keys, rows)
                on_rows(spec.tag, len(keys))

    def _drop_stale(self, spec: TableSpec, path: str) -> None:
        with open_model(path, spec.dim) as reader:
            present = np.empty(reader.rows, np.int64)
            reader.read(0, reader.rows, present, None)
        present.sort()
        for tier in self._writable_slower():
            for keys, _ in tier.scan(spec.tag):
                stale = keys[~np.isin(keys, present)]
                if len(stale):
                    tier.erase(spec.tag, stale)
