"""HugeCTR's Python objects say the same as a file (checklist C21, and C02 for objects)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
from support.configs import MINIMAL, TWO_MODELS, logged, refused

from hps_numba.config import (
    DatabaseOverflowPolicy_t,
    DatabaseType_t,
    EmbeddingCacheType_t,
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    UpdateSourceParams,
    UpdateSourceType_t,
    VolatileDatabaseParams,
    read_config,
)
from hps_numba.config.objects import FILE_KEYS
from hps_numba.errors import ConfigError

# names and order of HugeCTR; what follows the bar is new and taken by keyword only
SIGNATURES: dict[type, str] = {
    VolatileDatabaseParams: "type address user_name password num_partitions allocation_rate shared_memory_size "
    "shared_memory_name shared_memory_auto_remove num_node_connections max_batch_size enable_tls tls_ca_certificate "
    "tls_client_certificate tls_client_key tls_server_name_identification overflow_margin overflow_policy "
    "overflow_resolution_target initialize_after_startup initial_cache_rate cache_missed_embeddings update_filters",
    PersistentDatabaseParams: "backend path num_threads read_only max_batch_size initialize_after_startup update_filters",
    UpdateSourceParams: "type brokers metadata_refresh_interval_ms receive_buffer_size poll_timeout_ms max_batch_size "
    "failure_backoff_ms max_commit_interval",
    InferenceParams: "model_name max_batchsize hit_rate_threshold dense_model_file sparse_model_files use_gpu_embedding_cache "
    "cache_size_percentage i64_input_key device_id use_mixed_precision scaler use_algorithm_search use_cuda_graph "
    "number_of_worker_buffers_in_pool number_of_refresh_buffers_in_pool thread_pool_size "
    "cache_refresh_percentage_per_iteration deployed_devices default_value_for_each_table volatile_db persistent_db "
    "update_source maxnum_des_feature_per_sample refresh_delay refresh_interval "
    "maxnum_catfeature_query_per_table_per_sample embedding_vecsize_per_table embedding_table_names network_file label_dim "
    "slot_num non_trainable_params_file use_static_table embedding_cache_type use_context_stream fuse_embedding_table "
    "use_hctr_cache_implementation init_ec enable_pagelock fp8_quant "
    "| cache_policy cache_size_bytes cache_row_dtype output_dtype miss_path time_budget_ms",
    ParameterServerConfig: "emb_table_name embedding_vec_size max_feature_num_per_sample_per_emb_table inference_params_array "
    "volatile_db persistent_db update_source | require_gpu cache_on_cpu",
}
MODEL_DEFAULTS = {
    "device_id": 0,
    "use_mixed_precision": False,
    "scaler": 1.0,
    "use_algorithm_search": True,
    "use_cuda_graph": True,
    "number_of_worker_buffers_in_pool": 2,
    "number_of_refresh_buffers_in_pool": 1,
    "thread_pool_size": 16,
    "cache_refresh_percentage_per_iteration": 0.0,
    "deployed_devices": [0],
    "default_value_for_each_table": [0.0],
    "maxnum_des_feature_per_sample": 26,
    "refresh_delay": 0.0,
    "refresh_interval": 0.0,
    "maxnum_catfeature_query_per_table_per_sample": [26],
    "embedding_vecsize_per_table": [128],
    "embedding_table_names": [""],
    "label_dim": 1,
    "slot_num": 10,
    "use_static_table": False,
    "embedding_cache_type": EmbeddingCacheType_t.Dynamic,
    "use_context_stream": True,
    "fuse_embedding_table": False,
    "use_hctr_cache_implementation": True,
    "init_ec": True,
    "enable_pagelock": False,
    "fp8_quant": False,
}


def params(name: str = "m", files: Any = ("m0.model",), **more: Any) -> InferenceParams:
    """A model of HugeCTR's samples, with required arguments given by position."""
    given: dict[str, Any] = {
        "embedding_vecsize_per_table": [16],
        "maxnum_catfeature_query_per_table_per_sample": [10],
        "cache_refresh_percentage_per_iteration": 0.2,
        "number_of_worker_buffers_in_pool": 1,
    }
    return InferenceParams(name, 1024, 1.0, "", files, True, 1.0, True, **{**given, **more})


def two_models(**more: Any) -> dict[str, Any]:
    """Arguments of the ``ParameterServerConfig`` that says the same as ``TWO_MODELS``."""
    models = [
        InferenceParams(
            model["model"],
            16384,
            1.0,
            "",
            model["sparse_files"],
            True,
            1.0,
            True,
            number_of_worker_buffers_in_pool=1,
            cache_refresh_percentage_per_iteration=0.2,
            default_value_for_each_table=[1.0],
        )
        for model in TWO_MODELS["models"]
    ]
    return {
        "emb_table_name": {"demo_model": ["sparse_embedding0"], "demo_model2": ["sparse_embedding0", "sparse_embedding1"]},
        "embedding_vec_size": {"demo_model": [16], "demo_model2": [64, 32]},
        "max_feature_num_per_sample_per_emb_table": {"demo_model": [10], "demo_model2": [3, 5]},
        "inference_params_array": models,
        "volatile_db": VolatileDatabaseParams(DatabaseType_t.hash_map, num_partitions=4, num_node_connections=4),
        "persistent_db": PersistentDatabaseParams("rocksdb", "/data/rocks"),
        "update_source": UpdateSourceParams(UpdateSourceType_t.kafka_message_queue, "kafka0:9092,kafka1:9092"),
        **more,
    }


