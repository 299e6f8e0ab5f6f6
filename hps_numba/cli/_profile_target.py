"""What the profiler measures: one table of a server, generated or from a config, and its true rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.cli._profile_location import DeviceLocation, HostLocation, KeyLocation, cuda_devices, has_cupy
from hps_numba.config import ModelConfig, ServerConfig, TableSpec, read_config
from hps_numba.errors import ConfigError, DeviceError, UnknownModelError
from hps_numba.server.hps import HPS
from hps_numba.simulate.workloads import generate_model
from hps_numba.storage.model_files import open_model

__all__ = ["DEFAULT_VALUE", "GeneratedTable", "Target", "config_target", "generated_target", "keys_of_model", "model_of"]

DEFAULT_VALUE = -7.0  # occurs in no generated row: values are in [-1, 1)
COUNTS = (
    "calls", "keys", "host_hits", "tier_hits", "absent", "unanswered", "tier_errors", "evicted",
    "cache_hits", "cache_misses", "cache_insertions", "cache_evictions",
)  # fmt: skip
"""Counters of ``TableStats`` that are reported, if they are not None."""

_COMPARED_ONE_BY_ONE = 1024
_PROBED = 1024

Truth = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Target:
    """One served table.

    Attributes:
        spec: the table.
        device: number of the device for lookups.
        on_device: whether lookups with keys in the memory of that device can be measured.
        dtype: of rows.
        true_rows: a function from keys, int64 ``[n]``, to the rows of the first ``m <= n`` of them, ``[m, dim]``.
        compared_with: the source of ``true_rows``, for the report.
    """

    server: HPS
    spec: TableSpec
    device: int
    on_device: bool
    dtype: np.dtype[Any]
    true_rows: Truth
    compared_with: str

    def location(self, *, host: bool = False) -> KeyLocation:
        """Memory for keys and rows: on the device, if there is one and not ``host``."""
        return DeviceLocation(self.device) if self.on_device and not host else HostLocation()

    def lookup(self, keys: Any, out: Any, stream: Any) -> None:
        """One call of ``HPS.lookup``."""
        self.server.lookup(keys, self.spec.model, self.spec.table_id, self.device, out=out, stream=stream)

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[n]``: which keys have a row."""
        return self.server.contains(keys, self.spec.model, self.spec.table_id)

    def counts(self) -> dict[str, int]:
        """The counters in ``COUNTS`` that this server has, since its start."""
        stats = self.server.stats()[self.spec.model][self.spec.name]
        found = {name: getattr(stats, name, None) for name in COUNTS}
        return {name: int(count) for name, count in found.items() if count is not None}

    def rows(self) -> int:
        """Rows of the table in its sparse model."""
        plans = self.server.plan().tables
        return next(plan.rows for plan in plans if (plan.model, plan.table) == (self.spec.model, self.spec.name))

    def refresh(self) -> None:
        """Refresh the cache of the table."""
        self.server.refresh(self.spec.model, self.spec.table_id)

    def check_cache(self, mode: str, keys: np.ndarray) -> None:
        """Raise ConfigError unless keys that were just looked up hit a cache."""
        model = next(model for model in self.server.config.models if model.model == self.spec.model)
        reason = no_cache_reason(self.server.config, model) or self._probe_cache(mode, keys[:_PROBED])
        if reason:
            raise ConfigError(f"--mode {mode}: model {self.spec.model!r} has no embedding cache: {reason}")

    def _probe_cache(self, mode: str, keys: np.ndarray) -> str | None:
        if "cache_hits" not in self.counts():
            return "the server counts no cache hits"
        keys = keys[self.contains(keys)]
        if not len(keys):
            raise ConfigError(f"--mode {mode}: expected keys of the table, got none that has a row in {self.spec.tag}")
        location, before = self.location(), self.counts()["cache_hits"]
        with location.current():
            batch, out = location.put(keys), location.new_rows((len(keys), self.spec.dim), self.dtype)
            for _ in range(3):  # the second lookup hits, or the third if the policy admits a key at its second request
                self.lookup(batch, out, location.stream)
                location.wait()
        return None if self.counts()["cache_hits"] > before else "keys that were just looked up did not hit"


def no_cache_reason(config: ServerConfig, model: ModelConfig) -> str | None:
    """Why a model of the config has no cache on this machine; None if it may have one."""
    if model.embedding_cache_type == "dynamic" and not model.gpucache:
        return "gpucache is false"
    if config.cache_on_cpu and not cuda_devices():
        return None
    if not cuda_devices():
        return "no CUDA device was found, and cache_on_cpu is false"
    if not model.deployed_device_list:
        return "deployed_device_list is empty"
    return None if has_cupy() else "CuPy, which creates keys in GPU memory, is not installed"


# -- from a config ---------------------------------------------------------------------


