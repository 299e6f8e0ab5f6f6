"""One model in service: its tables, opened, loaded, replaced and closed together."""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.config import ModelConfig, ServerConfig, TableSpec
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.runtime.background import BackgroundJobs
from hps_numba.server.cache_shape import cache_shape
from hps_numba.server.fused_tables import FusedTables
from hps_numba.server.manifest import Manifest
from hps_numba.server.model_jobs import Check, go_on
from hps_numba.server.model_versions import ModelVersion, ModelVersions
from hps_numba.server.plan import Plan, TablePlan, plan_of
from hps_numba.server.prefetches import Prefetches
from hps_numba.server.replacement import Replacement, new_version
from hps_numba.server.replays import Replays
from hps_numba.server.slow_path import SlowPathOptions
from hps_numba.server.start_log import log_cache, log_host_rows, log_model_caches
from hps_numba.server.table import ServedTable
from hps_numba.server.table_caches import TableCaches
from hps_numba.server.table_loading import Progress, TableLoading, no_progress, stoppable
from hps_numba.server.table_plan import plan_caches, plan_table, plan_tables
from hps_numba.server.timings import Timings
from hps_numba.storage.tier_counts import TierCounts
from hps_numba.storage.tier_stack import TierStack
from hps_numba.storage.tiers._host_tables import HostTablesTier

__all__ = ["Policies", "ServedModel", "load_policies"]

log = logging.getLogger(__name__)
Policies = tuple[Policy, ...]
#: config keys of a model that only a cache or its refresh reads
_KEYS_OF_CACHES = ("miss_path", "refresh_interval", "refresh_delay", "cache_policy", "cache_row_dtype", "cache_size_bytes")


def load_policies(config: ServerConfig, model: ModelConfig, *, allow_code: bool = False) -> Policies:
    """The cache policy of each table of a model.

    Args:
        allow_code: a policy may be a reference, which is imported.

    Raises:
        PolicyError: there is no policy of that name, or it breaks the contract.
    """
    names = (spec.cache_policy for spec in model.tables(config.folder))
    return tuple(load_policy(name, allow_code=allow_code, folder=config.folder) for name in names)


