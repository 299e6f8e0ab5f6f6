"""HugeCTR's Python objects for a config: same names, order and defaults.

They say the same as a file: ``objects.py`` turns them into the content of one, and ``read_config`` checks that. So an error
names the key of the file, also where the object has another name for it.

Wherever an enum is expected, its member or any spelling of the file is taken.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from hps_numba.config.enums import DatabaseOverflowPolicy_t, DatabaseType_t, EmbeddingCacheType_t, UpdateSourceType_t
from hps_numba.config.messages import dotted, failed, problem, unexpected

__all__ = [
    "MAPS",
    "InferenceParams",
    "ParameterServerConfig",
    "PersistentDatabaseParams",
    "UpdateSourceParams",
    "VolatileDatabaseParams",
]


Params = TypeVar("Params")


@dataclass(frozen=True)
class VolatileDatabaseParams:
    """``volatile_db`` of a file: rows in the memory of this host or of a Redis cluster."""

    type: DatabaseType_t | str = DatabaseType_t.parallel_hash_map
    address: str = "127.0.0.1:7000"
    user_name: str = "default"
    password: str = field(default="", repr=False)
    num_partitions: int = field(default_factory=lambda: min(16, os.cpu_count() or 1))
    allocation_rate: int = 2**28
    shared_memory_size: int = 2**34
    shared_memory_name: str = "hctr_mp_hash_map_database"
    shared_memory_auto_remove: bool = True
    num_node_connections: int = 5
    max_batch_size: int = 65536
    enable_tls: bool = False
    tls_ca_certificate: str = "cacertbundle.crt"
    tls_client_certificate: str = "client_cert.pem"
    tls_client_key: str = "client_key.pem"
    tls_server_name_identification: str = "redis.localhost"
    overflow_margin: int = 2**64 - 1
    overflow_policy: DatabaseOverflowPolicy_t | str = DatabaseOverflowPolicy_t.evict_random
    overflow_resolution_target: float = 0.8
    initialize_after_startup: bool = True
    initial_cache_rate: float = 1.0
    cache_missed_embeddings: bool = False
    update_filters: Sequence[str] = field(default_factory=lambda: [".+"])


@dataclass(frozen=True)
class PersistentDatabaseParams:
    """``persistent_db`` of a file: all rows on disk. ``backend`` is the file's ``type``."""

    backend: DatabaseType_t | str = DatabaseType_t.disabled
    path: str = field(default_factory=lambda: str(Path(tempfile.gettempdir()) / "rocksdb"))
    num_threads: int = 16
    read_only: bool = False
    max_batch_size: int = 65536
    initialize_after_startup: bool = True
    update_filters: Sequence[str] = field(default_factory=lambda: [".+"])


@dataclass(frozen=True)
class UpdateSourceParams:
    """``update_source`` of a file: where online updates come from."""

    type: UpdateSourceType_t | str = UpdateSourceType_t.null
    brokers: str = "127.0.0.1:9092"
    metadata_refresh_interval_ms: int = 30000
    receive_buffer_size: int = 262144
    poll_timeout_ms: int = 500
    max_batch_size: int = 8192
    failure_backoff_ms: int = 50
    max_commit_interval: int = 32


def _also_in_the_order_of_hugectr(cls: type[Params]) -> type[Params]:
    """Take positional arguments with ``device_id`` right after ``sparse_model_files`` too, where HugeCTR has it.

    A dataclass cannot say that: arguments without a default would follow one that has a default. The two orders are told apart
    by what is there: a number of a device, or a bool (``use_gpu_embedding_cache``).
    """
    by_field: Any = cls.__init__
    names = [field.name for field in fields(cast(Any, cls)) if not field.kw_only]
    names.remove("device_id")
    place = names.index("sparse_model_files") + 1
    names.insert(place, "device_id")

    @wraps(by_field)
    def init(self: Params, *args: Any, **named: Any) -> None:
        if place < len(args) <= len(names) and _is_device(*args[place : place + 2]):
            by_field(self, **dict(zip(names, args)), **named)
        else:
            by_field(self, *args, **named)

    cast(Any, cls).__init__ = init
    return cls


