"""One model in service: its tables, opened, loaded, replaced and let go of together."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from hps_numba.config import ModelConfig, ServerConfig, TableSpec
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.hierarchy import TierStack
from hps_numba.session import Background, TableSession
from hps_numba.storage.host_store import HostStore
from hps_numba.storage.loading import load_table, rows_to_load, stream_table
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
                output_dtype=_numpy_dtype(model.output_dtype),
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
        elif 0 <= (number := _number(table_id)) < len(self.tables):
            return self.tables[number]
        known = ", ".join(f"{number} ({table.spec.name})" for number, table in enumerate(self.tables))
        raise UnknownModelError(f"table_id: model {self.name!r} has no table {table_id!r}, it has {known}")

    def load(self, on_rows: Progress = _no_progress) -> None:
        """Bring the rows of the sparse models into all tiers that are to be initialised."""
        for tier in self._slower.writable:
            if tier.section.initialize_after_startup:
                for table in self.tables:
                    self._insert_slower(tier, table.spec, table.spec.source, on_rows)
        if self._fills_host():
            for table in self.tables:
                table.adopt(self._filled(table, table.spec.source, on_rows))
        for table in self.tables:
            log.info("%s: %d rows in host memory", table.spec.tag, table.stats(self.version).rows)
        if self._host is None and not self._slower:
            log.warning("model %s: no volatile_db and no persistent_db: every key gets its table's default value", self.name)

    def replace(self, sources: Iterable[str] | None = None, on_rows: Progress = _no_progress) -> None:
        """Load a new version aside, then switch all tables to it; then drop from slower tiers what it no longer has.

        Every tier that can be written gets the new version, also those that are not initialised at the start. While slower
        tiers change, other writes wait, so that none of them is taken for a row of the old version.

        Args:
            sources: sparse models of the new version, one a table; by default the present ones, read anew.

        Raises:
            ConfigError: not one source a table.
            ModelFileError: a sparse model cannot be loaded; the old version stays in force.
        """
        paths = [table.spec.source for table in self.tables] if sources is None else list(sources)
        if len(paths) != len(self.tables):
            raise ConfigError(f"sparse_files: {len(paths)} for the {len(self.tables)} tables of model {self.name!r}")
        tiers = self._slower.writable
        with ExitStack() as held:
            filled: list[HostStore | None] = []
            for table, path in zip(self.tables, paths, strict=True):
                new = self._aside(table, path, on_rows, fill=self.replacement_fills_host)
                if new is not None:
                    held.callback(new.close)
                filled.append(new)
            for table in self.tables if tiers else ():
                held.enter_context(table.changing())
            for tier in reversed(tiers):
                for table, path in zip(self.tables, paths, strict=True):
                    self._insert_slower(tier, table.spec, path, on_rows)
            self.switches += 1
            try:
                for table, new in zip(self.tables, filled, strict=True):
                    table.adopt(new)
            finally:
                self.switches += 1
            for table, path in zip(self.tables, paths, strict=True):
                self._drop_stale(tiers, table.spec, path)

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

    @property
    def replacement_fills_host(self) -> bool:
        """A new version is loaded into host memory, because it is at the start too, or because nothing else has the rows."""
        return self._fills_host() or (self._host is not None and not self._slower.writable)

    def _aside(self, table: TableSession, path: str, on_rows: Progress, *, fill: bool) -> HostStore | None:
        """The new version of a table for host memory; empty where host memory fills itself from the tiers behind."""
        if table.store is None:
            return None
        return self._filled(table, path, on_rows) if fill else table.store.sibling()

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

    def _insert_slower(self, tier: Tier, spec: TableSpec, path: str, on_rows: Progress) -> None:
        with open_model(path, spec.dim) as reader:
            for keys, rows in stream_table(reader, self._rows_for(tier, reader.rows), wide=self.config.supportlonglong):
                tier.insert(spec.tag, keys, rows)
                on_rows(spec.tag, len(keys))

    @staticmethod
    def _rows_for(tier: Tier, rows: int) -> int:
        """Rows of the head of a file that go to a tier: a volatile one has an ``initial_cache_rate``."""
        return rows_to_load(rows, getattr(tier.section, "initial_cache_rate", 1.0))

    def _drop_stale(self, tiers: Sequence[Tier], spec: TableSpec, path: str) -> None:
        if not tiers:
            return
        with open_model(path, spec.dim) as reader:
            present = np.empty(reader.rows, np.int64)
            reader.read(0, reader.rows, present, None)
        for tier in tiers:
            wanted = np.append(np.sort(present[: self._rows_for(tier, len(present))]), 0)
            last = len(wanted) - 1
            for keys, _ in tier.scan(spec.tag):
                place = np.searchsorted(wanted[:last], keys)
                stale = keys[(place == last) | (wanted[place] != keys)]
                if len(stale):
                    tier.erase(spec.tag, stale)


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        raise ConfigError("output_dtype: 'bfloat16' has no NumPy dtype, this version answers in float32 or float16")
    return np.dtype(name)


def _number(table_id: object) -> int:
    """``table_id`` if it is an integer of any kind, else -1."""
    try:
        return -1 if isinstance(table_id, bool) else operator.index(table_id)  # type: ignore[arg-type]
    except TypeError:
        return -1
