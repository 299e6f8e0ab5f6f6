"""What concerns several keys at once: lengths of lists, duplicates, limits that depend on other keys, derived defaults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from hps_numba.config.messages import Location, dotted, problem, show
from hps_numba.config.schema import ModelConfig, ServerConfig, VolatileDatabaseConfig

__all__ = ["completed", "contradictions", "surprises"]

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
_REDIS_BATCH = 262143  # keys that an open-source Redis takes in one command (spec 8.5)


def contradictions(server: ServerConfig) -> Iterator[str]:
    """Problems between keys whose single values are all right."""
    names = [model.model for model in server.models]
    yield from _repeated(names, ("models",), "model")
    for i, model in enumerate(server.models):
        yield from _wrong_lengths(model, ("models", i))
        yield from _repeated(model.embedding_table_names, ("models", i, "embedding_table_names"))
        yield from _repeated(model.deployed_device_list, ("models", i, "deployed_device_list"))
        yield from _rows_beyond_allocation(server.volatile_db, model, i)
    yield from _too_many_connections(server.volatile_db)


def _wrong_lengths(model: ModelConfig, location: Location) -> Iterator[str]:
    tables = len(model.sparse_files)
    for key in _PER_TABLE:
        value = getattr(model, key)
        given = key in model.model_fields_set and isinstance(value, tuple)
        padded = key == "default_value_for_each_table" and len(value) < tables
        if given and len(value) != tables and not padded:
            wanted = f"has {_entries(len(value))}, wanted {tables}, as many as sparse_files"
            yield problem((*location, key), value, wanted)


def _repeated(values: Iterable[str | int], location: Location, *keys: str) -> Iterator[str]:
    first: dict[str | int, int] = {}
    for i, value in enumerate(values):
        if first.setdefault(value, i) != i:
            before, here = ((*location, j, *keys) for j in (first[value], i))
            yield problem(here, value, f"is already {dotted(before)}, wanted each one once")


def _rows_beyond_allocation(db: VolatileDatabaseConfig, model: ModelConfig, i: int) -> Iterator[str]:
    row_bytes = 4 * max(model.embedding_vecsize_per_table)
    if db.type in _HASH_MAPS and db.allocation_rate < row_bytes:
        wanted = f"is less than the {row_bytes} bytes of a row of {dotted(('models', i))}"
        yield problem(("volatile_db", "allocation_rate"), db.allocation_rate, wanted)


def _too_many_connections(db: VolatileDatabaseConfig) -> Iterator[str]:
    given = "num_node_connections" in db.model_fields_set
    if given and db.type == "redis_cluster" and db.num_node_connections > db.num_partitions:
        wanted = f"is more than volatile_db.num_partitions, {db.num_partitions}"
        yield problem(("volatile_db", "num_node_connections"), db.num_node_connections, wanted)


def surprises(server: ServerConfig) -> Iterator[str]:
    """What is legal, but may not do what its writer thinks: one WARNING each."""
    for i, model in enumerate(server.models):
        yield from (f"{dotted(('models', i))}.{line}" for line in _model_surprises(model, server))
    db = server.volatile_db
    if db.type == "redis_cluster" and db.max_batch_size > _REDIS_BATCH:
        yield f"volatile_db.max_batch_size: {db.max_batch_size} is more than a Redis takes at once, {_REDIS_BATCH}"


def _model_surprises(model: ModelConfig, server: ServerConfig) -> Iterator[str]:
    given, missing = model.model_fields_set, len(model.sparse_files) - len(model.default_value_for_each_table)
    if missing > 0:
        yield f"default_value_for_each_table: {show(model.default_value_for_each_table)} is continued with {missing} x 0.0"
    if model.use_static_table and "embedding_cache_type" in given and model.embedding_cache_type != "static":
        yield f"embedding_cache_type: {model.embedding_cache_type!r} gives way to use_static_table: static"
    if model.fuse_embedding_table and "fuse_embedding_table" in given and not server.fuse_embedding_table:
        yield "fuse_embedding_table: true has no effect while it is off for the whole file"
    for key in ("fp8_quant", "enable_pagelock"):
        if getattr(model, key) and not _is_static(model):
            yield f"{key}: true has no effect unless embedding_cache_type is static"


def completed(server: ServerConfig) -> ServerConfig:
    """``server`` with every default that depends on other keys filled in."""
    models = tuple(model.model_copy(update=_completion(model, server)) for model in server.models)
    db = server.volatile_db
    if "num_node_connections" not in db.model_fields_set:
        db = db.model_copy(update={"num_node_connections": min(db.num_node_connections, db.num_partitions)})
    return server.model_copy(update={"models": models, "volatile_db": db})


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
