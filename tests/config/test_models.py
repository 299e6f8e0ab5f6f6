"""Checklist C10 to C20: databases, models, tables and their lists, as far as reading goes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL, TWO_MODELS, VOLATILE_DEFAULTS, changed, logged, refused, write

from hps_numba.config import TableSpec, read_config

# --- C11, C12: databases (which store is made: the server's tests) --------------------------------------------------


def test_c10_key_width_is_carried() -> None:
    assert read_config(changed(MINIMAL, "supportlonglong", False)).supportlonglong is False


def test_c11_absent_volatile_db_is_a_parallel_hash_map() -> None:
    config = read_config(MINIMAL)
    assert config.volatile_db.type == "parallel_hash_map"
    assert config.persistent_db.type == "disabled"
    assert config.update_source.type == "null"
    assert config.volatile_db.model_copy(update={"type": "disabled"}).model_dump(mode="json") == VOLATILE_DEFAULTS


def test_c12_volatile_db_without_type_is_disabled() -> None:
    assert read_config(changed(MINIMAL, "volatile_db", {})).volatile_db.type == "disabled"
    assert read_config(changed(MINIMAL, "volatile_db", {"num_partitions": 2})).volatile_db.type == "disabled"


# --- C13 to C17: models and tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "m\n", "x" * 121])
def test_c13_c14_bad_names_are_refused(name: str) -> None:
    assert refused(changed(MINIMAL, "models.0.model", name)).startswith("models[0].model: ")
    message = refused(changed(MINIMAL, "models.0.embedding_table_names", [name]))
    assert message.startswith("models[0].embedding_table_names[0]: ")
    assert "expected 1 to 120 of the characters A-Z a-z 0-9 _ -, got " in message


@pytest.mark.parametrize("name", ["m", "A-b_9", "-", "x" * 120])
def test_c13_c14_good_names_load(name: str) -> None:
    config = read_config(changed(changed(MINIMAL, "models.0.model", name), "models.0.embedding_table_names", [name]))
    assert config.tables()[0].tag == f"hps_et.{name}.{name}"


def test_c14_table_names_are_counted_from_zero() -> None:
    config = read_config(changed(TWO_MODELS, "models.1.embedding_table_names"))
    assert config.models[1].embedding_table_names == ("sparse_embedding0", "sparse_embedding1")
    assert [table.tag for table in config.tables()] == [
        "hps_et.demo_model.sparse_embedding0",
        "hps_et.demo_model2.sparse_embedding0",
        "hps_et.demo_model2.sparse_embedding1",
    ]


def test_c15_duplicates_are_refused() -> None:
    assert refused(changed(TWO_MODELS, "models.1.model", "demo_model")) == (
        "models[1].model: 'demo_model' is already models[0].model, expected each one once"
    )
    assert refused(changed(TWO_MODELS, "models.1.embedding_table_names", ["a", "a"])).startswith(
        "models[1].embedding_table_names[1]: 'a' is already models[1].embedding_table_names[0]"
    )
    assert refused(changed(TWO_MODELS, "models.0.deployed_device_list", [2, 0, 2]), strict=True).startswith(
        "models[0].deployed_device_list[2]: 2 is already models[0].deployed_device_list[0]"
    )
    assert read_config(changed(TWO_MODELS, "models.0.deployed_device_list", [5, 2])).models[0].deployed_device_list == (5, 2)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("embedding_vecsize_per_table", 4),
        ("maxnum_catfeature_query_per_table_per_sample", 2),
        ("default_value_for_each_table", 0.5),
        ("embedding_table_names", "t"),
        ("cache_policy", "lru"),
        ("cache_size_bytes", 4096),
        ("cache_row_dtype", "int8"),
    ],
)
def test_c16_list_lengths(key: str, value: Any, length: int) -> None:
    values = [f"t{i}" for i in range(length)] if value == "t" else [value] * length
    config = changed(TWO_MODELS, f"models.1.{key}", values)
    if key == "default_value_for_each_table" and length == 1:
        assert read_config(config).models[1].default_value_for_each_table == (0.5, 0.0)
    else:
        entries = "1 entry" if length == 1 else "3 entries"
        message = refused(config, strict=True)
        if length == 1 or key.startswith(("embedding_vecsize", "cache")):  # the others are cut, see test_leniency.py
            assert refused(config) == message
        assert message.startswith(f"models[1].{key}: expected 2 entries")
        assert f": expected 2 entries, as many as sparse_files, got {entries}: [" in message


def test_c17_short_default_values_are_continued_with_zero(caplog: pytest.LogCaptureFixture) -> None:
    config = read_config(changed(TWO_MODELS, "models.1.default_value_for_each_table", [2.5]))
    assert [table.default_value for table in config.tables()] == [1.0, 2.5, 0.0]
    assert logged(caplog, logging.WARNING) == ["models[1].default_value_for_each_table: [2.5] is continued with 1 x 0.0"]


# --- C18: several models, and what the rooms below see -----------------------------------------------------------------


def test_c18_models_are_independent() -> None:
    config = changed(TWO_MODELS, "models.1.max_batch_size", 8)
    config = changed(config, "models.1.deployed_device_list", [3, 1])
    config = changed(config, "models.1.cache_policy", ["lfu", "mine:Policy"])
    config = changed(config, "models.1.cache_size_bytes", [0, 2**20])
    config = changed(config, "models.1.cache_row_dtype", "fp16")
    first, second = (read_config(config)).models
    assert (first.max_batch_size, second.max_batch_size) == (16384, 8)
    assert (first.deployed_device_list, second.deployed_device_list) == ((0,), (3, 1))
    assert first.tables() == (
        TableSpec(
            model="demo_model",
            name="sparse_embedding0",
            dim=16,
            default_value=1.0,
            source=str(Path.cwd() / "demo_model_sparse_embedding0.model"),
            max_keys=163840,
            gpucacheper=1.0,
        ),
    )
    assert [
        (t.table_id, t.dim, t.max_keys, t.cache_policy, t.cache_size_bytes, t.cache_row_dtype) for t in second.tables()
    ] == [
        (0, 64, 24, "lfu", 0, "float16"),
        (1, 32, 40, "mine:Policy", 2**20, "float16"),
    ]


def test_c18_sources_are_looked_up_in_the_working_directory_then_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder, names in ((here, ["both", "here_only"]), (beside, ["both", "beside_only"])):
        folder.mkdir()
        for name in names:
            (folder / name).mkdir()
    monkeypatch.chdir(here)
    absolute = str(beside / "both")
    names = ["both", "here_only", "beside_only", "neither", absolute, "s3://bucket/t", "https://h/x", "n" * 300]
    config: dict[str, Any] = {"sparse_files": names, "model": "m"}
    for key in ("embedding_vecsize_per_table", "maxnum_catfeature_query_per_table_per_sample", "default_value_for_each_table"):
        config[key] = [1] * len(names)
    path = write(beside, json.dumps({"models": [config]}))
    assert [table.source for table in read_config(path).tables()] == [
        str(here / "both"),
        str(here / "here_only"),
        str(beside / "beside_only"),
        str(here / "neither"),
        absolute,
        "s3://bucket/t",
        "https://h/x",
        str(here / ("n" * 300)),
    ]
    assert read_config({"models": [config]}).tables()[2].source == str(here / "beside_only")
    assert read_config({"models": [config]}, beside=path).tables()[2].source == str(beside / "beside_only")


def test_c18_static_fusion_and_row_dtype(caplog: pytest.LogCaptureFixture) -> None:
    config = changed(TWO_MODELS, "fuse_embedding_table", True)
    config = changed(config, "models.0.fuse_embedding_table", False)
    config = changed(config, "models.0.use_static_table", True)
    config = changed(config, "models.0.fp8_quant", True)
    first, second = read_config(config).models
    assert (first.fuse_embedding_table, second.fuse_embedding_table) == (False, True)
    assert (first.embedding_cache_type, second.embedding_cache_type) == ("static", "dynamic")
    assert first.tables()[0].cache_row_dtype == "float8_e4m3"
    assert logged(caplog, logging.WARNING) == []


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        ({"fp8_quant": True}, "models[0].fp8_quant: true has no effect unless embedding_cache_type is static"),
        ({"enable_pagelock": True}, "models[0].enable_pagelock: true has no effect unless embedding_cache_type is static"),
        (
            {"use_static_table": True, "embedding_cache_type": "uvm"},
            "models[0].embedding_cache_type: 'uvm' gives way to use_static_table: static",
        ),
        (
            {"fuse_embedding_table": True},
            "models[0].fuse_embedding_table: true has no effect while it is off for the whole file",
        ),
    ],
)
def test_c18_settings_without_effect_are_warned_about(
    keys: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = read_config(changed(MINIMAL, "models.0", {**MINIMAL["models"][0], **keys})).models[0]
    assert logged(caplog, logging.WARNING) == [warning]
    assert model.tables()[0].cache_row_dtype == "float32"
    assert model.fuse_embedding_table is False


# --- C19, C20: keys that HugeCTR documents and does not honour ---------------------------------------------------


def test_c19_initialize_after_startup_is_read_for_both_databases() -> None:
    for section in ("volatile_db", "persistent_db"):
        config = read_config(changed(MINIMAL, f"{section}.initialize_after_startup", False))
        assert getattr(config, section).initialize_after_startup is False


def test_c20_initial_cache_rate_is_a_fraction() -> None:
    for rate in (0, 0.25, 1):
        assert read_config(changed(MINIMAL, "volatile_db.initial_cache_rate", rate)).volatile_db.initial_cache_rate == rate
    for rate in (-0.1, 1.1):
        assert "is not in 0..1" in refused(changed(MINIMAL, "volatile_db.initial_cache_rate", rate))