@contextmanager
def config_target(
    path: Path, model: str | None, table: str | None, device: int | None, *, allow_code: bool = False, cached: str | None = None
) -> Iterator[Target]:
    """A server for a config file, open while the block runs.

    Args:
        model, table: name of the model, name or number of the table; None for the first.
        device: None for the first on which the model is deployed.
        cached: a mode that needs a cache, if any: without a cache, the server is not opened.

    Raises:
        UnknownModelError: there is no such model or table.   DeviceError: the model is not deployed on the device.
        ConfigError: there is no cache.   Otherwise as ``HPS``.
    """
    config = read_config(path)
    chosen = model_of(config, model)
    spec = _table_of(chosen.tables(config.folder), chosen.model, table)
    devices = chosen.deployed_device_list or (0,)
    number = devices[0] if device is None else device
    if number not in devices:
        where = list(chosen.deployed_device_list) or "the CPU, which is 0 here"
        raise DeviceError(f"--device: expected {where}, on which model {chosen.model!r} is deployed, got {number}")
    if cached and (reason := no_cache_reason(config, chosen)):
        raise ConfigError(f"--mode {cached}: model {chosen.model!r} has no embedding cache: {reason}")
    on_device = bool(chosen.deployed_device_list) and cuda_devices() > 0 and has_cupy()
    with HPS(config, allow_code=allow_code) as server:
        dtype = np.asarray(server.lookup([], spec.model, spec.table_id, number)).dtype
        truth, what = _compared_with_host(server, spec, number, whole=on_device)
        yield Target(server, spec, number, on_device, dtype, truth, what)


def model_of(config: ServerConfig, name: str | None) -> ModelConfig:
    """The model of that name, or the first; raises UnknownModelError."""
    for model in config.models:
        if name in (None, model.model):
            return model
    raise UnknownModelError(
        f"--model: expected a model of the config, one of {', '.join(m.model for m in config.models)}, got {name!r}"
    )


def _table_of(tables: tuple[TableSpec, ...], model: str, name: str | None) -> TableSpec:
    for spec in tables:
        if name in (None, spec.name, str(spec.table_id)):
            return spec
    known = ", ".join(spec.name for spec in tables)
    raise UnknownModelError(
        f"--table: expected a table of model {model!r}, one of {known} (or 0 to {len(tables) - 1}), got {name!r}"
    )


def _compared_with_host(server: HPS, spec: TableSpec, device: int, *, whole: bool) -> tuple[Truth, str]:
    """Rows from host memory: by the batch to check a device, key by key to check batches."""

    def at_once(keys: np.ndarray) -> np.ndarray:
        return np.asarray(server.lookup(keys, spec.model, spec.table_id, device))

    def one_by_one(keys: np.ndarray) -> np.ndarray:
        return np.concatenate([at_once(key) for key in keys[:_COMPARED_ONE_BY_ONE].reshape(-1, 1)])

    return (at_once, "host memory") if whole else (one_by_one, f"lookups of one key, at most {_COMPARED_ONE_BY_ONE:,} a batch")


def keys_of_model(spec: TableSpec) -> np.ndarray:
    """All keys in the sparse model of the table, int64, in the order of the file.

    Raises:
        ModelFileError: the model is damaged.
    """
    with open_model(spec.source, spec.dim) as reader:
        keys = np.empty(reader.rows, np.int64)
        reader.read(0, reader.rows, keys, None)
    return keys


# -- generated ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedTable:
    """A table of ``rows`` x ``dim`` uniform values with keys 0 .. rows - 1, deployed on a GPU if there is one."""

    rows: int
    dim: int
    gpucacheper: float
    seed: int
    max_batch: int

    def write(self, folder: Path, device: int) -> Path:
        """Write model and config to ``folder``; returns the path of the config."""
        generate_model(folder / "profile.model", self.rows, self.dim, seed=self.seed)
        entry = {
            "model": "profile",
            "sparse_files": [str(folder / "profile.model")],
            "embedding_table_names": ["generated"],
            "embedding_vecsize_per_table": [self.dim],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [DEFAULT_VALUE],
            "deployed_device_list": [device] if cuda_devices() else [],
            "max_batch_size": self.max_batch,
            "gpucacheper": self.gpucacheper,
        }
        path = folder / "profile_ps_config.json"
        path.write_text(json.dumps({"supportlonglong": True, "models": [entry]}))
        return path

    def true_rows(self, folder: Path) -> Truth:
        """The rows in the file, read without the library; the default for other keys."""
        values = np.memmap(folder / "profile.model" / "emb_vector", np.float32, "r", shape=(self.rows, self.dim))

        def rows(keys: np.ndarray) -> np.ndarray:
            known = (keys >= 0) & (keys < self.rows)
            found = np.array(values[np.where(known, keys, 0)])
            found[~known] = DEFAULT_VALUE
            return found

        return rows


@contextmanager
def generated_target(table: GeneratedTable, folder: Path, device: int | None, *, cached: str | None = None) -> Iterator[Target]:
    """A server for a table that is generated in ``folder``, open while the block runs.

    Args:
        device: None for 0.
        cached: a mode that needs a cache, if any: without a cache, nothing is generated.

    Raises:
        ConfigError: there is no cache.   DeviceError: there is no such device.   Otherwise as ``HPS``.
    """
    if cached and not cuda_devices():
        raise ConfigError(f"--mode {cached}: the generated table has no embedding cache: no CUDA device was found")
    config = table.write(folder, device or 0)
    with config_target(config, None, None, device, cached=cached) as target:
        yield dataclasses.replace(target, true_rows=table.true_rows(folder), compared_with="the generated rows")
