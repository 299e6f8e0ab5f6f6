"""The parameter server: builds all rooms from a config, changes rows and models; ``server.lookups`` answers lookups."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.arrays.host import as_keys, as_rows
from hps_numba.config import ConfigSource, InferenceParams, ModelConfig, ServerConfig, VolatileDatabaseConfig, read_config
from hps_numba.config.spec import TableSpec, locate
from hps_numba.device import driver
from hps_numba.device.host_memory import PinnedHostAllocator, PlainHostAllocator
from hps_numba.errors import ConfigError, DeviceError, ModelFileError, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.progress import rows_progress
from hps_numba.runtime.timer import Timer
from hps_numba.server.lookups import ServerLookups
from hps_numba.server.model import Policies, ServedModel, config_of_model, load_policies
from hps_numba.server.plan import Plan, make_plan, plan_of
from hps_numba.server.stats import TableStats
from hps_numba.server.table import ServedTable
from hps_numba.server.table_writes import Change
from hps_numba.storage.tier_stack import TierStack, open_tiers
from hps_numba.storage.tiers._tier import Tier
from hps_numba.storage.tiers.hash_map import HashMapTier
from hps_numba.traces.recording import TraceRecording

__all__ = ["HPS"]

log = logging.getLogger(__name__)


class HPS(ServerLookups):
    """A hierarchical parameter server in this process.

    Args:
        config: path of a ``ps_config`` JSON file, the same as a dict, ``ParameterServerConfig``, or a list of
            ``InferenceParams``.
        strict: unknown config keys are errors instead of warnings.
        allow_code: the config may name Python files (``path.py:NAME``) to run, such as tiers of one's own.
        progress: draw a progress bar while loading; by default on a terminal, if there is much to load.

    Raises:
        ConfigError: a value of the config is missing or wrong.
        ModelFileError: a sparse model is missing, damaged or of another width than its table.
        CapacityError: the plan does not fit the machine; nothing was allocated.
        PolicyError: a cache policy is not there or not sound; nothing was allocated.
        TierUnavailable: a storage tier is not installed or cannot be reached.
        DeviceError: the config requires a GPU.

    A context manager: ``with HPS("ps.json") as server: rows = server.lookup(keys, "model", 0)``.

    **Threads:** every method from any thread. Lookups take no lock and release the GIL; changes of one table take turns.
    """

    def __init__(
        self, config: ConfigSource, *, strict: bool = False, allow_code: bool = False, progress: bool | None = None
    ) -> None:
        self.config: ServerConfig = read_config(config, strict=strict)
        self._strict = strict
        self._wide = self.config.supportlonglong
        self._progress = progress
        self._closed = False
        self._recordings: tuple[tuple[ServedTable, TraceRecording], ...] = ()
        self.reset_after_fork()
        register_fork_reset(self)
        self._allow_code = allow_code
        self._timer = Timer("refresh")  # for ``refresh_delay`` and ``refresh_interval``
        self._models: dict[str, ServedModel] = {}
        on_devices = self._check_devices(self.config.models)
        policies = [self._policies(self.config, model) for model in self.config.models]
        self._allocator = PinnedHostAllocator() if on_devices else PlainHostAllocator()
        make_plan(self.config).check()
        self._host: HashMapTier | None = None
        self._host_of_fixed: HashMapTier | None = None
        self._slower = TierStack([])
        try:
            self._host, self._slower = open_tiers(self.config, self._allocator, allow_code=allow_code)
            for model, own in zip(self.config.models, policies, strict=True):
                self._deploy(self.config, model, own)
        except BaseException:
            self.close()
            raise

    def reset_after_fork(self) -> None:
        """Make the lock of changes of models anew, as a forked child has to."""
        self._changing = threading.RLock()

    # -- building ---------------------------------------------------------------------

    def _check_devices(self, models: Iterable[ModelConfig]) -> bool:
        """Whether the models are served from GPUs; one WARNING if they are listed and this machine has none.

        Raises:
            DeviceError: a GPU is required and there is none, or one that is listed is missing while others are there.
        """
        devices = sorted({device for model in models for device in model.deployed_device_list})
        if self.config.update_source.type != "null":
            log.warning("update_source.type: %r: this version reads no updates", self.config.update_source.type)
        if not driver.device_count():
            if self.config.require_gpu:
                raise DeviceError(f"require_gpu: true, but {driver.why_no_device()}")
            if devices:
                what = "a cache in host memory serves" if self.config.cache_on_cpu else "host memory serves"
                log.warning("deployed_device_list %s: %s: %s all lookups", devices, driver.why_no_device(), what)
            return False
        for device in devices:
            driver.check_device(device)
        if self.config.require_gpu and not devices:
            raise DeviceError("require_gpu: true, but no model has a deployed_device_list")
        return bool(devices)

    def _places(self, model: ModelConfig) -> tuple[int | None, ...]:
        """Where the caches of a model are."""
        if driver.device_count():
            return model.deployed_device_list
        return (None,) if self.config.cache_on_cpu else ()

    def _host_for(self, model: ModelConfig) -> HashMapTier | None:
        """The rows in host memory; static and uvm tables keep theirs there even if the config has no volatile database."""
        if self._host is None and model.embedding_cache_type != "dynamic" and self._places(model):
            self._host_of_fixed = self._host_of_fixed or HashMapTier(
                VolatileDatabaseConfig(type="parallel_hash_map"),
                wide_keys=self.config.supportlonglong,
                allocator=self._allocator,
            )
            return self._host_of_fixed
        return self._host

    def _policies(self, config: ServerConfig, model: ModelConfig) -> Policies:
        """What the caches of a model evict by, if it has caches."""
        return load_policies(config, model, allow_code=self._allow_code) if self._places(model) else ()

    def _deploy(self, config: ServerConfig, model: ModelConfig, policies: Policies) -> None:
        deployment = ServedModel(
            config, model, self._host_for(model), self._slower, devices=self._places(model), policies=policies
        )
        try:
            with rows_progress(sum(table.rows for table in deployment.plan().tables), self._progress) as on_rows:
                deployment.load(on_rows)
        except BaseException:
            deployment.close()
            raise
        self._models = {**self._models, model.model: deployment}
        if deployment.has_caches:
            self._timer.add(model.model, deployment.refresh, delay=model.refresh_delay, interval=model.refresh_interval)

    # -- changing rows ---------------------------------------------------------------------

    def insert(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """Write a row for each key (upsert) to every tier; lookups that start after the return see it.

        Args:
            keys: integers of any shape ``S``.
            rows: float32 ``S + (dim,)``, or numbers that convert to it, of any array kind; the last of equal keys wins.

        Returns how many keys were new.

        Raises:
            KeyDtypeError, UnknownModelError, ClosedError as ``lookup``; ArrayError for rows of another shape or dtype.
            CapacityError: no memory for more rows in host memory; slower tiers, if any, have them and serve them.
            TierError: a slower tier failed, faster ones were not written; or a key that host memory might evict has a row in
                a tier that is read only, which would show again.
        """
        table = self._table(model_name, table_id)
        return table.writes.insert(*self._keys_and_rows(keys, rows, table))

    def update(self, keys: Any, rows: Any, model_name: str, table_id: int | str) -> int:
        """Write the rows of those keys that exist; returns how many of ``keys`` did. Otherwise as ``insert``."""
        table = self._table(model_name, table_id)
        return table.writes.update(*self._keys_and_rows(keys, rows, table))

    def read_modify_write(self, keys: Any, change: Change, model_name: str, table_id: int | str) -> int:
        """Write what a function makes of the rows of some keys, with no other write to the table between.

        Args:
            keys: distinct integers, n in all.
            change: from their rows, NumPy float32 ``[n, dim]`` (the table's default value where there is none) and bool
                ``[n]``, which exist, to new rows ``[n, dim]``. It may write to what it gets, and must not change the table.

        Returns how many keys were new.

        Raises:
            As ``insert``; TierError if a slower tier cannot tell what it has.   What ``change`` raises; nothing is written.
        """
        table = self._table(model_name, table_id)
        flat = as_keys(keys, wide=self._wide).flat
        return table.writes.read_modify_write(
            flat, lambda rows, found: as_rows(change(rows, found), (len(flat), table.spec.dim))
        )

    @contextmanager
    def locked_table(
        self, model_name: str, table_id: int | str
    ) -> Iterator[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
        """All keys of a table, and a function that reads rows of some of them; writes to it wait until the block ends.

        Gives int64 ``[n]``, ascending, and a function from int64 keys ``[m]`` to float32 ``[m, dim]``.

        Raises:
            As ``lookup``; TierError if a slower tier cannot tell what it has.
        """
        table = self._table(model_name, table_id)
        with table.writes.changing():
            yield table.writes.keys(), lambda some: table.writes.read(some)[0]

    def erase(self, keys: Any, model_name: str, table_id: int | str) -> int:
        """Remove the rows of the keys from every tier; returns how many distinct keys had one."""
        table = self._table(model_name, table_id)
        return table.writes.erase(as_keys(keys, wide=self._wide).flat)

    def contains(self, keys: Any, model_name: str, table_id: int | str) -> np.ndarray:
        """bool array of the shape of ``keys``: which have a row in some tier."""
        table = self._table(model_name, table_id)
        batch = as_keys(keys, wide=self._wide)
        return table.writes.contains(batch.flat).reshape(batch.shape)

    def _keys_and_rows(self, keys: Any, rows: Any, table: ServedTable) -> tuple[np.ndarray, np.ndarray]:
        batch = as_keys(keys, wide=self._wide)
        return batch.flat, as_rows(rows, (*batch.shape, table.spec.dim)).reshape(-1, table.spec.dim)

    def dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """Write the rows of a table in its fastest tier to a ``.bin`` file (spec 5.6); returns their number.

        Raises:
            ModelFileError: the file cannot be written.   TierError: not a ``.bin`` file.
        """
        table = self._table(model_name, table_id)
        return self._fastest(table).dump(table.spec.tag, path)

    def load_dump(self, path: str | Path, model_name: str, table_id: int | str) -> int:
        """Insert the rows of a ``.bin`` file in every tier; returns their number.

        Raises:
            ModelFileError: a damaged file, or rows of another width.
            TierError: keys of another width, or not a ``.bin`` file; otherwise as ``insert``.
        """
        table = self._table(model_name, table_id)
        dump = self._fastest(table).open_dump(path)
        if dump.pairs and dump.dim != table.spec.dim:
            raise ModelFileError(f"{path}: rows of width {dump.dim}, table {table.spec.tag} wants {table.spec.dim}")
        for keys, rows in dump.chunks(self.config.volatile_db.max_batch_size):
            table.writes.insert(keys, rows)
        return dump.pairs

    def _fastest(self, table: ServedTable) -> Tier:
        host = self._host or (self._host_of_fixed if table.store is not None else None)
        tier = host if host is not None else next(iter(self._slower.tiers), None)
        if tier is None:
            raise TierUnavailable("no volatile_db and no persistent_db: there is no table to dump or load")
        return tier

    def refresh(self, model_name: str, table_id: int | str | None = None, *, drop: bool = True) -> None:
        """Renew the rows that the caches of a model hold, from host memory and slower tiers (spec 6.8).

        Rows changed by ``insert``, ``update`` and ``erase`` are in the caches when those return; this is for rows that others
        changed in a slower tier. Lookups go on meanwhile.

        Args:
            table_id: one table, by default all.
            drop: rows that are in no tier any more leave the caches; else they stay.

        Raises:
            UnknownModelError: no such model or table.   TierError: a slower tier failed.
        """
        self._deployment(model_name).refresh(table_id, drop=drop)

    def set_policy(self, policy: Any = None, model_name: str = "", table_id: int | str | None = None) -> Any:
        """Let another cache policy decide from now on who leaves the caches of a model (spec 6.3); rows stay.

        Scores begin anew, as if all cached rows had come in now. Lookups go on and stay exact: they wait for the switch itself,
        not for the compiler. Graphs that captured lookups before go on with the policy before.

        Args:
            policy: a built-in name, ``package.module:NAME``, ``file.py:NAME`` (with the server's ``allow_code``), a class as
                ``kernels.policies._policy`` describes it, or a ``Policy``. If it is left out, a decorator for such a class is
                returned: ``@server.set_policy(model_name="m", table_id=0)``.
            table_id: one table, by default all.

        Returns:
            ``policy``, so that a decorated class stays what it was.

        Raises:
            PolicyError: there is no such policy, it breaks the contract, or it does not compile for a device; the policy
                before stays.
            ConfigError: caches of type static or uvm, which evict nothing.   CapacityError: no memory for what it remembers.
            UnknownModelError: no such model or table.
        """
        if policy is None:
            return lambda kind: self.set_policy(kind, model_name, table_id)
        with self._changing:
            self._deployment(model_name).set_policy(policy, table_id, allow_code=self._allow_code)
        return policy

    # -- models ---------------------------------------------------------------------

    def load_model(self, model: Mapping[str, Any] | InferenceParams | ModelConfig) -> None:
        """Deploy one more model, described as in ``models`` of the config or by ``InferenceParams``.

        Key width and databases are the server's; the databases of an ``InferenceParams`` do not count.

        Raises:
            ConfigError: the description is wrong or the name is taken.   Otherwise as ``HPS``.
        """
        with self._changing:
            self._check_open()
            config = config_of_model(self.config, model, strict=self._strict)
            added = config.models[0]
            if added.model in self._models:
                raise ConfigError(f"model: {added.model!r} is deployed already, wanted another name (or replace_model)")
            self._check_devices([added])
            policies = self._policies(config, added)
            make_plan(config).check()
            self._deploy(config, added, policies)

    def replace_model(self, model_name: str, sparse_files: str | Path | Iterable[str | Path] | None = None) -> None:
        """Put a new version of all rows of a model in force at once, while lookups go on.

        The new version is loaded aside, so host memory holds both for a while. A lookup sees the old rows or the new ones;
        ``lookup_many`` sees one version of all tables. Rows written by ``insert`` and ``update`` go with the old version.
        Slower tiers get the new rows before the switch and lose the stale ones after it, so keys that only they hold change
        a little earlier than the rest.

        Args:
            sparse_files: one a table (a single path for a model of one table); by default those of the config, read anew.

        Raises:
            ModelFileError, CapacityError: the new version cannot be loaded; the old one stays in force in every tier.
            TierError: a slower tier failed; those that can be written may hold rows of both versions until the model is
                replaced once more. Host memory has one version or the other.
            ConfigError: not one file a table.
        """
        with self._changing:
            deployment = self._deployment(model_name)
            if isinstance(sparse_files, (str, Path)):
                sparse_files = [sparse_files]
            sources = None if sparse_files is None else [locate(str(file), self.config.folder) for file in sparse_files]
            plan = deployment.plan_of_replacement(sources)
            plan.check()
            with rows_progress(sum(table.rows for table in plan.tables), self._progress) as on_rows:
                deployment.replace(sources, on_rows)

    def unload_model(self, model_name: str, *, erase: bool = False) -> None:
        """Take a model out of service and free its host memory; with ``erase`` also drop its rows from slower tiers.

        Raises:
            TierError: a slower tier failed to drop rows; the model is gone and all the rest was dropped.
        """
        with self._changing:
            deployment = self._deployment(model_name)
            self._timer.remove(model_name)
            self._models = {name: other for name, other in self._models.items() if name != model_name}
            deployment.close(erase=erase)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the deployed models."""
        return tuple(self._models)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    def table_spec(self, model_name: str, table_id: int | str) -> TableSpec:
        """Name, width and default value of a table.

        Raises:
            UnknownModelError: no such model or table.   ClosedError: the server was closed.
        """
        return self._table(model_name, table_id).spec

    # -- looking at it ---------------------------------------------------------------------

    def stats(self) -> dict[str, dict[str, TableStats]]:
        """Counts of every table since the server started, by model and table name."""
        self._check_open()
        return {
            name: {table.spec.name: table.stats(deployment.version) for table in deployment.tables}
            for name, deployment in self._models.items()
        }

    def plan(self) -> Plan:
        """Bytes that the deployed models take, a tier at a time, from the sizes of their sparse models."""
        self._check_open()
        return plan_of(table for deployment in self._models.values() for table in deployment.plan().tables)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the rows and indexes of all tables take now."""
        return sum(table.bytes for model in self.stats().values() for table in model.values())

    # -- ending ---------------------------------------------------------------------

    def close(self) -> None:
        """Let the lookups at work end, then free everything; later calls raise ClosedError. Closing twice is fine.

        Lookups that wait for a slower tier are waited for up to 30 s (a WARNING tells if that was too short), writes are not.
        """
        with self._changing:
            if self._closed:
                return
            self._closed = True
            self._timer.close()
            for _, recording in self._recordings:
                recording.close()
            models, self._models = self._models, {}
            for deployment in models.values():
                deployment.release()
            for host in (self._host, self._host_of_fixed):
                if host is not None:
                    host.close()
            self._slower.close()

    def __enter__(self) -> HPS:
        self._check_open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        models = ", ".join(f"{name} ({len(model.tables)} tables)" for name, model in self._models.items())
        return f"<HPS {'closed' if self._closed else models}>"
