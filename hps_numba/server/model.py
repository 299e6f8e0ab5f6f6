"""One model in service: its tables, opened, loaded, replaced and let go of together."""

from __future__ import annotations

import logging
import operator
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from hps_numba.config import InferenceParams, ModelConfig, ServerConfig, TableSpec, read_config
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.server.cache_shape import cache_shape
from hps_numba.server.fused_tables import FusedTables
from hps_numba.server.plan import Plan, plan_of, plan_table
from hps_numba.server.table import ServedTable
from hps_numba.server.table_caches import TableCaches
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.loading import load_table, rows_to_load, stream_table
from hps_numba.storage.model_files import open_model
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers._tier import Tier
from hps_numba.storage.tiers.hash_map import HashMapTier

__all__ = ["Policies", "Progress", "ServedModel", "config_of_model", "load_policies"]

log = logging.getLogger(__name__)
Policies = tuple[Policy, ...]
Progress = Callable[[str, int], None]
#: keys of a model that only a GPU cache or its refresh would read
_WITHOUT_EFFECT = ("miss_path", "refresh_interval", "refresh_delay", "cache_policy", "cache_row_dtype", "cache_size_bytes")


def _no_progress(what: str, rows: int) -> None:
    del what, rows


def config_of_model(
    server: ServerConfig, model: Mapping[str, Any] | InferenceParams | ModelConfig, *, strict: bool = False
) -> ServerConfig:
    """A config of one model over the databases of a server that runs.

    Raises:
        ConfigError: the description is wrong, or its keys are of another width than the server's.
    """
    if isinstance(model, InferenceParams):
        alone = read_config([model])
        if alone.supportlonglong != server.supportlonglong:
            bits = 64 if server.supportlonglong else 32
            raise ConfigError(f"i64_input_key: {model.i64_input_key}, but this server has keys of {bits} bits")
        entry = alone.to_dict()["models"][0]
    elif isinstance(model, ModelConfig):
        entry = model.model_dump(mode="json")
    elif isinstance(model, Mapping):
        entry = dict(model)
    else:
        raise ConfigError(f"model: {type(model).__name__} came, a mapping, InferenceParams or ModelConfig is wanted")
    return read_config({**server.to_dict(), "models": [entry]}, strict=strict, beside=server.source)


def load_policies(config: ServerConfig, model: ModelConfig, *, allow_code: bool = False) -> Policies:
    """The cache policy of each table of a model; ``allow_code``: it may be a Python file.

    Raises:
        PolicyError: there is none of that name, or it is none.
    """
    names = (spec.cache_policy for spec in model.tables(config.folder))
    return tuple(load_policy(name, allow_code=allow_code, folder=config.folder) for name in names)


