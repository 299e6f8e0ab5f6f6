"""Names that users' code, configs, files and saved graphs hold: none of them goes or changes its meaning."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.framework_rig import tensorflow
from support.processes import environment
from support.waiting import HANG_SECONDS

import hps_numba
from hps_numba import plugins
from hps_numba.config import ModelConfig, ServerConfig, UpdateSourceConfig, schema

PUBLIC = """HPS ArrayError CacheStats CapacityError ClosedError ConfigError DatabaseOverflowPolicy_t DatabaseType_t
DeviceError EmbeddingCacheType_t Fetched HpsError InferenceParams KeyDtypeError ModelConfig ModelFileError
ParameterServerConfig PersistentDatabaseParams Plan Policy PolicyError ReentryError ServerConfig TablePlan TableSpec
TableStats Tier TierError TierUnavailable TraceError UnknownModelError UpdateSourceParams UpdateSourceType_t
VersionError VolatileDatabaseParams __version__ as_policy convert_model generate_model load_policy make_plan open_model
policy_with read_config simulate write_model"""
SIMULATE = """DEFAULT_POLICIES Advice Choice Run Simulation Trace advise known_names open_trace run write_page write_plot"""
TORCH = """SGD Adagrad Adam HPSEmbeddingBag Init LookupCollection LookupLayer Rows load_checkpoint load_embedding operator
publish_rows save_checkpoint save_embedding server_of trained_rows"""
TENSORFLOW = """SGD Adagrad Adam Init LookupCollection LookupLayer SparseLookupLayer Table __version__ embedding_lookup
embedding_lookup_many embedding_lookup_sparse load load_checkpoint publish_rows save_checkpoint server_of split"""
HPS_METHODS = """close closed config contains direct dump erase host_bytes insert load_dump load_model locked_table lookup
lookup_fromdlpack lookup_many lookup_pooled metrics metrics_text model_version models on_evict on_version plan prefetch
read_modify_write record_trace refresh replace_model replaying roll_back_model set_policy stats unload_model update
update_stats"""
OPERATORS = {
    "lookup": "(Tensor keys, str request, int dim) -> Tensor",
    "lookup_many": "(Tensor[] keys, str request, int[] dims) -> Tensor[]",
    "pooled": "(Tensor keys, Tensor offsets, Tensor? weights, str request, int dim, str combiner, float? max_norm, "
    "int? padding) -> Tensor",
}
CONFIG_KEYS = {
    ServerConfig: """cache_on_cpu fuse_embedding_table models persistent_db require_gpu supportlonglong update_source
    update_sources volatile_db""",
    ModelConfig: """cache_policy cache_refresh_percentage_per_iteration cache_row_dtype cache_size_bytes
    default_value_for_each_table deployed_device_list embedding_cache_type embedding_table_names embedding_vecsize_per_table
    enable_pagelock fp8_quant fuse_embedding_table gpucache gpucacheper hit_rate_threshold init_ec max_batch_size
    maxnum_catfeature_query_per_table_per_sample miss_path model num_of_refresher_buffer_in_pool num_of_worker_buffer_in_pool
    output_dtype refresh_delay refresh_interval sparse_files thread_pool_size time_budget_ms use_context_stream
    use_hctr_cache_implementation use_static_table""",
    schema.VolatileDatabaseConfig: """address allocation_rate cache_missed_embeddings enable_tls initial_cache_rate
    initialize_after_startup max_batch_size num_node_connections num_partitions overflow_margin overflow_policy
    overflow_resolution_target password shared_memory_auto_remove shared_memory_name shared_memory_size tls_ca_certificate
    tls_client_certificate tls_client_key tls_server_name_identification type update_filters user_name""",
    schema.PersistentDatabaseConfig: "initialize_after_startup max_batch_size num_threads path read_only type update_filters",
    UpdateSourceConfig: """batch_interval_ms brokers failure_backoff_ms max_backlog_bytes max_batch_size max_commit_interval
    metadata_refresh_interval_ms name on_loss poll_timeout_ms receive_buffer_size refuse_not_finite start type""",
}
PLUGINS = {
    "hps_numba.storage.formats": "directory dynamicemb hdf5 npy npz nve parquet safetensors sok tfra torch",
    "hps_numba.storage.tiers": "hash_map parallel_hash_map",
    "hps_numba.traces.formats": "csv npy oracle_general parquet text",
    "hps_numba.kernels.policies": "clock fifo lfu lfu_decay lru pinned random s3fifo sieve tinylfu ttl",
}
COMMANDS = "compat config convert demo doctor generate inspect plan profile simulate"


@pytest.mark.parametrize(
    ("module", "names"),
    [("hps_numba", PUBLIC), ("hps_numba.simulate", SIMULATE), ("hps_numba.compat", "MODULES install main")],
)
def test_modules_export_what_users_import(module: str, names: str) -> None:
    assert sorted(importlib.import_module(module).__all__) == sorted(names.split())


def test_the_server_has_methods_for_users_only() -> None:
    server = {name for name in dir(hps_numba.HPS) if not name.startswith("_")} | {"config", "direct", "metrics"}
    assert server == set(HPS_METHODS.split())


def test_modules_of_hugectr_have_aliases() -> None:
    assert importlib.import_module("hps_numba.compat").MODULES == {
        "hierarchical_parameter_server": "hps_numba.frontends.tensorflow",
        "hps_torch": "hps_numba.frontends.torch",
        "hugectr": "",
        "hugectr.inference": "hps_numba",
    }


def test_torch_front_end_and_its_operators() -> None:
    torch = pytest.importorskip("torch")
    module = importlib.import_module("hps_numba.frontends.torch")
    assert sorted(module.__all__) == sorted(TORCH.split())
    for name, schema_ in OPERATORS.items():
        assert str(getattr(torch.ops.hps_numba, name).default._schema) == f"hps_numba::{name}{schema_}"


def test_tensorflow_front_end_and_its_tokens() -> None:
    _, keras, module = tensorflow()
    assert sorted(module.__all__) == sorted(TENSORFLOW.split())
    operator: Any = importlib.import_module("hps_numba.frontends.tensorflow.operator")
    assert (operator.LOOKUP_TOKEN, operator.INIT_TOKEN) == ("hps_numba.lookup.1", "hps_numba.init.1")
    for name in ("LookupLayer", "SparseLookupLayer", "LookupCollection"):  # in .keras files
        assert keras.saving.get_registered_name(getattr(module, name)) == f"hps_numba>{name}"


@pytest.mark.parametrize("section", CONFIG_KEYS, ids=lambda section: section.__name__)
def test_config_keys_stay(section: Any) -> None:
    known = {field.alias or name for name, field in section.model_fields.items()}
    assert set(CONFIG_KEYS[section].split()) <= known


@pytest.mark.parametrize("package", PLUGINS)
def test_names_of_plugins_in_configs_stay(package: str) -> None:
    assert set(PLUGINS[package].split()) <= set(plugins.names(package))


def test_commands_stay() -> None:
    for command in ([sys.executable, "-m", "hps_numba"], [str(Path(sys.executable).with_name("hps-numba"))]):
        if not Path(command[0]).exists():
            continue  # not installed, run from a checkout
        run = [*command, "--help"]
        shown = subprocess.run(run, capture_output=True, text=True, check=True, env=environment(), timeout=HANG_SECONDS).stdout
        assert {line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()} >= set(
            COMMANDS.split()
        )