def _is_device(value: object, following: object = None) -> bool:
    """Not ``use_gpu_embedding_cache``, which may also be 0 or 1, and which a fraction follows."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and not isinstance(following, float)


@_also_in_the_order_of_hugectr
@dataclass(frozen=True)
class InferenceParams:
    """One model, ``models[i]`` of a file, together with the databases of the server.

    A ``default_value_for_each_table`` of one entry serves every table. ``embedding_table_names`` of ``[""]`` means the default
    names. ``device_id`` has to be one of ``deployed_devices``, unless it is 0, its default; by position it may also come right
    after ``sparse_model_files``, as in HugeCTR. The arguments after ``fp8_quant`` are new and taken by keyword only.
    """

    model_name: str
    max_batchsize: int
    hit_rate_threshold: float
    dense_model_file: str
    sparse_model_files: Sequence[str]
    use_gpu_embedding_cache: bool
    cache_size_percentage: float
    i64_input_key: bool
    device_id: int = 0
    use_mixed_precision: bool = False
    scaler: float = 1.0
    use_algorithm_search: bool = True
    use_cuda_graph: bool = True
    number_of_worker_buffers_in_pool: int = 2
    number_of_refresh_buffers_in_pool: int = 1
    thread_pool_size: int = 16
    cache_refresh_percentage_per_iteration: float = 0.0
    deployed_devices: Sequence[int] = field(default_factory=lambda: [0])
    default_value_for_each_table: Sequence[float] = field(default_factory=lambda: [0.0])
    volatile_db: VolatileDatabaseParams = field(default_factory=VolatileDatabaseParams)
    persistent_db: PersistentDatabaseParams = field(default_factory=PersistentDatabaseParams)
    update_source: UpdateSourceParams = field(default_factory=UpdateSourceParams)
    maxnum_des_feature_per_sample: int = 26
    refresh_delay: float = 0.0
    refresh_interval: float = 0.0
    maxnum_catfeature_query_per_table_per_sample: Sequence[int] = field(default_factory=lambda: [26])
    embedding_vecsize_per_table: Sequence[int] = field(default_factory=lambda: [128])
    embedding_table_names: Sequence[str] = field(default_factory=lambda: [""])
    network_file: str = ""
    label_dim: int = 1
    slot_num: int = 10
    non_trainable_params_file: str = ""
    use_static_table: bool = False
    embedding_cache_type: EmbeddingCacheType_t | str = EmbeddingCacheType_t.Dynamic
    use_context_stream: bool = True
    fuse_embedding_table: bool = False
    use_hctr_cache_implementation: bool = True
    init_ec: bool = True
    enable_pagelock: bool = False
    fp8_quant: bool = False
    cache_policy: str | Sequence[str] = field(default="lru", kw_only=True)
    cache_size_bytes: int | Sequence[int] = field(default=0, kw_only=True)
    cache_row_dtype: str | Sequence[str] = field(default="float32", kw_only=True)
    output_dtype: str = field(default="float32", kw_only=True)
    miss_path: str = field(default="auto", kw_only=True)
    time_budget_ms: float = field(default=0.0, kw_only=True)


@dataclass(frozen=True)
class ParameterServerConfig:
    """Several models with the shape of their tables, and the databases they share.

    The three maps go from the name of a model to its tables' names, row widths and keys a sample; they and the three databases
    override what the ``InferenceParams`` say.

    Raises:
        ConfigError: a model is missing in a map, a map has more models, or the lists of a model differ in length.
    """

    emb_table_name: Mapping[str, Sequence[str]]
    embedding_vec_size: Mapping[str, Sequence[int]]
    max_feature_num_per_sample_per_emb_table: Mapping[str, Sequence[int]]
    inference_params_array: Sequence[InferenceParams]
    volatile_db: VolatileDatabaseParams = field(default_factory=VolatileDatabaseParams)
    persistent_db: PersistentDatabaseParams = field(default_factory=PersistentDatabaseParams)
    update_source: UpdateSourceParams = field(default_factory=UpdateSourceParams)
    require_gpu: bool = field(default=False, kw_only=True)
    cache_on_cpu: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        problems = [*_not_models(self.inference_params_array)] or [*self._misfits()]
        if problems:
            raise failed(problems)

    def _misfits(self) -> Iterator[str]:
        tables = {params.model_name: len(params.sparse_model_files) for params in self.inference_params_array}
        for name in MAPS:
            lists = getattr(self, name)
            if not isinstance(lists, Mapping):
                yield unexpected((name,), lists, "a map from the names of models to lists")
                continue
            for model in lists.keys() - tables.keys():
                yield problem((name, str(model)), lists[model], "is for a model that inference_params_array does not have")
            for model in tables.keys() - lists.keys():
                yield f"{dotted((name, model))}: missing, expected a list of {tables[model]}"
            for model in tables.keys() & lists.keys():
                if not _has_size(lists[model], tables[model]):
                    yield unexpected((name, model), lists[model], f"a list of {tables[model]}, one per sparse model file")


MAPS = {
    "emb_table_name": "embedding_table_names",
    "embedding_vec_size": "embedding_vecsize_per_table",
    "max_feature_num_per_sample_per_emb_table": "maxnum_catfeature_query_per_table_per_sample",
}
"""The maps of a :class:`ParameterServerConfig`, with the keys of the file that they fill."""


def _not_models(models: object) -> Iterator[str]:
    if not isinstance(models, (list, tuple)):
        yield unexpected(("inference_params_array",), models, "a list of InferenceParams")
        return
    for i, params in enumerate(models):
        location = ("inference_params_array", i)
        if not isinstance(params, InferenceParams):
            yield unexpected(location, params, "an InferenceParams")
        elif not isinstance(params.model_name, str):
            yield unexpected((*location, "model_name"), params.model_name, "a string")
        elif not isinstance(params.sparse_model_files, (list, tuple)):
            yield unexpected((*location, "sparse_model_files"), params.sparse_model_files, "a list of strings")


def _has_size(values: object, size: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == size