class ServedModel:
    """The tables of one model.

    Args:
        config: the server's config; ``model``: this model's part of it.
        host: the volatile tier, if it keeps rows in this process.
        slower: all other tiers.
        devices: where caches of the tables are: CUDA ordinals, ``(None,)`` for host memory, or nowhere.
        policies: of the caches, one a table; nothing if there are no caches.

    **Threads:** lookups from any thread; ``load``, ``replace`` and ``close`` by one at a time.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        host: HashMapTier | None,
        slower: TierStack,
        *,
        devices: tuple[int | None, ...] = (),
        policies: Policies = (),
    ) -> None:
        self._devices = devices
        self._policies = policies
        self._jobs = BackgroundJobs(model.thread_pool_size)
        self.config = config
        self.model = model
        self.name = model.model
        self._host = host
        self._slower = slower
        with ExitStack() as undo:
            self.tables = tuple(self._session(spec, undo) for spec in model.tables(config.folder))
            undo.pop_all()
        self._by_name = {table.spec.name: table for table in self.tables}
        #: of tables that are looked up together on a device
        self.groups = FusedTables(model.num_of_worker_buffer_in_pool)
        #: even while one version of all tables is in force, odd while they are being switched
        self.switches = 0

    def _session(self, spec: TableSpec, undo: ExitStack) -> ServedTable:
        store = None
        if self._host is not None:
            store = self._host.store(spec.tag, spec.dim)
            undo.callback(self._host.erase, spec.tag)
        return ServedTable(
            spec,
            store,
            self._slower,
            time_budget=self.model.time_budget_ms / 1000 or None,
            keep_missed=self.config.volatile_db.cache_missed_embeddings,
            background=self._jobs.submit,
            output_type=self.model.output_dtype,
            hit_rate_threshold=self.model.hit_rate_threshold,
        )

    @property
    def version(self) -> int:
        """Number of the content: 1 at first, one more with each replacement."""
        return 1 + self.switches // 2

    def table(self, table_id: int | str) -> ServedTable:
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
        self._warn_of_keys_without_effect()
        for tier in self._slower.writable:
            if tier.section.initialize_after_startup:
                for table in self.tables:
                    self._insert_slower(tier, table.spec, table.spec.source, on_rows)
        if self._fills_host():
            for table in self.tables:
                table.adopt(self._filled(table, table.spec.source, on_rows))
        if self._devices:
            self._open_caches()
        for table in self.tables:
            log.info("%s: %d rows in host memory", table.spec.tag, table.stats(self.version).rows)
        if self._host is None and not self._slower:
            log.warning("model %s: no volatile_db and no persistent_db: every key gets its table's default value", self.name)

    def _open_caches(self) -> None:
        """A cache of each table on each device, filled; memory of all of them is taken before the first is filled."""
        for table, policy in zip(self.tables, self._policies, strict=True):
            rows = self._rows_in_file(table.spec)  # host memory may have fewer, as it is filled by and by
            shape = cache_shape(self.model, table.spec, rows)
            if shape is not None:
                table.caches = TableCaches(table.spec, self.model, shape, self._devices, policy, table.store)
        for table in self.tables:
            if table.caches is not None:
                table.caches.warm()

    @staticmethod
    def _rows_in_file(spec: TableSpec) -> int:
        with open_model(spec.source, spec.dim) as reader:
            return reader.rows

    @property
    def has_caches(self) -> bool:
        """Some table has a cache."""
        return any(table.caches is not None for table in self.tables)

    def set_policy(self, policy: Any, table_id: int | str | None = None, *, allow_code: bool = False) -> None:
        """Let another policy, by name or as a class, decide who leaves the caches of one table, or of all.

        Raises:
            PolicyError: there is none of that name, it is none, or it does not compile for a device.
            ConfigError: static or uvm caches.   CapacityError: no memory for what it remembers.
        """
        if isinstance(policy, str):
            wanted = load_policy(policy, allow_code=allow_code, folder=self.config.folder)
        else:
            wanted = as_policy(policy)
        tables = self.tables if table_id is None else (self.table(table_id),)
        without = [table.spec.tag for table in tables if table.caches is None]
        if without:
            log.warning("%s: cache policy %r without effect: there is no cache", ", ".join(without), wanted.name)
        for table in tables:
            if table.caches is not None:
                with self.groups.without(table):
                    table.caches.set_policy(wanted)

    def refresh(self, table_id: int | str | None = None, *, drop: bool = True) -> None:
        """Renew the caches of one table, or of all."""
        for table in self.tables if table_id is None else (self.table(table_id),):
            table.refresh(drop=drop)

    def replace(self, sources: Iterable[str] | None = None, on_rows: Progress = _no_progress) -> None:
        """Load a new version aside, then switch all tables to it; then drop from slower tiers what it no longer has.

        Every tier that can be written gets the new version, also those that are not initialised at the start. From then on
        other writes wait, so that none of them is taken for a row of the old version. Every file was read to its end before
        the first tier changes.

        Args:
            sources: sparse models of the new version, one a table; by default the present ones, read anew.

        Raises:
            ConfigError: not one source a table.
            ModelFileError: a sparse model cannot be loaded; the old version stays in force in every tier.
            TierError: a slower tier failed. Before the switch: host memory keeps the old version, slower tiers may hold rows
                of both. After it: the new version is in force, slower tiers may still hold rows that it lacks. A second
                ``replace`` mends either.
        """
        paths = self._paths(sources)
        tiers = self._slower.writable
        with ExitStack() as held:
            filled: list[HostStore | None] = []
            for table, path in zip(self.tables, paths, strict=True):
                new = self._aside(table, path, on_rows, fill=self.replacement_fills_host)
                if new is not None:
                    held.callback(new.close)
                filled.append(new)
                if tiers and not (self.replacement_fills_host and self.config.volatile_db.initial_cache_rate == 1):
                    self._validate(table.spec, path)
            for table in self.tables:  # before the switch, which then waits for no write
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

    def release(self) -> None:
        """Let background jobs end and give back the memory of the caches; host memory and tiers stay."""
        with ExitStack() as closing:
            for table in self.tables:
                if table.caches is not None:
                    closing.callback(table.caches.close)
            closing.callback(self.groups.close)
            closing.callback(self._jobs.close)

    def close(self, *, erase: bool = False) -> None:
        """Free the host memory of all tables; then, with ``erase``, also drop their rows from slower tiers.

        Raises:
            TierError: a slower tier failed; everything else was freed and dropped.
        """
        with ExitStack() as closing:  # the last callback comes first
            for table in self.tables if erase else ():
                closing.callback(self._slower.erase, table.spec.tag)
            if self._host is not None:
                for table in self.tables:
                    closing.callback(self._host.erase, table.spec.tag)
            closing.callback(self.release)

    def plan(self) -> Plan:
        """Bytes that the tables take, from the sizes of their sparse models."""
        return plan_of(plan_table(self.config, table.spec) for table in self.tables)

    def plan_of_replacement(self, sources: Iterable[str] | None = None) -> Plan:
        """Bytes that ``replace(sources)`` takes.

        Raises:
            ConfigError: not one source a table.   ModelFileError: a sparse model is missing or does not fit its table.
        """
        fills = self.replacement_fills_host
        return plan_of(
            plan_table(self.config, table.spec, path, fills_host=fills)
            for table, path in zip(self.tables, self._paths(sources), strict=True)
        )

    def _paths(self, sources: Iterable[str] | None) -> list[str]:
        paths = [table.spec.source for table in self.tables] if sources is None else list(sources)
        if len(paths) != len(self.tables):
            raise ConfigError(f"sparse_files: {len(paths)} for the {len(self.tables)} tables of model {self.name!r}")
        return paths

    def _warn_of_keys_without_effect(self) -> None:
        if self._devices:
            return
        keys = [key for key in _WITHOUT_EFFECT if not _is_default(self.model, key)]
        if self._slower and self.model.hit_rate_threshold < 1 and not _is_default(self.model, "hit_rate_threshold"):
            keys.append("hit_rate_threshold")  # from 1 on it asks for what happens anyway
        if keys:
            log.warning(
                "model %s: %s: without effect, the model has no cache and waits for slower tiers whatever the hit rate",
                self.name,
                ", ".join(keys),
            )

    # -- the parts of loading ---------------------------------------------------------------------

    def _fills_host(self) -> bool:
        return self._host is not None and self.config.volatile_db.initialize_after_startup

    @property
    def replacement_fills_host(self) -> bool:
        """A new version is loaded into host memory, because it is at the start too, or because nothing else has the rows."""
        return self._fills_host() or (self._host is not None and not self._slower.writable)

    def _aside(self, table: ServedTable, path: str, on_rows: Progress, *, fill: bool) -> HostStore | None:
        """The new version of a table for host memory; empty where host memory fills itself from the tiers behind."""
        if table.store is None:
            return None
        return self._filled(table, path, on_rows) if fill else table.store.sibling()

    def _filled(self, table: ServedTable, path: str, on_rows: Progress) -> HostStore:
        assert table.store is not None
        with open_model(path, table.spec.dim) as reader:
            return load_table(
                table.store,
                reader,
                wide=self.config.supportlonglong,
                rate=self.config.volatile_db.initial_cache_rate,
                on_rows=lambda rows: on_rows(table.spec.tag, rows),
            )

    def _validate(self, spec: TableSpec, path: str) -> None:
        """Read a sparse model to its end, as some damage shows only there."""
        with open_model(path, spec.dim) as reader:
            deque(stream_table(reader, reader.rows, wide=self.config.supportlonglong), maxlen=0)

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


def _is_default(model: ModelConfig, key: str) -> bool:
    """Also if it is a list of one default a table."""
    value, default = getattr(model, key), ModelConfig.model_fields[key].default
    return value == default or (isinstance(value, tuple) and set(value) <= {default})


def _number(table_id: object) -> int:
    """``table_id`` if it is an integer of any kind, else -1."""
    try:
        return -1 if isinstance(table_id, bool) else operator.index(table_id)  # type: ignore[arg-type]
    except TypeError:
        return -1
