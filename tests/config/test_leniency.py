"""What HugeCTR's readers took in another form is read with one WARNING, and refused by ``strict=True``."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal

import pytest
from support.configs import MINIMAL, TWO_MODELS, changed, logged, refused, write

from hps_numba.config import read_config
from hps_numba.config.databases import PersistentDatabaseConfig, UpdateSourceConfig, VolatileDatabaseConfig
from hps_numba.config.schema import ModelConfig, ServerConfig
from hps_numba.errors import ConfigError


def dotted(path: str) -> str:
    return path.replace(".0", "[0]").replace(".1", "[1]")


def value_at(config: ServerConfig, path: str) -> Any:
    found: Any = config
    for part in path.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


OTHER_FORMS: list[tuple[str, Any, Any]] = [
    ("supportlonglong", "true", True),
    ("supportlonglong", "False", False),
    ("models.0.gpucache", " TRUE ", True),
    ("models.0.max_batch_size", "64", 64),
    ("models.0.max_batch_size", " 64 ", 64),
    ("models.0.max_batch_size", "1e3", 1000),
    ("models.0.max_batch_size", "64.0", 64),
    ("models.0.max_batch_size", 64.0, 64),
    ("models.0.max_batch_size", True, 1),
    ("models.0.gpucacheper", "0.5", 0.5),
    ("models.0.gpucacheper", "1", 1.0),
    ("models.0.gpucacheper", ".5", 0.5),
    ("models.0.gpucacheper", True, 1.0),
    ("models.0.hit_rate_threshold", "9e-1", 0.9),
    ("models.0.hit_rate_threshold", "-1", -1.0),
    ("models.0.num_of_worker_buffer_in_pool", "4", 4),
    ("models.0.embedding_vecsize_per_table", ["16"], (16,)),
    ("models.0.embedding_vecsize_per_table", [16.0], (16,)),
    ("models.0.embedding_vecsize_per_table", "[16]", (16,)),
    ("models.0.embedding_vecsize_per_table", '["16"]', (16,)),
    ("models.0.default_value_for_each_table", "[ 0.5 ]", (0.5,)),
    ("models.0.deployed_device_list", "[0, 1]", (0, 1)),
    ("models.0.deployed_device_list", "[]", ()),
    ("models.0.cache_size_bytes", "4096", 4096),
    ("models.0.cache_size_bytes", ["4096"], (4096,)),
    ("volatile_db.num_partitions", "8", 8),
    ("volatile_db.overflow_margin", -1, 2**64 - 1),
    ("volatile_db.overflow_margin", "18446744073709551615", 2**64 - 1),
    ("volatile_db.enable_tls", "false", False),
    ("persistent_db.read_only", "True", True),
    ("update_source.poll_timeout_ms", "500", 500),
    ("models.0.default_value_for_each_table", [0.5, 0.25], (0.5,)),
    ("models.0.maxnum_catfeature_query_per_table_per_sample", [10, 20], (10,)),
    ("models.0.embedding_table_names", ["a", "b"], ("a",)),
    ("models.0.deployed_device_list", [2, 0, 2], (2, 0)),
    ("models.0.num_of_worker_buffer_in_pool", 0, 1),
    ("models.0.thread_pool_size", 0, 1),
    ("models.0.thread_pool_size", 4000, 1024),
    ("persistent_db.num_threads", 2000, 1024),
    ("models.0.refresh_delay", 1e9, 365 * 24 * 3600.0),
]


@pytest.mark.parametrize(("path", "value", "meaning"), OTHER_FORMS)
def test_a_value_in_another_form_is_read_with_one_warning(
    path: str, value: Any, meaning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(MINIMAL, path, value)
    found = value_at(read_config(config), path)
    assert found == meaning and type(found) is type(meaning)
    (line,) = logged(caplog, logging.WARNING)
    assert line.startswith(f"{dotted(path)}: expected ")
    assert line.count("read as ") == 1
    assert refused(config, strict=True).startswith(f"{dotted(path)}")
    assert read_config(read_config(config).to_dict(), strict=True) == read_config(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("supportlonglong", "yes"),
        ("supportlonglong", "1"),
        ("supportlonglong", 1),
        ("supportlonglong", 1.0),
        ("models.0.max_batch_size", "64k"),
        ("models.0.max_batch_size", "64.5"),
        ("models.0.max_batch_size", 64.5),
        ("models.0.max_batch_size", "0x40"),
        ("models.0.max_batch_size", "6_4"),
        ("models.0.max_batch_size", "٦٤x"),
        ("models.0.max_batch_size", ""),
        ("models.0.max_batch_size", "9" * 5000),
        ("models.0.max_batch_size", "1e999"),
        ("models.0.gpucacheper", "nan"),
        ("models.0.gpucacheper", "inf"),
        ("models.0.gpucacheper", "1e999"),
        ("models.0.gpucacheper", "1,0"),
        ("models.0.gpucacheper", "1.4"),
        ("models.0.embedding_vecsize_per_table", "16"),
        ("models.0.embedding_vecsize_per_table", "[[16]]"),
        ("models.0.embedding_vecsize_per_table", "[16"),
        ("models.0.embedding_vecsize_per_table", "[" * 90_000),
        ("models.0.sparse_files", '["a.model"]'),
        ("volatile_db", '{"type": "hash_map"}'),
        ("volatile_db.overflow_margin", -2),
        ("volatile_db.num_partitions", -1),
    ],
)
def test_what_has_no_clear_meaning_is_still_refused(path: str, value: Any) -> None:
    assert refused(changed(MINIMAL, path, value)).startswith(f"{dotted(path)}")


def test_json_within_text_says_so() -> None:
    for path, value in (("volatile_db", "{}"), ("models", "[]"), ("models.0.sparse_files", ' ["a"]')):
        assert refused(changed(MINIMAL, path, value)).endswith(": write it without the quotes")


@pytest.mark.parametrize(
    ("key", "meaning"), [("maxnum_catfeature_query_per_table_per_sample", 26), ("default_value_for_each_table", 0.0)]
)
def test_keys_that_older_versions_lacked_take_their_documented_default(
    key: str, meaning: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = changed(TWO_MODELS, f"models.1.{key}")
    assert getattr(read_config(config).models[1], key) == (meaning, meaning)
    assert logged(caplog, logging.WARNING) == [f"models[1].{key}: missing, read as [{meaning}, {meaning}]"]
    assert refused(config, strict=True).startswith(f"models[1].{key}: missing")


@pytest.mark.parametrize(("key", "kind"), [("cpu_memory_db", "hash_map"), ("distributed_db", "redis_cluster")])
def test_sections_of_old_versions_say_what_they_became(key: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(MINIMAL, key, {"type": kind})
    read_config(config)
    assert logged(caplog, logging.WARNING) == [f"{key}: unknown key, it became volatile_db of type {kind}"]
    assert refused(config, strict=True) == logged(caplog, logging.WARNING)[0]


def test_no_refresh_buffers_switch_the_timer_off(caplog: pytest.LogCaptureFixture) -> None:
    config = changed(MINIMAL, "models.0.num_of_refresher_buffer_in_pool", 0)
    assert read_config(config, strict=True).models[0].num_of_refresher_buffer_in_pool == 0
    assert logged(caplog, logging.WARNING) == []
    read_config(changed(config, "models.0.refresh_interval", 5))
    assert logged(caplog, logging.WARNING) == [
        "models[0].num_of_refresher_buffer_in_pool: 0 switches refresh_interval and refresh_delay off"
    ]


def test_a_password_as_text_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    read_config(changed(MINIMAL, "volatile_db", {"type": "redis", "password": "12345", "num_partitions": "8"}))
    assert "12345" not in caplog.text


MERLIN = """{
  "supportlonglong": "true",
  "volatile_db": {"type": "hash_map", "user_name": "default", "num_partitions": "8", "allocation_rate": "268435456",
                  "max_batch_size": 65536, "overflow_margin": "100000000", "overflow_policy": "evict_oldest",
                  "overflow_resolution_target": "0.8", "initial_cache_rate": "1.0", "update_filters": [".*"]},
  "persistent_db": {"type": "disabled", "path": "/tmp/rocksdb", "num_threads": "16", "read_only": "false"},
  "update_source": {"type": "none", "brokers": "127.0.0.1:9092;"},
  // as deployed
  "models": [{"model": "dlrm", "sparse_files": ["/models/dlrm/0.model"], "dense_file": "", "network_file": "/models/d.json",
    "num_of_worker_buffer_in_pool": "4", "num_of_refresher_buffer_in_pool": 0, "deployed_device_list": ["0"],
    "max_batch_size": "1024", "default_value_for_each_table": [0.0, 0.0], "maxnum_des_feature_per_sample": "13",
    "maxnum_catfeature_query_per_table_per_sample": [26.0], "embedding_vecsize_per_table": [16], "gpucache": "True",
    "gpucacheper": "0.5", "hit_rate_threshold": "0.9", "cache_refresh_percentage_per_iteration": "0.2"}]
}"""


def test_a_config_as_found_in_the_wild_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = read_config(write(tmp_path, MERLIN)).models[0]
    assert (model.num_of_worker_buffer_in_pool, model.deployed_device_list, model.gpucacheper) == (4, (0,), 0.5)
    assert model.default_value_for_each_table == (0.0,)
    lines = logged(caplog, logging.WARNING)
    assert len(lines) == len(set(lines)) == 17
    assert all(line.partition(": ")[2].startswith("expected ") for line in lines)


# --- files that are not JSON ------------------------------------------------------------------------------------------

NOT_JSON = [
    ("{'models': []}", 1, 2, "write text in double quotes"),
    ('{"a": True}', 1, 7, "this is Python, write true for True"),
    ('{"a": [None]}', 1, 8, "this is Python, write null for None"),
    ('{\n  "a": 1,\n}', 3, 1, "remove the comma before the closing bracket"),
    ('{\n  "a": [1, 2,]\n}', 2, 14, "remove the comma before the closing bracket"),
    ('{\n  # a comment\n  "a": 1}', 2, 3, "comments begin with //"),
    ('{"a": 1 # a comment\n}', 1, 9, "comments begin with //"),
    ('{"a": (1, 2)}', 1, 7, "write a list in square brackets"),
    ('{"a": 1\n "b": 2}', 2, 2, "a comma may be missing before it"),
    ("{models: []}", 1, 2, "write text and keys in double quotes"),
    ('{"a": "b\nc"}', 1, 9, "a text ends on the line on which it begins"),
    (r'{"a": "C:\models"}', 1, 10, r"write a backslash as \\"),
    ('/* c */ {"a": yes}', 1, 15, "write text and keys in double quotes"),
]


@pytest.mark.parametrize(("text", "line", "column", "hint"), NOT_JSON)
def test_what_is_not_json_is_shown_with_what_to_change(tmp_path: Path, text: str, line: int, column: int, hint: str) -> None:
    path = write(tmp_path, text)
    first, shown, caret = refused(path).splitlines()
    assert first.startswith(f"{path}, line {line}, ") and first.endswith(f", expected JSON: {hint}")
    assert shown == f"      {text.splitlines()[line - 1]}"
    if "Illegal trailing comma" not in first:  # which later versions of Python point to
        assert f", column {column}: " in first
        assert caret == f"      {' ' * (column - 1)}^"


def test_a_long_line_is_shown_around_the_place(tmp_path: Path) -> None:
    path = write(tmp_path, '{"a": [' + "1, " * 5000 + "x], \t" + "2, " * 5000)
    _, shown, caret = refused(path).splitlines()
    assert len(shown) < 120 and shown[caret.index("^")] == "x"


@pytest.mark.parametrize("text", ["", " \n\t", "// nothing\n"])
def test_an_empty_file_says_so(tmp_path: Path, text: str) -> None:
    assert refused(write(tmp_path, text)).splitlines()[0].endswith("expected JSON: the file is empty")


def test_json_text_in_place_of_a_path_says_so() -> None:
    for text in (json.dumps(MINIMAL), " [1]", "{'models': 1}"):
        assert refused(text) == "config: expected a path or a dict, got JSON text: give json.loads(text) instead of the text"


def test_a_key_given_twice_is_an_error_if_strict(tmp_path: Path) -> None:
    path = write(tmp_path, '{"models": 1, "models": 2}')
    assert refused(path, strict=True) == f"{path}: key 'models' comes 2 times in one object"


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refused(tmp_path / "pipe")
    assert refused("/dev/zero").startswith("/dev/zero: not a regular file, expected a JSON file")
    assert "Is a directory" in refused(tmp_path)
    monkeypatch.setattr("hps_numba.config.reading._LARGEST", 1 << 20)
    assert "at most 1 MiB" in refused(write(tmp_path, " " * (2 << 20)))


def test_a_pipe_of_a_shell_is_read() -> None:
    reading, writing = os.pipe()
    thread = threading.Thread(target=lambda: (os.write(writing, json.dumps(MINIMAL).encode()), os.close(writing)))
    thread.start()
    try:
        assert read_config(f"/dev/fd/{reading}") == read_config(MINIMAL)
    finally:
        thread.join()
        os.close(reading)


# --- every key against the ranges of HugeCTR ----------------------------------------------------------------------------

# What the library reads beside what HugeCTR 24.6 read: (key, type, its default, values that it took, values that it took and we
# refuse with the reason). A value that it took is read, with or without a WARNING.
Kind = Literal["bool", "int", "float", "text", "list"]
Row = tuple[str, Kind, Any, tuple[Any, ...], dict[Any, str]]
BIG, HUGE = 2**31 - 1, 2**32 - 1
MODEL: list[Row] = [
    ("model", "text", "", ("m", "A-b_9", "x" * 120), {"": "no table could have a name", "a b": "ended the process"}),
    ("sparse_files", "list", None, (["a.model"], ["hdfs://host:9000/a"], ["s3://bucket/a"]), {}),
    ("embedding_vecsize_per_table", "list", None, ([1], [128], [65536]), {}),
    ("maxnum_catfeature_query_per_table_per_sample", "list", [26], ([0], [1], [BIG], [1, 2]), {}),
    ("default_value_for_each_table", "list", [0.0], ([0], [-1.5], [1, 2], [3.4e38]), {}),
    ("deployed_device_list", "list", None, ([0], [1], [3, 1], [0, 0]), {}),
    ("max_batch_size", "int", 64, (1, 64, BIG, 64.0, True), {0: "no lookup would fit", 1.5: "was cut to 1 silently"}),
    ("embedding_table_names", "list", None, (["t"], ["t", "u"]), {}),
    ("gpucache", "bool", True, (True, False), {}),
    ("gpucacheper", "float", 0.2, (0, 0.5, 1, True), {1.4: "more than the table", -0.5: "less than nothing"}),
    ("hit_rate_threshold", "float", 0.9, (-1, 0, 0.9, 1, 1.1, 100), {}),
    ("embedding_cache_type", "text", "dynamic", ("dynamic", "static", "uvm"), {"Static": "was dynamic", "stochastic": "none"}),
    ("use_static_table", "bool", False, (True, False), {}),
    ("use_hctr_cache_implementation", "bool", True, (True, False), {}),
    ("num_of_worker_buffer_in_pool", "int", 1, (0, 1, 2, 256, 10_000), {-1: "wrapped"}),
    ("num_of_refresher_buffer_in_pool", "int", 1, (0, 1, 256, 10_000), {-1: "wrapped"}),
    ("cache_refresh_percentage_per_iteration", "float", 0, (0, 0.2, 1), {2: "more than the cache"}),
    ("init_ec", "bool", True, (True, False), {}),
    ("refresh_delay", "float", 0, (0, 0.5, 3600, 1e9), {-1: "no time"}),
    ("refresh_interval", "float", 0, (0, 5, 3600, 1e9), {-1: "no time"}),
    ("thread_pool_size", "int", 16, (0, 1, 16, 1024, 5000), {-1: "wrapped"}),
    ("use_context_stream", "bool", True, (True, False), {}),
    ("fuse_embedding_table", "bool", True, (True, False), {}),
    ("enable_pagelock", "bool", False, (True, False), {}),
    ("fp8_quant", "bool", False, (True, False), {}),
]
VOLATILE: list[Row] = [
    ("type", "text", None, ("disabled", "hash_map", "hash", "parallel_hash_map", "redis"), {"rocks_db": "ended the process"}),
    ("address", "text", "127.0.0.1:7000", ("a", "a:1", "a:1,b:2", "a:1;b:2", "a:1,", "a:1;"), {"a:x": "an exception of C++"}),
    ("user_name", "text", "default", ("default", ""), {}),
    ("password", "text", "", ("", "x"), {}),
    ("num_partitions", "int", None, (1, 16, 65536, 10**6), {0: "ended the process"}),
    ("allocation_rate", "int", 2**28, (64, 2**28, 2**50), {63: "less than a row, ended the process"}),
    ("shared_memory_size", "int", 2**34, (2**16, 2**34), {}),
    ("shared_memory_name", "text", "hctr_mp_hash_map_database", ("x", "a b"), {}),
    ("shared_memory_auto_remove", "bool", True, (True, False), {}),
    ("num_node_connections", "int", None, (1, 5), {0: "ended the process"}),
    ("max_batch_size", "int", 65536, (1, 65536, BIG), {0: "looped for ever"}),
    ("enable_tls", "bool", False, (True, False), {}),
    ("tls_ca_certificate", "text", "cacertbundle.crt", ("x",), {}),
    ("tls_client_certificate", "text", "client_cert.pem", ("x",), {}),
    ("tls_client_key", "text", "client_key.pem", ("x",), {}),
    ("tls_server_name_identification", "text", "redis.localhost", ("x",), {}),
    ("overflow_margin", "int", 2**64 - 1, (1, 10**9, 2**64 - 1, -1), {0: "no row would stay"}),
    ("overflow_policy", "text", "evict_random", ("random", "oldest", "evict_least_used"), {"lru": "was evict_random"}),
    ("overflow_resolution_target", "float", 0.8, (0.1, 0.8, 1, 1.0), {0: "every row would leave", 1.5: "ended the process"}),
    ("initialize_after_startup", "bool", True, (True, False), {}),
    ("initial_cache_rate", "float", 1.0, (0, 0.5, 1), {2: "more than the table"}),
    ("cache_missed_embeddings", "bool", False, (True, False), {}),
    ("update_filters", "list", None, ([], ["^hps_.+$"], [".*", "x"]), {}),
]
PERSISTENT: list[Row] = [
    ("type", "text", "disabled", ("disabled", "none", "rocks_db", "rocksdb", "rocks"), {"hash_map": "ended the process"}),
    ("path", "text", None, ("/tmp/rocksdb", "x"), {}),
    ("num_threads", "int", 16, (1, 16, 5000, BIG), {}),
    ("read_only", "bool", False, (True, False), {}),
    ("max_batch_size", "int", 65536, (1, 65536, BIG), {0: "looped for ever"}),
    ("initialize_after_startup", "bool", True, (True, False), {}),
    ("update_filters", "list", None, ([], [".+"]), {}),
]
SOURCE: list[Row] = [
    ("type", "text", "null", ("null", "none", "kafka", "kafka_mq", "kafka_message_queue"), {"redis": "was null"}),
    ("brokers", "text", "127.0.0.1:9092", ("a:1", "a:1,b:2", "a:1;b:2;"), {}),
    ("metadata_refresh_interval_ms", "int", 30000, (10, 30000, HUGE), {9: "ended the process"}),
    ("receive_buffer_size", "int", 262144, (1024, 262144, HUGE), {1023: "ended the process"}),
    ("poll_timeout_ms", "int", 500, (1, 500, BIG - 1), {0: "ended the process", BIG: "ended the process"}),
    ("max_batch_size", "int", 8192, (1, 8192, BIG), {0: "ended the process"}),
    ("failure_backoff_ms", "int", 50, (0, 50, HUGE), {}),
    ("max_commit_interval", "int", 32, (1, 32, BIG), {0: "ended the process"}),
]
SERVER: list[Row] = [
    ("supportlonglong", "bool", None, (True, False), {1: "an exception of C++"}),
    ("fuse_embedding_table", "bool", False, (True, False), {}),
]
TABLE: dict[str, tuple[type[Any], list[Row]]] = {
    "": (ServerConfig, SERVER),
    "models.0.": (ModelConfig, MODEL),
    "volatile_db.": (VolatileDatabaseConfig, VOLATILE),
    "persistent_db.": (PersistentDatabaseConfig, PERSISTENT),
    "update_source.": (UpdateSourceConfig, SOURCE),
}
EVERY_KEY = [(prefix, row) for prefix, (_, rows) in TABLE.items() for row in rows]
every_key = pytest.mark.parametrize(("prefix", "row"), EVERY_KEY, ids=[prefix + row[0] for prefix, row in EVERY_KEY])
OURS = {"require_gpu", "cache_on_cpu", "models", "volatile_db", "persistent_db", "tiers", "update_source", "update_sources"}
NEW_OF_A_SOURCE = {"name", "start", "max_backlog_bytes", "on_loss", "refuse_not_finite", "batch_interval_ms"}
NEW_OF_A_MODEL = {"cache_policy", "cache_size_bytes", "cache_row_dtype", "output_dtype", "miss_path", "time_budget_ms"}
BASE = changed(MINIMAL, "models.0.embedding_vecsize_per_table", [16])


def config_with(prefix: str, key: str, value: Any) -> dict[str, Any]:
    config = changed(BASE, prefix + key, value)
    if prefix == "volatile_db." and key != "type":
        config["volatile_db"] |= {"type": "redis" if key == "num_node_connections" else "hash_map"}
        config["volatile_db"].setdefault("num_partitions", 16)
    return config


def test_the_table_has_every_key_of_the_original() -> None:
    for prefix, (section, rows) in TABLE.items():
        known = set(section.model_fields) - (OURS if prefix == "" else NEW_OF_A_MODEL | NEW_OF_A_SOURCE)
        assert {row[0] for row in rows} == known, prefix


@every_key
def test_values_that_the_original_took_are_read(prefix: str, row: Row) -> None:
    key, _, _, taken, _ = row
    for value in taken:
        read_config(config_with(prefix, key, value))


@every_key
def test_values_that_are_refused_on_purpose_name_the_key(prefix: str, row: Row) -> None:
    key, _, _, _, exceptions = row
    for value, reason in exceptions.items():
        with pytest.raises(ConfigError) as caught:
            read_config(config_with(prefix, key, value))
        assert str(caught.value).startswith(dotted(prefix + key)), reason


@every_key
def test_every_key_of_the_original_reads_its_value_as_text(prefix: str, row: Row) -> None:
    """Numbers and booleans as text are what templates and environment variables leave in a file."""
    key, kind, _, taken, _ = row
    for value in taken:
        if (kind in ("bool", "int", "float") and not isinstance(value, bool)) or kind == "bool":
            as_text = read_config(config_with(prefix, key, str(value)))
            assert as_text == read_config(config_with(prefix, key, value))


@every_key
def test_the_default_of_every_key_is_that_of_the_original(prefix: str, row: Row) -> None:
    """None stands for a default that depends on the machine or on other keys, or that decisions.md changed."""
    key, _, default, _, _ = row
    if default is None or (prefix == "models.0." and key in ("model",)):
        return
    config = config_with(prefix, key, None)
    place = config["models"][0] if prefix == "models.0." else config if not prefix else config[prefix[:-1]]
    del place[key]
    found = value_at(read_config(config), prefix + key)
    if key == "fuse_embedding_table" and prefix:
        default = False  # of the whole file, which is off
    assert found == (tuple(default) if isinstance(default, list) else default)