class ServedModel:
    """The tables of one model.

    Args:
        config: the server's config.   model: this model's part of it.
        host: the volatile tier, if it keeps rows in this process.
        slower: all other tiers.
        devices: where caches of the tables are: CUDA ordinals, ``(None,)`` for host memory, or empty for no caches.
        policies: of the caches, one a table; empty if there are no caches.

    Attributes:
        tables: in table order.   has_slower_tiers: lookups may go on to tiers that are slower than host memory.
        groups: selections of tables that are looked up together on a device.
        switch: of the versions of all tables.   versions: which is in force.
        prefetches: rows of slower tiers that are brought up ahead of lookups.
        replays: of graphs that captured lookups, as far as they are announced.
        planned: bytes of each table, as they were planned when it was loaded.
        replacements: how long they took, as far as who calls ``replace`` times it.

    Thread safety: lookups from any thread; ``load``, ``replace`` and ``close`` by one thread at a time.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        host: HostTablesTier | None,
        slower: TierStack,
        *,
        devices: tuple[int | None, ...] = (),
        policies: Policies = (),
    ) -> None:
        self.config = config
        self.model = model
        self.name = model.model
        self.switch = VersionSwitch()
        self.groups = FusedTables(model.num_of_worker_buffer_in_pool, self.switch)
        self._devices = devices
        self._policies = policies
        self._host = host
        self._slower = slower
        self._loading = TableLoading(config)
        self.replays = Replays(self.name)
        self._jobs = BackgroundJobs(model.thread_pool_size)
        self.prefetches = Prefetches()
        self.planned: Sequence[TablePlan] = ()
        self.replacements = Timings()
        with ExitStack() as undo:
            self.tables = tuple(self._open_table(spec, undo) for spec in model.tables(config.folder))
            undo.pop_all()
        self._by_name = {table.spec.name: table for table in self.tables}
        self.has_slower_tiers = any(table.slow_path is not None for table in self.tables)
        self.versions = ModelVersions(self.name, tuple(table.spec.source for table in self.tables))

    def _open_table(self, spec: TableSpec, undo: ExitStack) -> ServedTable:
        store = None
        if self._host is not None:
            store = self._host.store(spec.tag, spec.dim)
            undo.callback(self._host.leave, spec.tag)
        options = SlowPathOptions(
            time_budget=self.model.time_budget_ms / 1000 or None,
            keep_missed=self.config.volatile_db.cache_missed_embeddings,
            hit_rate_threshold=self.model.hit_rate_threshold,
        )
        table = ServedTable(spec, store, self._slower, self._jobs.submit, options, output_type=self.model.output_dtype)
        table.writes.evictions.demotes = self._fills_host() and self._slower.may_lack_rows
        return table

    @property
    def version(self) -> int:
        """Number of the version in force."""
        return self.versions.in_force.number

    @property
    def has_caches(self) -> bool:
        """Whether some table has a cache."""
        return any(table.caches is not None for table in self.tables)

    def table(self, table_id: int | str) -> ServedTable:
        """A table by number or name.

        Raises:
            UnknownModelError: there is no such table.
        """
        if isinstance(table_id, str):
            if table_id in self._by_name:
                return self._by_name[table_id]
        elif 0 <= (number := _number(table_id)) < len(self.tables):
            return self.tables[number]
        known = ", ".join(f"{number} ({table.spec.name})" for number, table in enumerate(self.tables))
        raise UnknownModelError(f"table_id: model {self.name!r} has no table {show(table_id)}, it has {known}")

    def find(self, name: str) -> ServedTable | None:
        """A table by name, or None."""
        return self._by_name.get(name)

    def _selected(self, table_id: int | str | None) -> tuple[ServedTable, ...]:
        """One table, or for None all."""
        return self.tables if table_id is None else (self.table(table_id),)

    # -- loading ---------------------------------------------------------------------

    def load(self, on_rows: Progress = no_progress, check: Check = go_on) -> None:
        """Bring the rows of the sparse models into all tiers that the config initializes, and open the caches.

        ``check`` is called while rows are loaded.

        Raises:
            ModelFileError: a sparse model is missing, damaged or does not fit its table.   TierError: a slower tier failed.
            CapacityError: no memory for rows or caches.
        """
        self._warn_of_keys_without_effect()
        on_rows = stoppable(on_rows, check)
        with self._no_loading(check):
            kept = self._kept_tables()
            for tier in self._slower.writable:
                if tier.section.initialize_after_startup:
                    for table in self.tables:
                        if table not in kept:
                            self._loading.insert(tier, table.spec, table.spec.source, on_rows)
            if self._fills_host():
                for table in self.tables:
                    self._load_host(table, on_rows, table in kept)
        if log.isEnabledFor(logging.INFO):
            for table in self.tables:
                if table.store is not None:
                    log_host_rows(table.spec, table.store, self._loading.rows(table.spec))
        if self._devices:
            self._open_caches()
        if self._host is None and not self._slower:
            log.warning("model %s: no volatile_db and no persistent_db: every key gets its table's default value", self.name)

    def _kept_tables(self) -> list[ServedTable]:
        """Tables of which another process has replaced the rows by those of other files: they stay, in every tier."""
        kept, replaced = [], False
        for table in self.tables:
            if table.store is not None:
                there, own = table.store.memory.mark, self._loading.mark_of(table.store, table.spec.source)
                replaced = replaced or there.replaced
                if there.known and there.digest != own.digest:
                    kept.append(table)
        return kept if replaced else []

    def _load_host(self, table: ServedTable, on_rows: Progress, kept: bool) -> None:
        """Bring the rows of the sparse model of one table into host memory, unless another process has done so.

        Args:
            kept: another process has replaced the model: its rows stay, even if they are of other files.
        """
        store, path = table.store, table.spec.source
        assert store is not None
        mark, there = self._loading.mark_of(store, path), store.memory.mark
        if kept:
            log.warning(
                "%s: %s is not loaded: replace_model has brought %s for all processes, whose rows stay",
                table.spec.tag,
                path,
                there.path,
            )
        elif mark.known and there.digest == mark.digest:
            log.info("%s: another process has loaded %s", table.spec.tag, path)
        else:
            table.writes.adopt(new_version(table, self._loading, path, on_rows, fill=True))
            store.memory.mark = mark
            return
        on_rows(table.spec.tag, self._loading.rows(table.spec))

    def _open_caches(self) -> None:
        """Open a cache of each table on each device; memory for all of them is taken before the first is filled."""
        if self.model.gpucache or self.model.embedding_cache_type != "dynamic":
            log_model_caches(self.config, self.model, self._devices)
        for table, policy in zip(self.tables, self._policies, strict=True):
            rows = self._loading.rows(table.spec)  # host memory may have fewer, as it is filled by and by
            shape = cache_shape(self.model, table.spec, rows)
            if shape is None:
                continue
            log_cache(table.spec, shape, rows, policy)
            host_rows = 0 if table.store is None else len(table.store)
            planned = plan_caches(self.config, table.spec, shape, host_rows, policy).memory
            of_cache = planned.needed_bytes - planned.group_workspaces  # those are memory of the groups
            caches = TableCaches(table.spec, self.model, shape, self._devices, policy, table.store, self.switch, of_cache)
            table.attach_caches(caches)
        for table in self.tables:
            if table.caches is not None:
                table.caches.warm()

    def _fills_host(self) -> bool:
        return self._host is not None and self.config.volatile_db.initialize_after_startup

    def _warn_of_keys_without_effect(self) -> None:
        if self._devices:
            return
        keys = [key for key in _KEYS_OF_CACHES if not _is_default(self.model, key)]
        if self._slower and self.model.hit_rate_threshold < 1 and not _is_default(self.model, "hit_rate_threshold"):
            keys.append("hit_rate_threshold")  # from 1 on it asks for what happens anyway
        if keys:
            log.warning(
                "model %s: %s: without effect, the model has no cache and waits for slower tiers whatever the hit rate",
                self.name,
                ", ".join(keys),
            )

    # -- caches ---------------------------------------------------------------------

    def set_policy(self, policy: Any, table_id: int | str | None = None, *, allow_code: bool = False) -> None:
        """Switch the caches of one table, or of all, to another policy, given by name or as a class.

        Raises:
            PolicyError: there is no policy of that name, it breaks the contract, or it does not compile for a device.
            ConfigError: static or uvm caches.   CapacityError: no memory for the state of the policy.
        """
        if isinstance(policy, str):
            loaded = load_policy(policy, allow_code=allow_code, folder=self.config.folder)
        else:
            loaded = as_policy(policy)
        tables = self._selected(table_id)
        uncached = [table.spec.tag for table in tables if table.caches is None]
        if uncached:
            log.warning("%s: cache policy %r without effect: there is no cache", ", ".join(uncached), loaded.name)
        for table in tables:
            if table.caches is not None:
                with self.groups.without(table):
                    table.caches.set_policy(loaded)

    def refresh(self, table_id: int | str | None = None, *, drop: bool = True) -> None:
        """Reload the caches of one table, or of all, from host memory and slower tiers.

        Raises:
            UnknownModelError: there is no such table.   TierError: a slower tier failed.
        """
        for table in self._selected(table_id):
            table.writes.refresh(drop=drop)

    # -- another version ---------------------------------------------------------------------

    @property
    def replacement_fills_host(self) -> bool:
        """A new version is loaded into host memory, because the first one was too, or because no other tier has the rows."""
        return self._fills_host() or (self._host is not None and not self._slower.writable)

    def replace(
        self,
        sources: Iterable[str] | None = None,
        on_rows: Progress = no_progress,
        check: Check = go_on,
        *,
        number: int | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        """Load a new version beside the old one, switch all tables to it, then drop from slower tiers what it lacks.

        Every tier that can be written gets the new version, also those that are not initialized at the start. Other writes wait
        from the first change of a tier to the end, so that none of them is taken for a row of the old version. Every file is
        read to its end before the first tier changes.

        Args:
            sources: sparse models of the new version, one a table; by default the ones of the config, read again.
            number: of the new version; by default one more than that in force.
            manifest: what says so, if a message does; rows that updates have changed since its ``since_ms`` are kept.
            check: called while the replacement can still be stopped; it is undone if this raises.

        Raises:
            ConfigError: not one source a table.
            ModelFileError: a sparse model cannot be loaded; the old version stays in force in every tier.
            TierError: a slower tier failed. Before the switch: host memory keeps the old version, slower tiers may hold rows
                of both. After it: the new version is in force, slower tiers may still hold rows that it lacks. A second
                ``replace`` mends either.
            DeviceError: a block of ``replays`` stays open. As ``TierError`` before the switch.
        """
        paths = self._paths(sources)
        number = self.version + 1 if number is None else number
        tables = {table.spec.name: path for table, path in zip(self.tables, paths, strict=True)}
        told = Manifest(model=self.name, version=number, tables=tables) if manifest is None else manifest
        new = ModelVersion(
            number=number,
            sources=tuple(paths),
            manifest=told.to_dict(),
            since_ms=None if manifest is None else manifest.since_ms,
        )
        self._replacement().run(new, on_rows, check, carry=manifest is not None and manifest.since_ms is not None)

    def reload(self, on_rows: Progress = no_progress, check: Check = go_on) -> None:
        """Load the files of the version in force again, as ``replace``: what updates did is gone, and the version stays.

        Raises:
            As ``replace``.
        """
        self._replacement().run(replace(self.versions.in_force, again=True), on_rows, check)

    def _replacement(self) -> Replacement:
        fill, tiers = self.replacement_fills_host, self._slower.writable
        validate = bool(tiers) and not (fill and self.config.volatile_db.initial_cache_rate == 1)
        return Replacement(
            self.tables,
            tiers,
            self._loading,
            self.switch,
            self.groups,
            self.replays,
            self._no_loading,
            fill=fill,
            validate=validate,
            versions=self.versions,
        )

    def _no_loading(self, check: Check) -> AbstractContextManager[None]:
        """A block in which no other process loads tables that are shared with this one; ``check`` is called until it begins."""
        return nullcontext() if self._host is None else self._host.loading(check)

    def _paths(self, sources: Iterable[str] | None) -> list[str]:
        paths = [table.spec.source for table in self.tables] if sources is None else list(sources)
        if len(paths) != len(self.tables):
            raise ConfigError(
                f"sparse_files: expected one for each of the {len(self.tables)} tables of model {self.name!r}, got {len(paths)}"
            )
        return paths

    # -- sizes ---------------------------------------------------------------------

    def table_plans(self) -> list[TablePlan]:
        """Bytes that each table takes, from the size of its sparse model, with the policy that is in force."""
        return plan_tables(self.config, [table.spec for table in self.tables], self._policies_in_force())

    def _policies_in_force(self) -> list[Policy | None]:
        cached = [None if table.caches is None else next(iter(table.caches), None) for table in self.tables]
        known = self._policies or (None,) * len(self.tables)
        return [policy if cache is None else cache.policy for cache, policy in zip(cached, known, strict=True)]

    @property
    def device_bytes(self) -> dict[int, int]:
        """Bytes that the caches take on each device now, with all that lookups and graphs made them take."""
        taken: dict[int, int] = {}
        for table in self.tables:
            for cache in table.caches or ():
                if cache.device is not None:
                    of_groups = sum(self.groups.bytes_for(cache))
                    taken[cache.device] = taken.get(cache.device, 0) + cache.bytes + of_groups
        return taken

    def plan_of_replacement(self, sources: Iterable[str] | None = None) -> Plan:
        """Bytes that ``replace(sources)`` takes beside what there is; caches take none.

        Raises:
            ConfigError: not one source a table.   ModelFileError: a sparse model is missing or does not fit its table.
        """
        fills = self.replacement_fills_host
        return plan_of(
            plan_table(self.config, table.spec, path, fills_host=fills, caches=False)
            for table, path in zip(self.tables, self._paths(sources), strict=True)
        )

    @property
    def background(self) -> dict[str, BackgroundJobs]:
        """The pools of background threads: for rows that lookups fetch, and for prefetches."""
        return {"lookups": self._jobs, "prefetches": self.prefetches.jobs}

    def tier_counts(self, table: ServedTable) -> dict[str, TierCounts]:
        """What fetches from each slower tier did for a table."""
        return self._slower.counts(table.spec.tag)

    # -- ending ---------------------------------------------------------------------

    @property
    def works_here(self) -> bool:
        """Whether this thread fetches rows for the model in the background; ``release`` waits for it."""
        return self._jobs.works_here or self.prefetches.works_here

    def release(self) -> None:
        """Wait for background jobs and replays, and free the memory of the caches; host memory and tiers stay."""
        with ExitStack() as closing:
            for table in self.tables:
                if table.caches is not None:
                    closing.callback(table.caches.close)
            closing.callback(self.groups.close)
            closing.callback(self._jobs.close)
            closing.callback(self.prefetches.close)
            closing.callback(self.replays.close)

    def close(self, *, erase: bool = False) -> None:
        """Free the host memory of all tables, unless other processes share it; then drop their rows from slower tiers.

        Args:
            erase: drop them, and shared rows for all processes.

        Raises:
            TierError: a slower tier failed; everything else was freed and dropped.
        """
        with ExitStack() as closing:  # the last callback comes first
            for table in self.tables:
                closing.callback(self._slower.forget, table.spec.tag)
            for table in self.tables if erase else ():
                closing.callback(self._slower.erase, table.spec.tag)
            if self._host is not None:
                for table in self.tables:
                    closing.callback(self._host.erase if erase else self._host.leave, table.spec.tag)
            closing.callback(self.release)


def _is_default(model: ModelConfig, key: str) -> bool:
    """Whether a config key has its default value, also as a list of one default a table."""
    value, default = getattr(model, key), ModelConfig.model_fields[key].default
    return value == default or (isinstance(value, tuple) and set(value) <= {default})


def _number(table_id: object) -> int:
    """``table_id`` if it is an integer of any type, else -1."""
    try:
        return -1 if isinstance(table_id, bool) else operator.index(table_id)  # type: ignore[arg-type]
    except Exception:  # whatever a foreign object raises
        return -1
