"""Checklist C01 to C05 and C22: files, dicts, which keys there are, and how errors read."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.configs import MINIMAL, TWO_MODELS, changed, logged, refused, write

from hps_numba.config import ServerConfig, read_config
from hps_numba.errors import ConfigError, HpsError

# --- C01, C02: where a config comes from -------------------------------------------------------------------------------


def test_c01_minimal_file_loads(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps(MINIMAL))
    for source in (path, str(path)):
        config = read_config(source)
        assert config.models[0].model == "m"
        assert config.models[0].embedding_vecsize_per_table == (16,)
        assert config.source == path
        assert config.folder == tmp_path
        assert config.identity == str(path.resolve())


@pytest.mark.parametrize("bad", ["absent.json", "", "a\0b.json", "x" * 5000])
def test_c01_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(bad)
    assert "expected a JSON file" in message
    assert len(message) < 500


def test_c01_missing_file_names_the_path_and_is_a_typed_error(tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    with pytest.raises(HpsError, match=re.escape(str(path))) as caught:
        read_config(path)
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.problems == (str(caught.value),)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('{"models": [}', 1, 13),
        ('{\n "supportlonglong": true,\n "models" []}', 3, 11),
        ('{\n /* two\n lines */ "models" []}', 3, 20),
        ("", 1, 1),
        (b'{"models":\n \xff}', 2, 2),
    ],
)
def test_c01_bad_json_names_file_line_and_column(tmp_path: Path, text: str | bytes, line: int, column: int) -> None:
    path = write(tmp_path, text)
    assert refused(path).startswith(f"{path}, line {line}, column {column}: ")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"models":' * 100_000, f'{{"models": {"9" * 5000}}}', "[" * 50 + "]" * 50])
def test_c01_hostile_json_is_a_config_error(tmp_path: Path, text: str) -> None:
    assert "expected" in refused(write(tmp_path, text))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_c01_byte_order_marks_are_fine(tmp_path: Path, encoding: str) -> None:
    assert read_config(write(tmp_path, json.dumps(MINIMAL).encode(encoding))) == read_config(MINIMAL)


def test_c01_a_key_given_twice_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = json.dumps(MINIMAL).replace('"gpucacheper": 1.0', '"gpucacheper": 0.5, "gpucacheper": 0.25')
    assert read_config(write(tmp_path, text)).models[0].gpucacheper == 0.25
    assert any("'gpucacheper' comes 2 times" in line for line in logged(caplog, logging.WARNING))


def test_c02_dict_gives_the_same_as_the_file(tmp_path: Path) -> None:
    for sample in (MINIMAL, TWO_MODELS):
        from_dict = read_config(sample)
        assert from_dict == read_config(write(tmp_path, json.dumps(sample)))
        assert from_dict.source is None
        assert from_dict.folder is None
        assert read_config(from_dict) is from_dict


def test_c02_round_trip(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, json.dumps(TWO_MODELS)))
    again = read_config(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)
    assert read_config(json.loads(config.to_json())) == config
    assert again.identity == read_config(config.to_dict()).identity
    assert config != read_config(MINIMAL)
    assert pickle.loads(pickle.dumps(config)).source == config.source


def test_c02_identity_of_a_dict_ignores_order_and_spelling() -> None:
    turned = changed(dict(reversed(TWO_MODELS.items())), "volatile_db.type", "hashmap")
    assert read_config(turned).identity == read_config(TWO_MODELS).identity
    assert read_config(changed(TWO_MODELS, "volatile_db.num_partitions", 5)).identity != read_config(TWO_MODELS).identity


def test_c02_a_dict_may_hold_paths_tuples_and_numpy_values(tmp_path: Path) -> None:
    config = changed(MINIMAL, "models.0.sparse_files", (tmp_path / "t",))
    config = changed(config, "models.0.embedding_vecsize_per_table", np.array([16]))
    config = changed(config, "models.0.gpucacheper", np.float64(0.5))
    model = read_config(config).models[0]
    assert (model.sparse_files, model.embedding_vecsize_per_table, model.gpucacheper) == ((str(tmp_path / "t"),), (16,), 0.5)


@pytest.mark.parametrize("source", [3, None, b"ps.json", object(), {3: 4}, {"models": {1: 2}}])
def test_c02_other_sources_are_refused(source: Any) -> None:
    message = refused(source)
    assert re.match(r"config: expected a path, a mapping, .*, got |\w+: key \d+ is not a string", message), message


def test_c02_a_dict_that_contains_itself_is_refused() -> None:
    config = copy.deepcopy(MINIMAL)
    config["volatile_db"] = config
    assert "deep" in refused(config)


def test_models_are_frozen() -> None:
    config = read_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.models[0].gpucacheper = 0.5


# --- C03, C04, C05: which keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "models",
        "models.0.model",
        "models.0.sparse_files",
        "models.0.embedding_vecsize_per_table",
        "models.0.maxnum_catfeature_query_per_table_per_sample",
        "models.0.default_value_for_each_table",
    ],
)
def test_c03_hard_keys(key: str) -> None:
    message = refused(changed(MINIMAL, key), strict=True)
    if not key.startswith(("models.0.maxnum", "models.0.default")):  # those have a default, see test_leniency.py
        assert refused(changed(MINIMAL, key)) == message
    assert message.startswith(f"{key.replace('.0', '[0]')}: missing, expected ")


def test_c03_keys_that_are_soft_by_decision() -> None:
    assert read_config(changed(MINIMAL, "supportlonglong")).supportlonglong is True
    assert read_config(changed(MINIMAL, "models.0.deployed_device_list")).models[0].deployed_device_list == ()
    assert read_config(changed(MINIMAL, "models.0.deployed_device_list", [])).models[0].deployed_device_list == ()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("models.0.gpucachepr", "did you mean 'gpucacheper'?"),
        ("peristent_db", "did you mean 'persistent_db'?"),
        ("volatile_db.adress", "did you mean 'address'?"),
        ("models.0.cache_size_percentage", "in a file it is called 'gpucacheper'"),
        ("gpucache", "it belongs to models[i]"),
        ("models.0.supportlonglong", "it belongs to the top level"),
    ],
)
def test_c05_unknown_keys_are_warned_about_or_refused(path: str, hint: str, caplog: pytest.LogCaptureFixture) -> None:
    config = changed(TWO_MODELS, path, 1)
    dotted = path.replace(".0", "[0]")
    assert read_config(config) == read_config(TWO_MODELS)
    (line,) = logged(caplog, logging.WARNING)
    assert line.startswith(f"{dotted}: unknown key")
    assert line.endswith(hint)
    assert refused(config, strict=True) == line


def test_c05_every_unknown_key_is_warned_about_even_if_the_config_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    config = changed(changed(MINIMAL, "models.0.sparse_files"), "models.0.sparse_file", ["a"])
    assert refused(config).startswith("models[0].sparse_files: missing")
    assert logged(caplog, logging.WARNING) == ["models[0].sparse_file: unknown key, did you mean 'sparse_files'?"]


def test_c05_documented_keys_that_were_never_read_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hps_numba.config")
    unread = {"dense_file": "", "network_file": "x.json", "label_dim": 1, "slot_num": 10, "use_mixed_precision": False}
    unread |= {"scaler": 1.0, "use_algorithm_search": True, "use_cuda_graph": True, "device_id": 0}
    config = changed(MINIMAL, "models.0", {**MINIMAL["models"][0], **unread, "maxnum_des_feature_per_sample": 26})
    assert read_config(config, strict=True) == read_config(MINIMAL)
    assert logged(caplog, logging.WARNING) == []
    accepted = [line.partition(":")[0] for line in logged(caplog, logging.INFO) if "accepted, but without effect" in line]
    assert sorted(accepted) == sorted(f"models[0].{key}" for key in [*unread, "maxnum_des_feature_per_sample"])


# --- C22: comments ----------------------------------------------------------------------------------------------------


def test_c22_comments_are_tolerated_but_not_inside_strings(tmp_path: Path) -> None:
    text = """// the first line
    {"supportlonglong": true, // keys are "int64"
     /* a block with "quotes", // slashes
        and { two lines */
     "models": [{"model": "m", "sparse_files": ["s3://bucket//m0 /* no */ \\" // no"],
       "embedding_vecsize_per_table": [16], /**/ "maxnum_catfeature_query_per_table_per_sample": [10],
       "default_value_for_each_table": [0.0]}]} // the end"""
    assert read_config(write(tmp_path, text)).models[0].sparse_files == ('s3://bucket//m0 /* no */ " // no',)
    assert "line 1, column 1" in refused(write(tmp_path, "/* never closed"))


# --- how errors read ---------------------------------------------------------------------------------------------------


def test_many_problems_are_listed_and_the_first_one_leads(tmp_path: Path) -> None:
    config = changed(changed(TWO_MODELS, "models.1.gpucacheper", 1.4), "models.0.max_batch_size", -1)
    path = write(tmp_path, json.dumps(changed(config, "persistent_db.read_only", "no")))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    problems = (
        "models[0].max_batch_size: -1 is not in 1..2147483647",
        "models[1].gpucacheper: 1.4 is not in 0..1",
        "persistent_db.read_only: expected true or false, got 'no'",
    )
    assert str(caught.value).splitlines() == [
        f"{problems[0]} (in {path})",
        "and 2 more:",
        *(f"  {line}" for line in problems[1:]),
    ]
    assert caught.value.problems == problems
    assert pickle.loads(pickle.dumps(caught.value)).problems == problems


def test_a_flood_of_problems_stays_readable() -> None:
    config = changed(MINIMAL, "models.0.embedding_vecsize_per_table", [0] * 5000)
    with pytest.raises(ConfigError) as caught:
        read_config(config)
    assert len(caught.value.problems) == 5000
    assert len(str(caught.value).splitlines()) == 13
    assert str(caught.value).endswith("... 4989 not shown")


STRANGE = {
    "text": "x" * 10**6,
    "list": ["y" * 100] * 1000,
    "object": {"k" * 500: 1},
    "deep": {"a": [[[[1]]]]},
    "integer": 2**20000,
    "unicode": "\ud800\n\0",
    "instance": object(),
    "bytes": b"raw",
    "set": {1, 2},
}


@pytest.mark.parametrize("value", STRANGE.values(), ids=STRANGE)
def test_huge_and_strange_values_are_shortened(value: Any) -> None:
    message = refused(changed(MINIMAL, "models.0.max_batch_size", value))
    assert message.startswith("models[0].max_batch_size: ")
    assert len(message) < 500
    assert message.isprintable()


def test_passwords_are_never_shown() -> None:
    for wrong in ({"password": ["s3cret"]}, [{"password": "s3cret"}]):
        assert "s3cret" not in refused(changed(MINIMAL, "volatile_db", wrong))
    assert "s3cret" not in repr(read_config(changed(MINIMAL, "volatile_db", {"password": "s3cret"})))


def test_strange_keys_are_quoted(caplog: pytest.LogCaptureFixture) -> None:
    read_config({**MINIMAL, "a.b\n": 1, "k" * 100: 2})
    first, second = logged(caplog, logging.WARNING)
    assert first == "['a.b\\n']: unknown key"
    assert second.startswith("['kkk")
    assert len(second) < 150


def test_package_exports() -> None:
    import hps_numba.config as room

    for name in room.__all__:
        assert getattr(room, name) is not None
    assert isinstance(read_config(MINIMAL), ServerConfig)
    with pytest.raises(AttributeError, match="nothing"):
        _ = room.nothing
