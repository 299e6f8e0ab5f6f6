"""What a server logs at INFO while it starts: what it will take, the caches of each model, the rows of each tier, how long.

HugeCTR logged the same events (checklist O08). Each line begins with the place it is about: a model, or the tag of a table.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from fractions import Fraction

from hps_numba.cache.sizing import CacheShape
from hps_numba.config import ModelConfig, ServerConfig, TableSpec
from hps_numba.config.messages import show
from hps_numba.device.host_memory import human_bytes
from hps_numba.kernels.policies._policy import Policy
from hps_numba.server.cache_shape import CAPACITY_STEP
from hps_numba.server.plan import Plan
from hps_numba.storage.host.store import HostStore

__all__ = ["log_cache", "log_host_rows", "log_model_caches", "log_model_ready", "log_ready", "log_start", "place", "share"]

log = logging.getLogger(__name__)

_OF_CACHES = (
    "max_batch_size",
    "gpucacheper",
    "hit_rate_threshold",
    "num_of_worker_buffer_in_pool",
    "num_of_refresher_buffer_in_pool",
    "cache_refresh_percentage_per_iteration",
    "use_context_stream",
    "miss_path",
    "init_ec",
)


def share(rows: int, room: int) -> str:
    """``load 45 % of 200``: of how many rows there is room for, how many are there."""
    return f"load {100 * rows / room:.3g} % of {room}"


def log_start(config: ServerConfig, plan: Plan) -> None:
    """What the server takes, before anything is allocated."""
    if not log.isEnabledFor(logging.INFO):
        return
    sizes = [f"{human_bytes(plan.host_bytes)} of host memory"]
    sizes += [f"{human_bytes(size)} of device {device}" for device, size in plan.device_bytes.items()]
    names = ", ".join(model.model for model in config.models)
    bits = 64 if config.supportlonglong else 32
    tables = _tables(len(plan.tables))
    log.info("starting models %s: %s, keys of %d bits, planned: %s", names, tables, bits, ", ".join(sizes))


def log_model_caches(config: ServerConfig, model: ModelConfig, devices: Iterable[int | None]) -> None:
    """The parameters that the caches of all tables of a model have in common."""
    if not log.isEnabledFor(logging.INFO):
        return
    where = ", ".join(place(device) for device in devices)
    values = [f"{key} {show(getattr(model, key))}" for key in _OF_CACHES]
    values.append(f"fuse_embedding_table {show(config.fuse_embedding_table and model.fuse_embedding_table)}")
    log.info(
        "model %s: caches of type %s in %s: %s, keys of %d bits, %s",
        model.model,
        model.embedding_cache_type,
        where,
        _tables(len(model.sparse_files)),
        64 if config.supportlonglong else 32,
        ", ".join(values),
    )


def log_cache(spec: TableSpec, shape: CacheShape, rows: int, policy: Policy) -> None:
    """The size of the caches of one table with ``rows`` rows, and whether the minimum made it larger."""
    if shape.kind == "dynamic" and not spec.cache_size_bytes:
        wanted = math.floor(rows * Fraction(repr(spec.gpucacheper)))
        if wanted < CAPACITY_STEP:
            given = f"gpucacheper {spec.gpucacheper} of {rows} rows is {wanted}"
            log.info("%s: %s: the cache gets the minimum, %d rows", spec.tag, given, shape.rows)
    evicts = f", policy {policy.name}" if shape.kind == "dynamic" else ""
    log.info("%s: %s cache for %d rows of %d x %s%s", spec.tag, shape.kind, shape.rows, spec.dim, spec.cache_row_dtype, evicts)


def log_host_rows(spec: TableSpec, store: HostStore, rows: int) -> None:
    """How many of the ``rows`` rows of the sparse model of a table are in host memory."""
    held = len(store)
    load = "" if store.max_rows is None else f", {share(held, store.max_rows)} (overflow_margin x num_partitions)"
    log.info("%s: cached %d of %d rows in host memory%s", spec.tag, held, rows, load)


def log_model_ready(model: str, version: int, tables: int, began: float) -> None:
    """A model answers lookups.   ``began``: by ``time.monotonic``."""
    log.info("model %s: ready after %.3g s: version %d, %s", model, time.monotonic() - began, version, _tables(tables))


def log_ready(models: Iterable[str], began: float) -> None:
    """All models of a config do."""
    log.info("ready after %.3g s: models %s", time.monotonic() - began, ", ".join(models))


def place(device: int | None) -> str:
    """``device 0``, or ``host memory`` for None."""
    return "host memory" if device is None else f"device {device}"


def _tables(count: int) -> str:
    return "1 table" if count == 1 else f"{count} tables"