@pytest.mark.parametrize("cls", SIGNATURES, ids=lambda cls: cls.__name__)
def test_c21_names_and_order(cls: type) -> None:
    positional, _, keyword = SIGNATURES[cls].partition(" | ")
    fields = dataclasses.fields(cls)
    assert [field.name for field in fields if not field.kw_only] == positional.split()
    assert [field.name for field in fields if field.kw_only] == keyword.split()


def test_c21_defaults() -> None:
    found = InferenceParams("m", 1024, 1.0, "", ["m0.model"], True, 1.0, True)
    assert {name: getattr(found, name) for name in MODEL_DEFAULTS} == MODEL_DEFAULTS
    assert found.volatile_db == VolatileDatabaseParams(type=DatabaseType_t.parallel_hash_map)
    assert found.persistent_db == PersistentDatabaseParams(backend=DatabaseType_t.disabled)
    assert found.update_source == UpdateSourceParams(type=UpdateSourceType_t.null)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.init_ec = False  # type: ignore[misc]


def test_c21_members_of_the_enums() -> None:
    assert [member.name for member in DatabaseType_t] == [
        "disabled",
        "hash_map",
        "parallel_hash_map",
        "multi_process_hash_map",
        "redis_cluster",
        "rocks_db",
    ]
    assert [member.name for member in DatabaseOverflowPolicy_t] == ["evict_random", "evict_least_used", "evict_oldest"]
    assert [member.name for member in UpdateSourceType_t] == ["null", "kafka_message_queue"]
    assert [member.name for member in EmbeddingCacheType_t] == ["Dynamic", "UVM", "Static", "stochastic"]


def test_c21_databases_have_the_defaults_of_the_file() -> None:
    sections = {"volatile_db": {"type": "parallel_hash_map"}, "persistent_db": {}, "update_source": {}}
    assert read_config([params()]) == read_config({**MINIMAL, **sections})


def test_c21_c02_objects_say_the_same_as_the_file() -> None:
    assert read_config([params()]) == read_config(MINIMAL)
    assert read_config((params(),)).identity == read_config(MINIMAL).identity
    assert read_config(ParameterServerConfig(**two_models())) == read_config(TWO_MODELS)


def test_c21_every_key_of_a_model_can_be_said_by_objects() -> None:
    objects = {FILE_KEYS.get(field.name, field.name) for field in dataclasses.fields(InferenceParams)}
    assert set(read_config(MINIMAL).to_dict()["models"][0]) <= objects


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (DatabaseType_t.redis_cluster, ["redis_cluster", "redis"]),
        (DatabaseType_t.hash_map, ["hash_map", "hashmap", "hash", "map"]),
        (DatabaseType_t.disabled, ["disabled", "disable", "none"]),
    ],
)
def test_c21_strings_and_enum_members_mean_the_same(member: DatabaseType_t, words: list[str]) -> None:
    found = [read_config([params(volatile_db=VolatileDatabaseParams(kind))]) for kind in (member, *words)]
    assert {config.volatile_db.type for config in found} == {member.value}


def test_c21_other_enums_take_strings_too() -> None:
    volatile = VolatileDatabaseParams("map", overflow_policy="oldest", num_partitions=4)
    config = read_config([params(volatile_db=volatile, update_source=UpdateSourceParams("kafka"), embedding_cache_type="uvm")])
    assert config.volatile_db.overflow_policy == DatabaseOverflowPolicy_t.evict_oldest
    assert config.update_source.type == UpdateSourceType_t.kafka_message_queue
    assert config.models[0].embedding_cache_type == EmbeddingCacheType_t.UVM
    for stochastic in ("stochastic", EmbeddingCacheType_t.stochastic):
        assert "expected dynamic (stochastic never" in refused([params(embedding_cache_type=stochastic)])


def test_c21_lists_of_defaults(caplog: pytest.LogCaptureFixture) -> None:
    three = {"embedding_vecsize_per_table": [4] * 3, "maxnum_catfeature_query_per_table_per_sample": [1] * 3}
    for given, expected in (([0.0], (0.0,) * 3), ([5.0], (5.0,) * 3), ([1.0, 2.0], (1.0, 2.0, 0.0))):
        model = read_config([params(files=["a", "b", "c"], default_value_for_each_table=given, **three)]).models[0]
        assert model.default_value_for_each_table == expected
        assert model.embedding_table_names == ("sparse_embedding0", "sparse_embedding1", "sparse_embedding2")
    assert len(logged(caplog, logging.WARNING)) == 1
    assert "expected 3 entries, as many as sparse_files, got 1 entry" in refused([params(files=["a", "b", "c"])])


