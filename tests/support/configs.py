"""Shared by tests: MINIMAL, TWO_MODELS, logged, changed, refused, write."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

from hps_numba.config import read_config
from hps_numba.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "supportlonglong": True,
    "models": [
        {
            "model": "m",
            "sparse_files": ["m0.model"],
            "embedding_vecsize_per_table": [16],
            "maxnum_catfeature_query_per_table_per_sample": [10],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0],
            "max_batch_size": 1024,
            "gpucacheper": 1.0,
            "hit_rate_threshold": 1.0,
            "cache_refresh_percentage_per_iteration": 0.2,
        }
    ],
}


def _sample_model(name: str, tables: list[str], widths: list[int], keys: list[int]) -> dict[str, Any]:
    return {
        "model": name,
        "sparse_files": [f"{name}_{table}.model" for table in tables],
        "embedding_table_names": tables,
        "embedding_vecsize_per_table": widths,
        "maxnum_catfeature_query_per_table_per_sample": keys,
        "default_value_for_each_table": [1.0] * len(tables),
        "deployed_device_list": [0],
        "max_batch_size": 16384,
        "gpucacheper": 1.0,
        "hit_rate_threshold": 1.0,
        "cache_refresh_percentage_per_iteration": 0.2,
    }


TWO_MODELS: dict[str, Any] = {
    "supportlonglong": True,
    "models": [
        _sample_model("demo_model", ["sparse_embedding0"], [16], [10]),
        _sample_model("demo_model2", ["sparse_embedding0", "sparse_embedding1"], [64, 32], [3, 5]),
    ],
    "volatile_db": {"type": "hash_map", "num_partitions": 4},
    "persistent_db": {"type": "rocks_db", "path": "/data/rocks"},
    "update_source": {"type": "kafka", "brokers": "kafka0:9092,kafka1:9092"},
}


def changed(config: dict[str, Any], path: str, *value: Any) -> dict[str, Any]:
    """A copy of ``config`` with the value at ``path`` (``models.0.gpucacheper``) replaced, or removed if none is given."""
    config = copy.deepcopy(config)
    *way, last = (int(part) if part.isdigit() else part for part in path.split("."))
    place: Any = config
    for part in way:
        place = place[part] if isinstance(part, int) else place.setdefault(part, {})
    if value:
        place[last] = value[0]
    else:
        del place[last]
    return config


def refused(source: Any, *, strict: bool = False) -> str:
    """The message of the ConfigError that ``source`` is refused with."""
    with pytest.raises(ConfigError) as caught:
        read_config(source, strict=strict)
    return str(caught.value)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "ps.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level and r.name == "hps_numba.config"]


VOLATILE_DEFAULTS = {
    "type": "disabled",
    "address": "127.0.0.1:7000",
    "user_name": "default",
    "password": "",
    "num_partitions": min(16, os.cpu_count() or 1),
    "allocation_rate": 268435456,
    "shared_memory_size": 17179869184,
    "shared_memory_name": "hctr_mp_hash_map_database",
    "shared_memory_auto_remove": True,
    "num_node_connections": min(5, 16, os.cpu_count() or 1),
    "max_batch_size": 65536,
    "enable_tls": False,
    "tls_ca_certificate": "cacertbundle.crt",
    "tls_client_certificate": "client_cert.pem",
    "tls_client_key": "client_key.pem",
    "tls_server_name_identification": "redis.localhost",
    "overflow_margin": 2**64 - 1,
    "overflow_policy": "evict_random",
    "overflow_resolution_target": 0.8,
    "initialize_after_startup": True,
    "initial_cache_rate": 1.0,
    "cache_missed_embeddings": False,
    "update_filters": [".+"],
}
