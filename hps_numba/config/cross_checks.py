"""Checks of several keys at once: lengths of lists, duplicates, limits that depend on other keys, derived defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from hps_numba.config.databases import PluginSection, VolatileDatabaseConfig
from hps_numba.config.messages import Location, dotted, problem, show, unexpected
from hps_numba.config.schema import ModelConfig, ServerConfig

__all__ = ["completed", "contradictions", "warnings"]

_PER_TABLE = (
    "embedding_vecsize_per_table",
    "maxnum_catfeature_query_per_table_per_sample",
    "default_value_for_each_table",
    "embedding_table_names",
    "cache_policy",
    "cache_size_bytes",
    "cache_row_dtype",
)
_HASH_MAPS = {"hash_map", "parallel_hash_map", "multi_process_hash_map"}
_T = TypeVar("_T", bound=PluginSection)
_REDIS_BATCH = 262143  # keys that an open-source Redis takes in one command


def contradictions(server: ServerConfig) -> Iterator[str]:
    """Problems between keys whose single values are all right."""
    names = [model.model for model in server.models]
    yield from _repeated(names, ("models",), "model")
    for i, model in enumerate(server.models):
        yield from _wrong_lengths(model, ("models", i))
        yield from _repeated(model.embedding_table_names, ("models", i, "embedding_table_names"))
        yield from _repeated(model.deployed_device_list, ("models", i, "deployed_device_list"))
        for place, db in _volatile(server):
            yield from _rows_beyond_allocation(place, db, model, i)
    for place, db in _volatile(server):
        yield from _too_many_connections(place, db)
    yield from _two_forms_of_tiers(server)
    yield from _sources(server)
    yield from _options_that_are_no_json(server)


def _volatile(server: ServerConfig) -> Iterator[tuple[Location, VolatileDatabaseConfig]]:
    """Every section of a database in memory."""
    for place, section in server.tier_sections():
        if isinstance(section, VolatileDatabaseConfig):
            yield place, section


def _two_forms_of_tiers(server: ServerConfig) -> Iterator[str]:
    slots = [key for key in ("volatile_db", "persistent_db") if key in server.model_fields_set]
    if "tiers" in server.model_fields_set and slots:
        yield f"tiers: expected either tiers or volatile_db and persistent_db, got tiers and {' and '.join(slots)}"


def _sources(server: ServerConfig) -> Iterator[str]:
    if "update_sources" in server.model_fields_set and "update_source" in server.model_fields_set:
        yield "update_sources: expected either update_sources or update_source, got both"
    names = [section.name for section in server.update_sources]
    yield from _repeated([name or i for i, name in enumerate(names)], ("update_sources",), "name")


def _options_that_are_no_json(server: ServerConfig) -> Iterator[str]:
    """Options of plugins are part of the identity of a config, which is JSON."""
    for place, section in (*server.tier_sections(), *server.source_sections()):
        for key, value in (section.model_extra or {}).items():
            try:
                json.dumps(value, allow_nan=False).encode()
            except (TypeError, ValueError):
                yield unexpected((*place, key), value, "a value that JSON has")


def _wrong_lengths(model: ModelConfig, location: Location) -> Iterator[str]:
    tables = len(model.sparse_files)
    for key in _PER_TABLE:
        value = getattr(model, key)
        given = key in model.model_fields_set and isinstance(value, tuple)
        padded = key == "default_value_for_each_table" and len(value) < tables
        if given and len(value) != tables and not padded:
            given_entries = f"{_entries(len(value))}: {show(value)}"
            yield f"{dotted((*location, key))}: expected {_entries(tables)}, as many as sparse_files, got {given_entries}"


def _repeated(values: Iterable[str | int], location: Location, *keys: str) -> Iterator[str]:
    first: dict[str | int, int] = {}
    for i, value in enumerate(values):
        if first.setdefault(value, i) != i:
            before, here = ((*location, j, *keys) for j in (first[value], i))
            yield problem(here, value, f"is already {dotted(before)}, expected each one once")


def _rows_beyond_allocation(place: Location, db: VolatileDatabaseConfig, model: ModelConfig, i: int) -> Iterator[str]:
    row_bytes = 4 * max(model.embedding_vecsize_per_table)
    if db.type in _HASH_MAPS and db.allocation_rate < row_bytes:
        too_small = f"is less than the {row_bytes} bytes of a row of {dotted(('models', i))}"
        yield problem((*place, "allocation_rate"), db.allocation_rate, too_small)


def _too_many_connections(place: Location, db: VolatileDatabaseConfig) -> Iterator[str]:
    given = "num_node_connections" in db.model_fields_set
    if given and db.type == "redis_cluster" and db.num_node_connections > db.num_partitions:
        too_many = f"is more than {dotted(place)}.num_partitions, {db.num_partitions}"
        yield problem((*place, "num_node_connections"), db.num_node_connections, too_many)


def warnings(server: ServerConfig) -> Iterator[str]:
    """What is legal, but may not do what its author expects: one WARNING each."""
    for i, model in enumerate(server.models):
        yield from (f"{dotted(('models', i))}.{line}" for line in _model_warnings(model, server))
    for place, db in _volatile(server):
        if db.type == "redis_cluster" and db.max_batch_size > _REDIS_BATCH:
            yield f"{dotted(place)}.max_batch_size: {db.max_batch_size} is more than a Redis takes at once, {_REDIS_BATCH}"


def _model_warnings(model: ModelConfig, server: ServerConfig) -> Iterator[str]:
    given, missing = model.model_fields_set, len(model.sparse_files) - len(model.default_value_for_each_table)
    if missing > 0:
        yield f"default_value_for_each_table: {show(model.default_value_for_each_table)} is continued with {missing} x 0.0"
    if model.use_static_table and "embedding_cache_type" in given and model.embedding_cache_type != "static":
        yield f"embedding_cache_type: {model.embedding_cache_type!r} gives way to use_static_table: static"
    if model.fuse_embedding_table and "fuse_embedding_table" in given and not server.fuse_embedding_table:
        yield "fuse_embedding_table: true has no effect while it is off for the whole file"
    if not model.num_of_refresher_buffer_in_pool and (model.refresh_interval or model.refresh_delay):
        yield "num_of_refresher_buffer_in_pool: 0 switches refresh_interval and refresh_delay off"
    for key in ("fp8_quant", "enable_pagelock"):
        if getattr(model, key) and not _is_static(model):
            yield f"{key}: true has no effect unless embedding_cache_type is static"


def completed(server: ServerConfig) -> ServerConfig:
    """``server`` with every default that depends on other keys filled in."""
    models = tuple(model.model_copy(update=_completion(model, server)) for model in server.models)
    tiers = tuple(_completed_tier(section) for section in server.tiers)
    volatile = _completed_tier(server.volatile_db)
    if tiers:  # the first is what HugeCTR calls the volatile database, if it is of that kind
        volatile = tiers[0] if isinstance(tiers[0], VolatileDatabaseConfig) else VolatileDatabaseConfig(type="disabled")
    return server.model_copy(update={"models": models, "volatile_db": volatile, "tiers": tiers})


def _completed_tier(section: _T) -> _T:
    if not isinstance(section, VolatileDatabaseConfig) or "num_node_connections" in section.model_fields_set:
        return section
    derived = section.model_copy(update={"num_node_connections": min(section.num_node_connections, section.num_partitions)})
    derived.model_fields_set.discard("num_node_connections")  # it was not given: it is no option of a plugin
    return derived


def _completion(model: ModelConfig, server: ServerConfig) -> dict[str, Any]:
    tables = len(model.sparse_files)
    defaults = model.default_value_for_each_table
    return {
        "embedding_table_names": model.embedding_table_names or tuple(f"sparse_embedding{i}" for i in range(tables)),
        "default_value_for_each_table": defaults + (0.0,) * (tables - len(defaults)),
        "embedding_cache_type": "static" if _is_static(model) else model.embedding_cache_type,
        "fuse_embedding_table": server.fuse_embedding_table and model.fuse_embedding_table,
    }


def _is_static(model: ModelConfig) -> bool:
    return model.use_static_table or model.embedding_cache_type == "static"


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"