def test_c21_new_keys_and_fusion_are_carried() -> None:
    new = {"cache_policy": "lfu", "cache_size_bytes": [4096], "output_dtype": "float16", "time_budget_ms": 2.5}
    model = read_config([params(**new)]).models[0]
    assert (model.cache_policy, model.cache_size_bytes, model.output_dtype, model.time_budget_ms) == (
        "lfu",
        (4096,),
        "float16",
        2.5,
    )
    fused = read_config([params("a", fuse_embedding_table=True), params("b")])
    assert fused.fuse_embedding_table is True
    assert [model.fuse_embedding_table for model in fused.models] == [True, False]
    server = read_config(ParameterServerConfig(**two_models(require_gpu=True, cache_on_cpu=True)))
    assert (server.require_gpu, server.cache_on_cpu) == (True, True)


def test_c21_any_deployed_devices() -> None:
    for devices in ([1], [3, 1], [], ()):
        assert read_config([params(deployed_devices=devices)]).models[0].deployed_device_list == tuple(devices)
    assert refused([params(deployed_devices=[0, 1], device_id=3)]) == "models[0].device_id: 3 is not in deployed_devices"
    assert read_config([params(deployed_devices=[1, 3], device_id=3)]).models[0].deployed_device_list == (1, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "models: expected at least 1 entry, got []"),
        ([3], "models[0]: expected an InferenceParams, got 3"),
        ([params("m", files="abc")], "models[0].sparse_files: expected a list, each entry a string, got 'abc'"),
        ([params("m", volatile_db=None)], "volatile_db: expected an object, got null"),
        (
            [params(cache_refresh_percentage_per_iteration=2)],
            "models[0].cache_refresh_percentage_per_iteration: 2 is not in 0..1",
        ),
        ([params("m"), params("m")], "models[1].model: 'm' is already models[0].model, expected each one once"),
        (
            [params("a"), dataclasses.replace(params("b"), i64_input_key=False)],
            "models[1].i64_input_key: false differs from models[0], all must agree",
        ),
        (
            [params("a"), params("b", persistent_db=PersistentDatabaseParams("rocks_db"))],
            "models[1].persistent_db: a value of type PersistentDatabaseParams differs from models[0]",
        ),
        ([params(deployed_devices=None, device_id=1)], "models[0].deployed_device_list: expected a list, each entry"),
    ],
)
def test_c21_mistakes_in_objects(source: Any, message: str) -> None:
    assert refused(source).startswith(message)


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["emb_table_name"].pop("demo_model"), "emb_table_name.demo_model: missing, expected a list of 1"),
        (lambda a: a["embedding_vec_size"].update(other=[1]), "embedding_vec_size.other: [1] is for a model that"),
        (
            lambda a: a["embedding_vec_size"].update(demo_model2=[64]),
            "embedding_vec_size.demo_model2: expected a list of 2, one per sparse model file, got [64]",
        ),
        (
            lambda a: a["max_feature_num_per_sample_per_emb_table"].update(demo_model2=[3, 5, 7]),
            "max_feature_num_per_sample_per_emb_table.demo_model2: expected a list of 2, one per sparse model file",
        ),
        (
            lambda a: a["emb_table_name"].update(demo_model=3),
            "emb_table_name.demo_model: expected a list of 1, one per sparse model file, got 3",
        ),
        (
            lambda a: a.update(embedding_vec_size=[16]),
            "embedding_vec_size: expected a map from the names of models to lists, got [16]",
        ),
        (lambda a: a.update(inference_params_array=3), "inference_params_array: expected a list of InferenceParams, got 3"),
        (lambda a: a.update(inference_params_array=[3]), "inference_params_array[0]: expected an InferenceParams, got 3"),
        (
            lambda a: a.update(inference_params_array=[params([1])]),
            "inference_params_array[0].model_name: expected a string, got [1]",
        ),
        (
            lambda a: a.update(inference_params_array=[params(files="a")]),
            "inference_params_array[0].sparse_model_files: expected a list of strings, got 'a'",
        ),
    ],
)
def test_c21_parameter_server_config_checks_its_maps(change: Change, message: str) -> None:
    arguments = two_models()
    change(arguments)
    with pytest.raises(ConfigError) as caught:
        ParameterServerConfig(**arguments)
    assert str(caught.value).startswith(message)


def test_c21_parameter_server_config_replaces_databases_and_shapes_of_models() -> None:
    models = [
        dataclasses.replace(p, volatile_db=VolatileDatabaseParams("redis")) for p in two_models()["inference_params_array"]
    ]
    config = read_config(ParameterServerConfig(**two_models(inference_params_array=models)))
    assert config == read_config(TWO_MODELS)
    empty = ParameterServerConfig({}, {}, {}, [])
    assert refused(empty) == "models: expected at least 1 entry, got []"
