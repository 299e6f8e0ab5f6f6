"""How models get into a server and out of it: tiers opened, models loaded, replaced, unloaded, refreshed by a timer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from hps_numba.config import InferenceParams, ModelConfig, ServerConfig, VolatileDatabaseConfig, read_config
from hps_numba.config.spec import locate
from hps_numba.device import driver
from hps_numba.device.host_memory import HostAllocator, PinnedHostAllocator, PlainHostAllocator
from hps_numba.errors import ConfigError, DeviceError, TierUnavailable, VersionError
from hps_numba.runtime.progress import rows_progress
from hps_numba.runtime.reentry import reentry_error, refuse_inside
from hps_numba.runtime.shielded import refuse_inside_work
from hps_numba.runtime.timer import Timer
from hps_numba.server.catalog import Catalog, Models
from hps_numba.server.manifest import Manifest
from hps_numba.server.model import Policies, ServedModel, load_policies
from hps_numba.server.model_jobs import Check, ModelJobs
from hps_numba.server.plan import plan_config
from hps_numba.server.start_log import log_model_ready, log_ready, log_start
from hps_numba.server.table import ServedTable
from hps_numba.storage.tier_stack import TierStack, open_tiers
from hps_numba.storage.tiers._host_tables import HostTablesTier
from hps_numba.storage.tiers._tier import Tier
from hps_numba.storage.tiers.hash_map import HashMapTier

__all__ = ["ModelLoader"]

log = logging.getLogger(__name__)


def config_of_model(
    server: ServerConfig, model: Mapping[str, Any] | InferenceParams | ModelConfig, *, strict: bool = False
) -> ServerConfig:
    """A config of one model over the databases of a running server.

    Raises:
        ConfigError: the description is wrong, or its keys are of another width than the server's.
    """
    if isinstance(model, InferenceParams):
        config = read_config([model])
        if config.supportlonglong != server.supportlonglong:
            bits = 64 if server.supportlonglong else 32
            raise ConfigError(f"i64_input_key: {model.i64_input_key}, but this server has keys of {bits} bits")
        entry = config.to_dict()["models"][0]
    elif isinstance(model, ModelConfig):
        entry = model.model_dump(mode="json")
    elif isinstance(model, Mapping):
        entry = dict(model)
    else:
        raise ConfigError(f"model: expected a mapping, InferenceParams or ModelConfig, got {type(model).__name__}")
    return read_config({**server.to_dict(), "models": [entry]}, strict=strict, beside=server.source)


class ModelLoader:
    """The tiers of a server, and the models that are loaded into them.

    Args:
        config: of the server.   catalog: gets the models.
        strict, allow_code, progress: as for ``HPS``.

    Attributes:
        jobs: runs whatever changes the set of models, one at a time.
        timer: refreshes the caches of models with a ``refresh_delay`` or ``refresh_interval``.
        allocator: of host memory.   host: the tier in host memory, or None.   slower: all other tiers.

    Thread safety: every method from any thread.
    """

    def __init__(
        self, config: ServerConfig, catalog: Catalog, *, strict: bool, allow_code: bool, progress: bool | None
    ) -> None:
        self._config = config
        self._catalog = catalog
        self._strict, self._allow_code, self._progress = strict, allow_code, progress
        self.jobs = ModelJobs()
        self.timer = Timer("refresh")
        self.host: HostTablesTier | None = None
        self.slower = TierStack([])
        self._host_of_fixed: HashMapTier | None = None
        self.allocator: HostAllocator

    def load_all(self) -> None:
        """As ``_load_all``, where nothing interrupts it."""
        self.jobs.run(self._load_all)

    def _load_all(self, check: Check) -> None:
        """Open the tiers and load the models of the config; nothing is allocated unless the plan fits the machine.

        Raises:
            As ``HPS``.
        """
        models, began = self._config.models, time.monotonic()
        on_devices = self._check_devices(models)
        policies = [self._policies(self._config, model) for model in models]
        self.allocator = PinnedHostAllocator() if on_devices else PlainHostAllocator()
        known = [own or (None,) * len(model.sparse_files) for model, own in zip(models, policies, strict=True)]
        plan = plan_config(self._config, chain.from_iterable(known))
        plan.check()
        log_start(self._config, plan)
        self.host, self.slower = open_tiers(self._config, self.allocator, allow_code=self._allow_code)
        for model, own in zip(models, policies, strict=True):
            self._deploy(self._config, model, own, check)
        log_ready(self._catalog.models, began)

    def _check_devices(self, models: Iterable[ModelConfig]) -> bool:
        """Whether the models are served from GPUs; one WARNING if they are listed and this machine has none.

        Raises:
            DeviceError: a GPU is required and there is none, or one that is listed is missing while others are there.
        """
        devices = sorted({device for model in models for device in model.deployed_device_list})
        if not driver.device_count():
            if self._config.require_gpu:
                raise DeviceError(f"require_gpu: true, but {driver.why_no_device()}")
            if devices:
                what = "a cache in host memory serves" if self._config.cache_on_cpu else "host memory serves"
                log.warning("deployed_device_list %s: %s: %s all lookups", devices, driver.why_no_device(), what)
            return False
        for device in devices:
            driver.check_device(device)
        if self._config.require_gpu and not devices:
            raise DeviceError("require_gpu: true, but no model has a deployed_device_list")
        return bool(devices)

    def _cache_devices(self, model: ModelConfig) -> tuple[int | None, ...]:
        """Where the caches of a model are; None is host memory."""
        if driver.device_count():
            return model.deployed_device_list
        return (None,) if self._config.cache_on_cpu else ()

    def _host_for(self, model: ModelConfig) -> HostTablesTier | None:
        """The rows in host memory; static and uvm tables keep theirs there even if the config has no volatile database."""
        if self.host is None and model.embedding_cache_type != "dynamic" and self._cache_devices(model):
            self._host_of_fixed = self._host_of_fixed or HashMapTier(
                VolatileDatabaseConfig(type="parallel_hash_map"),
                wide_keys=self._config.supportlonglong,
                allocator=self.allocator,
            )
            return self._host_of_fixed
        return self.host

    def _policies(self, config: ServerConfig, model: ModelConfig) -> Policies:
        """The cache policies of a model, if it has caches."""
        return load_policies(config, model, allow_code=self._allow_code) if self._cache_devices(model) else ()

    def _deploy(self, config: ServerConfig, model: ModelConfig, policies: Policies, check: Check) -> None:
        devices, began = self._cache_devices(model), time.monotonic()
        served = ServedModel(config, model, self._host_for(model), self.slower, devices=devices, policies=policies)
        try:
            served.planned = served.table_plans()
            with rows_progress(sum(table.rows for table in served.planned), self._progress) as on_rows:
                served.load(on_rows, check)
            check()
            if served.has_caches and model.num_of_refresher_buffer_in_pool:
                self.timer.add(model.model, served.refresh, delay=model.refresh_delay, interval=model.refresh_interval)
        except BaseException:
            served.close()
            raise
        self._catalog.models = Models({**self._catalog.models, model.model: served})
        log_model_ready(model.model, served.version, len(served.tables), began)

    def load(self, model: Mapping[str, Any] | InferenceParams | ModelConfig) -> None:
        """As ``HPS.load_model``."""
        self.check_outside()
        self.jobs.run(lambda check: self._load(model, check))

    def _load(self, model: Mapping[str, Any] | InferenceParams | ModelConfig, check: Check) -> None:
        self._catalog.check_open()
        config = config_of_model(self._config, model, strict=self._strict)
        added = config.models[0]
        if added.model in self._catalog.models:
            raise ConfigError(f"model: {added.model!r} is deployed already, give another name or call replace_model")
        self._check_devices([added])
        policies = self._policies(config, added)
        plan_config(config, policies).check()
        self._deploy(config, added, policies, check)

    def replace(
        self,
        model_name: str,
        files: Sequence[str | Path] | None,
        number: int | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        """As ``HPS.replace_model``; ``manifest``: what says so, if a message does."""
        self.check_outside(unlocked=self._catalog.model(model_name))
        self.jobs.run(lambda check: self._replace(model_name, files, number, manifest, check))

    def replace_by(self, manifest: Manifest) -> None:
        """As ``HPS.replace_model`` and ``HPS.roll_back_model``, by a manifest that fits the model."""
        model = self._catalog.model(manifest.model)
        if manifest.roll_back:
            self.roll_back(manifest.model, manifest.version)
        else:
            files = [manifest.tables[table.spec.name] for table in model.tables]
            self.replace(manifest.model, files, manifest.version, manifest)

    def reload(self, model_name: str) -> None:
        """Load the files of the version of a model that is in force again; nobody is told, as it stays in force.

        Raises:
            As ``HPS.replace_model``.
        """
        self.check_outside(unlocked=self._catalog.model(model_name))
        self.jobs.run(lambda check: self._reload(model_name, check))

    def _reload(self, model_name: str, check: Check) -> None:
        model = self._catalog.model(model_name)
        plan = model.plan_of_replacement(model.versions.in_force.sources)
        plan.check()
        with rows_progress(sum(table.rows for table in plan.tables), self._progress) as on_rows:
            model.reload(on_rows, check)

    def roll_back(self, model_name: str, number: int | None = None) -> int:
        """As ``HPS.roll_back_model``; ``number``: which version that has to be."""
        previous = self._catalog.model(model_name).versions.previous
        if previous is None or number not in (None, previous.number):
            wanted = "a version" if number is None else f"version {number}"
            there = "none" if previous is None else f"version {previous.number}"
            raise VersionError(f"model {model_name!r}: expected {wanted} before that in force, got {there}")
        manifest = replace(Manifest(**previous.manifest), since_ms=None) if previous.manifest else None
        self.replace(model_name, previous.sources, previous.number, manifest)
        return previous.number

    def _replace(
        self,
        model_name: str,
        files: Sequence[str | Path] | None,
        number: int | None,
        manifest: Manifest | None,
        check: Check,
    ) -> None:
        model = self._catalog.model(model_name)
        sources = None if files is None else [locate(str(file), self._config.folder) for file in files]
        with model.replacements.timed():
            plan = model.plan_of_replacement(sources)
            plan.check()
            with rows_progress(sum(table.rows for table in plan.tables), self._progress) as on_rows:
                model.replace(sources, on_rows, check, number=number, manifest=manifest)

    def unload(self, model_name: str, *, erase: bool) -> None:
        """As ``HPS.unload_model``."""
        self._catalog.model(model_name)
        self.check_outside()
        self.jobs.run(lambda _: self._unload(model_name, erase=erase))

    def _unload(self, model_name: str, *, erase: bool) -> None:
        model = self._catalog.model(model_name)
        self.timer.remove(model_name)
        others = {name: other for name, other in self._catalog.models.items() if name != model_name}
        self._catalog.models = Models(others)
        model.close(erase=erase)

    def set_policy(self, policy: Any, model_name: str, table_id: int | str | None) -> None:
        """As ``HPS.set_policy``."""
        self._catalog.model(model_name)
        self.check_outside()
        self.jobs.run(lambda _: self._catalog.model(model_name).set_policy(policy, table_id, allow_code=self._allow_code))

    def fastest_tier(self, table: ServedTable) -> Tier:
        """The fastest tier that has the rows of a table.

        Raises:
            TierUnavailable: there is none.
        """
        host = self.host or (self._host_of_fixed if table.store is not None else None)
        tier = host if host is not None else next(iter(self.slower.checked), None)
        if tier is None:
            raise TierUnavailable("no volatile_db and no persistent_db: there is no table to dump or load")
        return tier

    def check_outside(self, *, unlocked: ServedModel | None = None) -> None:
        """Refuse what waits for the end of a change of models, or of the lookups and writes that such a change waits for.

        Args:
            unlocked: this thread must not be in a ``locked_table`` block of the model, for which another thread would wait.

        Raises:
            ReentryError: this thread is inside a lookup, a write or a ``replaying`` block, or a closing server waits for it.
        """
        for model in self._catalog.models.values():
            place = f"model {model.name}"
            refuse_inside(place, [part for table in model.tables for part in table.parts])
            refuse_inside_work(place, [model, *(table.writes for table in model.tables)])
            if model is unlocked and any(table.writes.held_here for table in model.tables):
                raise reentry_error(place, "locked_table")
            if model.works_here:
                raise reentry_error(place, "its work in the background")
            model.replays.refuse_here(place)
        if self.timer.works_here:
            raise reentry_error("the server", "a refresh by its timer")

    def close(self, first: Callable[[], object]) -> None:
        """Call ``first``, let the lookups at work end, then free all models and tiers; again does nothing.

        A change of the set of models that is at work stops or ends before, later ones are refused.
        """
        self.jobs.close(lambda _: self._close(first))

    def _close(self, first: Callable[[], object]) -> None:
        if self._catalog.closed:
            return
        self._catalog.closed = True
        models, self._catalog.models = self._catalog.models, Models()
        with ExitStack() as closing:  # each of them, whatever the others raise; the last callback comes first
            closing.callback(self.slower.close)
            for host in (self._host_of_fixed, self.host):
                if host is not None:
                    closing.callback(host.close)
            for model in models.values():
                closing.callback(model.release)
            closing.callback(self.timer.close)
            closing.callback(first)
