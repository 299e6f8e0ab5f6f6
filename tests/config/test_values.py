"""Checklist C06 to C09: the type, range and spelling of single values.

That every numeric key has limits, and that they are those of the JSON schema, is in test_config_schema.py.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL, changed, logged, refused, write

from hps_numba.config import read_config
from hps_numba.config.enums import CACHE_TYPES, DATABASES, OVERFLOW_POLICIES, ROW_DTYPES, UPDATE_SOURCES, Words

NAN, INFINITY = float("nan"), float("inf")
COUNT = "in 1..2147483647"
WRONG_TYPES = [
    ("supportlonglong", 1, "expected true or false, got 1"),
    ("supportlonglong", "true", "expected true or false, got 'true'"),
    ("models", {}, "expected a list, each entry an object, got {}"),
    ("models", [], "expected at least 1 entry, got []"),
    ("models.0", None, "expected an object, got null"),
    ("models.0.model", [], "expected a string, got []"),
    ("models.0.sparse_files", "m0.model", "expected a list, each entry a string, got 'm0.model'"),
    ("models.0.sparse_files", [], "expected at least 1 entry, got []"),
    ("models.0.default_value_for_each_table", [], "expected at least 1 entry, got []"),
    ("models.0.embedding_table_names", [], "expected at least 1 entry, got []"),
    ("models.0.embedding_vecsize_per_table.0", None, "expected an integer in 1..65536, got null"),
    ("models.0.max_batch_size", None, f"expected an integer {COUNT}, got null"),
    ("models.0.max_batch_size", "64", f"expected an integer {COUNT}, got '64'"),
    ("models.0.max_batch_size", [64], f"expected an integer {COUNT}, got [64]"),
    ("models.0.gpucacheper", {}, "expected a number in 0..1, got {}"),
    ("models.0.cache_policy", None, "expected a string, got null"),
    ("models.0.cache_policy", [], "expected at least 1 entry, got []"),
    ("volatile_db", None, "expected an object, got null"),
    ("volatile_db", [], "expected an object, got []"),
    ("volatile_db.password", 5, "expected a string, got (hidden)"),
    ("volatile_db.update_filters", ".+", "expected a list, each entry a string, got '.+'"),
    ("persistent_db.type", None, "expected a string, got null"),
    ("update_source.type", None, "expected a string, got null"),
]
OUT_OF_RANGE = [
    ("models.0.gpucacheper", 1.4, "1.4 is not in 0..1"),
    ("models.0.gpucacheper", -0.1, "-0.1 is not in 0..1"),
    ("models.0.gpucacheper", NAN, "expected a number in 0..1, got NaN"),
    ("models.0.gpucacheper", True, "expected a number in 0..1, got true"),
    ("models.0.max_batch_size", 0, f"0 is not {COUNT}"),
    ("models.0.max_batch_size", True, f"expected an integer {COUNT}, got true"),
    ("models.0.max_batch_size", 64.0, f"expected an integer {COUNT}, got 64.0"),
    ("models.0.embedding_vecsize_per_table.0", 0, "0 is not in 1..65536"),
    ("models.0.deployed_device_list.0", -1, "-1 is not in 0..1023"),
    ("models.0.refresh_interval", INFINITY, "expected a number in 0..31536000, got Infinity"),
    ("models.0.cache_size_bytes", -1, "-1 is not in 0..1125899906842624"),
    ("models.0.default_value_for_each_table.0", 1e39, "1e+39 is not in -3.4028235e+38..3.4028235e+38"),
    ("volatile_db.num_partitions", 0, "0 is not in 1..65536"),
    ("volatile_db.overflow_resolution_target", 0, "0 is not in 0..1 without 0"),
    ("volatile_db.overflow_resolution_target", 1.1, "1.1 is not in 0..1 without 0"),
    ("volatile_db.overflow_margin", 2**64, "18446744073709551616 is not in 1..18446744073709551615"),
    ("persistent_db.num_threads", -1, "-1 is not in 1..1024"),
    ("update_source.metadata_refresh_interval_ms", 9, "9 is not in 10..3600000"),
    ("update_source.receive_buffer_size", 1023, "1023 is not in 1024..999998976"),
    ("update_source.poll_timeout_ms", 0, "0 is not in 1..2147483646"),
]


READ_WITH_A_WARNING: list[tuple[str, Any]] = [
    ("supportlonglong", "true"),
    ("models.0.max_batch_size", "64"),
    ("models.0.max_batch_size", True),
    ("models.0.max_batch_size", 64.0),
    ("models.0.gpucacheper", True),
]
"""Of the above, what is refused by ``strict=True`` only; test_leniency.py says as what it is read."""


def dotted(path: str) -> str:
    return path.replace(".0", "[0]")


@pytest.mark.parametrize(("path", "value", "reason"), WRONG_TYPES)
def test_c06_wrong_types_name_the_key(path: str, value: Any, reason: str) -> None:
    config = changed(MINIMAL, path, value)
    assert refused(config, strict=True) == f"{dotted(path)}: {reason}"
    if (path, value) not in READ_WITH_A_WARNING:
        assert refused(config) == f"{dotted(path)}: {reason}"


def test_c06_one_wrong_entry_of_a_list_a_table() -> None:
    config = changed(MINIMAL, "models.0.cache_size_bytes", [-1])
    assert refused(config) == "models[0].cache_size_bytes[0]: -1 is not in 0..1125899906842624"


@pytest.mark.parametrize(("path", "value", "reason"), OUT_OF_RANGE)
def test_c07_ranges_name_the_key(path: str, value: Any, reason: str) -> None:
    config = changed(MINIMAL, path, value)
    assert refused(config, strict=True) == f"{dotted(path)}: {reason}"
    if (path, value) not in READ_WITH_A_WARNING:
        assert refused(config) == f"{dotted(path)}: {reason}"


def test_c07_an_integer_is_fine_for_a_float_and_nan_in_a_file_is_named(tmp_path: Path) -> None:
    assert read_config(changed(MINIMAL, "models.0.refresh_delay", 2)).models[0].refresh_delay == 2.0
    assert read_config(changed(MINIMAL, "models.0.refresh_interval", 0.5)).models[0].refresh_interval == 0.5
    path = write(tmp_path, json.dumps(changed(MINIMAL, "models.0.gpucacheper", float("nan"))))
    assert refused(path) == f"models[0].gpucacheper: expected a number in 0..1, got NaN (in {path})"


@pytest.mark.parametrize("limit", [-1.0, 0, 1.1, 100])
def test_c07_hit_rate_threshold_beyond_0_and_1_has_a_meaning(limit: float) -> None:
    assert read_config(changed(MINIMAL, "models.0.hit_rate_threshold", limit)).models[0].hit_rate_threshold == limit


@pytest.mark.parametrize("address", ["a:0", "a:65536", "a:b", "", "a b", "a:1,,b:2", "::1"])
def test_c07_addresses_are_checked(address: str) -> None:
    assert refused(changed(MINIMAL, "volatile_db.address", address)).startswith("volatile_db.address: ")
    assert refused(changed(MINIMAL, "update_source.brokers", address)).startswith("update_source.brokers: ")


@pytest.mark.parametrize("address", ["redis", "10.0.0.1:7000", "a:1, b:2;c", "[::1]:7000", "PLAINTEXT://k:9092"])
def test_c07_addresses_of_several_nodes_are_kept_verbatim(address: str) -> None:
    assert read_config(changed(MINIMAL, "volatile_db.address", address)).volatile_db.address == address


def test_c07_update_filters_are_regular_expressions() -> None:
    for bad in ("(", "a{99999999999999999999}", "x" * 5000):
        assert refused(changed(MINIMAL, "volatile_db.update_filters", ["a", bad])).startswith("volatile_db.update_filters[1]: ")
    config = read_config(changed(MINIMAL, "persistent_db.update_filters", ["[[a]", "^m$"]))
    assert config.persistent_db.update_filters == ("[[a]", "^m$")
    assert read_config(changed(MINIMAL, "volatile_db.update_filters", [])).volatile_db.update_filters == ()


def test_c07_limits_between_keys() -> None:
    config = changed(MINIMAL, "volatile_db", {"type": "hash_map", "allocation_rate": 63})
    assert refused(config) == "volatile_db.allocation_rate: 63 is less than the 64 bytes of a row of models[0]"
    assert read_config(changed(config, "volatile_db.allocation_rate", 64)).volatile_db.allocation_rate == 64
    config = changed(MINIMAL, "volatile_db", {"type": "redis", "num_partitions": 4, "num_node_connections": 5})
    assert refused(config) == "volatile_db.num_node_connections: 5 is more than volatile_db.num_partitions, 4"
    assert read_config(changed(config, "volatile_db.type", "hash_map")).volatile_db.num_node_connections == 5
    assert read_config(changed(config, "volatile_db.num_node_connections")).volatile_db.num_node_connections == 4


def test_c07_a_redis_batch_beyond_its_limit_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    read_config(changed(MINIMAL, "volatile_db", {"type": "redis", "max_batch_size": 262144}))
    assert logged(caplog, logging.WARNING) == ["volatile_db.max_batch_size: 262144 is more than a Redis takes at once, 262143"]


# --- C08, C09: words ----------------------------------------------------------------------------------------------------

PLACES: list[tuple[str, Words, set[str]]] = [
    ("volatile_db.type", DATABASES, {"rocks_db"}),
    ("persistent_db.type", DATABASES, set(DATABASES) - {"rocks_db", "disabled"}),
    ("volatile_db.overflow_policy", OVERFLOW_POLICIES, set()),
    ("update_source.type", UPDATE_SOURCES, set()),
    ("models.0.embedding_cache_type", CACHE_TYPES, {"stochastic"}),
    ("models.0.cache_row_dtype", ROW_DTYPES, set()),
    ("models.0.output_dtype", ROW_DTYPES, {"int8", "float8_e4m3"}),
    ("models.0.miss_path", {"auto": (), "direct": (), "staged": ()}, set()),
]
every_place = pytest.mark.parametrize(("path", "words", "refused_words"), PLACES, ids=[path for path, _, _ in PLACES])


def spellings(words: Words, refused_words: set[str]) -> dict[str, str]:
    """Every spelling that is accepted -> the word it stands for."""
    accepted = {word: aliases for word, aliases in words.items() if word not in refused_words}
    return {spelling: word for word, aliases in accepted.items() for spelling in (word, *aliases)}


@every_place
def test_c08_every_spelling_is_read_as_its_canonical_word(path: str, words: Words, refused_words: set[str]) -> None:
    for spelling, word in spellings(words, refused_words).items():
        found: Any = read_config(changed(MINIMAL, path, spelling)).to_dict()
        for part in path.split("."):
            found = found[int(part) if part.isdigit() else part]
        assert found == word


@every_place
@pytest.mark.parametrize("wrong", ["", "Hash_Map", "hash-map", "DYNAMIC", "evict", "x" * 10_000], ids=lambda text: text[:10])
def test_c09_unknown_words_are_refused(path: str, words: Words, refused_words: set[str], wrong: str) -> None:
    message = refused(changed(MINIMAL, path, wrong))
    assert message.startswith(f"{dotted(path)}: expected one of ")
    assert f", got {wrong[:60]!r}" in message
    assert all(spelling in message for spelling in spellings(words, refused_words))
    assert len(message) < 600


def test_c08_the_spellings_of_hugectr() -> None:
    """HugeCTR's alias table, copied here so that the code's table cannot drift."""
    assert DATABASES == {
        "disabled": ("disable", "none"),
        "hash_map": ("hashmap", "hash", "map"),
        "parallel_hash_map": ("parallel_hashmap", "parallel_hash", "parallel_map"),
        "multi_process_hash_map": ("multi_process_hashmap", "multi_process_hash", "multi_process_map"),
        "redis_cluster": ("redis",),
        "rocks_db": ("rocksdb", "rocks"),
    }
    assert UPDATE_SOURCES == {"null": ("none",), "kafka_message_queue": ("kafka_mq", "kafka")}
    assert OVERFLOW_POLICIES == {
        "evict_random": ("random",),
        "evict_least_used": ("least_used",),
        "evict_oldest": ("oldest",),
    }


def test_c09_words_that_are_known_but_wrong_here() -> None:
    assert refused(changed(MINIMAL, "models.0.embedding_cache_type", "stochastic")) == (
        "models[0].embedding_cache_type: expected dynamic (stochastic never had an implementation), got 'stochastic'"
    )
    assert "expected a database in memory here and rocks_db in persistent_db.type, got 'rocks'" in refused(
        changed(MINIMAL, "volatile_db.type", "rocks")
    )
    assert "expected rocks_db, disabled or module:NAME for one of your own, got 'redis'" in refused(
        changed(MINIMAL, "persistent_db.type", "redis")
    )
    assert "did you mean 'hashmap'?" in refused(changed(MINIMAL, "volatile_db.type", "hashmapp"))


@pytest.mark.parametrize("path", ["volatile_db.type", "persistent_db.type", "models.0.cache_policy"])
def test_c09_references_to_ones_own_plugins(path: str) -> None:
    for reference in ("mine:Tier", "my.tiers.fast:Tier_2", "folder/my tier.py:Tier", "/a/b.py:PLUGIN"):
        read_config(changed(MINIMAL, path, reference))
    for wrong in (":", "mine:", ":Tier", "a b:Tier", "a.py:T:U", "mine:a.b"):
        assert "module:NAME" in refused(changed(MINIMAL, path, wrong))
