"""Checklist C04: the default of every soft key, and the line that says it was taken."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import pytest
from support.configs import MINIMAL, TWO_MODELS, VOLATILE_DEFAULTS, logged

from hps_numba.config import read_config

MODEL_DEFAULTS = {
    "max_batch_size": 64,
    "embedding_table_names": ["sparse_embedding0"],
    "gpucache": True,
    "gpucacheper": 0.2,
    "hit_rate_threshold": 0.9,
    "embedding_cache_type": "dynamic",
    "use_static_table": False,
    "use_hctr_cache_implementation": True,
    "num_of_worker_buffer_in_pool": 1,
    "num_of_refresher_buffer_in_pool": 1,
    "cache_refresh_percentage_per_iteration": 0.0,
    "init_ec": True,
    "refresh_delay": 0.0,
    "refresh_interval": 0.0,
    "thread_pool_size": 16,
    "use_context_stream": True,
    "fuse_embedding_table": False,
    "enable_pagelock": False,
    "fp8_quant": False,
    "cache_policy": "lru",
    "cache_size_bytes": 0,
    "cache_row_dtype": "float32",
    "output_dtype": "float32",
    "miss_path": "auto",
    "time_budget_ms": 0.0,
    "deployed_device_list": [],
}
PERSISTENT_DEFAULTS = {
    "type": "disabled",
    "path": str(Path(tempfile.gettempdir()) / "rocksdb"),
    "num_threads": 16,
    "read_only": False,
    "max_batch_size": 65536,
    "initialize_after_startup": True,
    "update_filters": [".+"],
}
UPDATE_DEFAULTS = {
    "type": "null",
    "brokers": "127.0.0.1:9092",
    "metadata_refresh_interval_ms": 30000,
    "receive_buffer_size": 262144,
    "poll_timeout_ms": 500,
    "max_batch_size": 8192,
    "failure_backoff_ms": 50,
    "max_commit_interval": 32,
    "name": "",
    "start": "auto",
    "max_backlog_bytes": 67108864,
    "on_loss": "auto",
    "refuse_not_finite": False,
    "batch_interval_ms": 100,
}
HARD = (
    "model",
    "sparse_files",
    "embedding_vecsize_per_table",
    "maxnum_catfeature_query_per_table_per_sample",
    "default_value_for_each_table",
)


def test_c04_soft_keys_take_their_defaults_with_one_info_line_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hps_numba.config")
    bare = {
        "models": [{key: MINIMAL["models"][0][key] for key in HARD}],
        "volatile_db": {},
        "persistent_db": {},
        "update_source": {},
    }
    found = read_config(bare).to_dict()
    absent = {
        "models[0].": (found["models"][0], MODEL_DEFAULTS),
        "volatile_db.": (found["volatile_db"], VOLATILE_DEFAULTS),
        "persistent_db.": (found["persistent_db"], PERSISTENT_DEFAULTS),
        "update_source.": (found["update_source"], UPDATE_DEFAULTS),
        "": (found, {"supportlonglong": True, "fuse_embedding_table": False, "require_gpu": False, "cache_on_cpu": False}),
    }
    for _, (section, defaults) in absent.items():
        assert {key: section[key] for key in defaults} == defaults
    banner, *absences = logged(caplog, logging.INFO)
    assert banner == "reading a config without a file: models m"
    lines = [line.partition(": absent, using ")[0] for line in absences]
    assert sorted(lines) == sorted(prefix + key for prefix, (_, defaults) in absent.items() for key in defaults)
    assert "models[0].gpucacheper: absent, using 0.2" in logged(caplog, logging.INFO)


def test_c04_an_absent_section_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hps_numba.config")
    read_config(MINIMAL)
    lines = [line for line in logged(caplog, logging.INFO) if line.startswith("volatile_db")]
    assert lines == ["volatile_db: absent, using type 'parallel_hash_map' with its defaults"]


def test_c04_a_complete_config_has_nothing_absent(caplog: pytest.LogCaptureFixture) -> None:
    complete = read_config(TWO_MODELS).to_dict()
    caplog.clear()
    caplog.set_level(logging.INFO, "hps_numba.config")
    read_config(complete)
    assert logged(caplog, logging.INFO) == ["reading a config without a file: models demo_model, demo_model2"]
    assert logged(caplog, logging.WARNING) == []
