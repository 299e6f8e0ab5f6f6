"""What is written for Triton, read back with Triton's own description of a config.pbtxt."""

from __future__ import annotations

import ast
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dense_programs import save_scores
from support.factories import Workshop

from hps_numba import HPS
from hps_numba.config import ServerConfig, read_config
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.frontends.triton.repository import RepositoryOptions, write_repository

KEYS = np.arange(9)


@pytest.fixture
def config(workshop: Workshop) -> ServerConfig:
    first = workshop.model((KEYS, 4), (KEYS, 8), embedding_table_names=["user", "item-id"])
    workshop.open_file(first, workshop.model((KEYS, 3), name="other")).close()
    return read_config(workshop.folder / "ps.json")


def written(config: ServerConfig, folder: Path, **options: Any) -> dict[str, Any]:
    """The configs of the models by name, as Triton reads them."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    description = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    names = write_repository(config, folder, RepositoryOptions(**options))
    texts = {name: (folder / name / "config.pbtxt").read_text() for name in names}
    return {name: text_format.Parse(text, description.ModelConfig()) for name, text in texts.items()}


def tensors(of: Any) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.dims) for tensor in of}


def test_a_model_for_each_model(config: ServerConfig, tmp_path: Path) -> None:
    made = written(config, tmp_path / "repository")
    assert list(made) == ["m", "other"]
    for name, one in made.items():
        assert (one.name, one.backend, one.max_batch_size) == (name, "python", 0)
        assert [(group.count, group.kind) for group in one.instance_group] == [(1, type(one.instance_group[0]).KIND_CPU)]
        parameters = {key: value.string_value for key, value in one.parameters.items()}
        assert parameters == {"ps": str(config.source), "model": name}
        program = (tmp_path / "repository" / name / "1" / "model.py").read_text()
        assert len(program.splitlines()) == 3
        (statement,) = [node for node in ast.parse(program).body if isinstance(node, ast.ImportFrom)]
        assert (statement.module, statement.names[0].name) == ("hps_numba.frontends.triton.model", "TritonPythonModel")


def test_both_protocols(config: ServerConfig, tmp_path: Path) -> None:
    one = written(config, tmp_path / "repository", models=("m",))["m"]
    assert tensors(one.input) == {
        "KEYS": (-1, -1),
        "NUMKEYS": (-1, -1),
        "user": (-1,),
        "user.offsets": (-1,),
        "user.weights": (-1,),
        "item-id": (-1,),
        "item-id.offsets": (-1,),
        "item-id.weights": (-1,),
    }
    assert tensors(one.output) == {"OUTPUT0": (-1, -1), "user": (-1, 4), "item-id": (-1, 8)}
    assert all(tensor.optional for tensor in one.input)
    types = {tensor.name: type(one.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type for tensor in one.input}
    kinds = {tensor.name: types[tensor.name].values_by_number[tensor.data_type].name for tensor in one.input}
    assert kinds["KEYS"] == kinds["user"] == kinds["user.offsets"] == "TYPE_INT64"
    assert (kinds["NUMKEYS"], kinds["user.weights"]) == ("TYPE_INT32", "TYPE_FP32")


def test_dimensions_of_keys(config: ServerConfig, tmp_path: Path) -> None:
    one = written(config, tmp_path / "a", models=("m",), key_dimensions=2)["m"]
    assert tensors(one.input) == {"KEYS": (-1, -1), "NUMKEYS": (-1, -1), "user": (-1, -1), "item-id": (-1, -1)}
    assert tensors(one.output)["user"] == (-1, -1, 4)
    one = written(config, tmp_path / "b", models=("m",), max_batch_size=64)["m"]
    assert one.max_batch_size == 64
    assert tensors(one.input) == {"KEYS": (-1,), "NUMKEYS": (-1,), "user": (-1,), "item-id": (-1,)}
    assert tensors(one.output) == {"OUTPUT0": (-1,), "user": (-1, 4), "item-id": (-1, 8)}


def test_the_flat_protocol_alone(config: ServerConfig, tmp_path: Path) -> None:
    one = written(config, tmp_path / "repository", models=("m",), flat_only=True)["m"]
    assert tensors(one.input) == {"KEYS": (-1, -1), "NUMKEYS": (-1, -1)}
    assert tensors(one.output) == {"OUTPUT0": (-1, -1)}
    assert not any(tensor.optional for tensor in one.input)
    with pytest.raises(ConfigError, match=r"^flat_only: expected false with dense"):
        RepositoryOptions(flat_only=True, dense={"m": tmp_path / "x.pt2"})


def test_options_become_parameters(config: ServerConfig, tmp_path: Path) -> None:
    options = {"refresh_interval": 2.5, "refresh_delay": 0.0, "freeze_sparse": True, "allow_code": True}
    one = written(config, tmp_path / "repository", models=("m",), **options)["m"]
    given = {key: value.string_value for key, value in one.parameters.items()}
    assert {key: given[key] for key in options} == {
        "refresh_interval": "2.5",
        "refresh_delay": "0",
        "freeze_sparse": "true",
        "allow_code": "true",
    }


def test_names_of_files_are_quoted(workshop: Workshop, tmp_path: Path) -> None:
    folder = tmp_path / 'an "odd" \\ näme'
    folder.mkdir()
    workshop.open_file(workshop.model((KEYS, 4))).close()
    path = (workshop.folder / "ps.json").rename(folder / "ps.json")
    one = written(read_config(path), tmp_path / "repository")["m"]
    assert one.parameters["ps"].string_value == str(path)


def test_instances_without_shared_rows_are_a_warning(
    workshop: Workshop, config: ServerConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = written(config, tmp_path / "a", models=("m",), instances=3)["m"]
    assert one.instance_group[0].count == 3
    assert "each of the 3 processes has rows of its own" in caplog.text
    caplog.clear()
    shared = {"type": "multi_process_hash_map"}
    path = tmp_path / "shared.json"
    path.write_text(json.dumps({**config.to_dict(), "volatile_db": shared}))
    with caplog.at_level(logging.WARNING):
        written(read_config(path), tmp_path / "b", instances=3)
    assert "processes" not in caplog.text


def test_what_is_there_stays_unless_it_may_be_replaced(config: ServerConfig, tmp_path: Path) -> None:
    options = RepositoryOptions(models=("m",))
    write_repository(config, tmp_path, options)
    model = tmp_path / "m" / "config.pbtxt"
    model.write_text("mine")
    with pytest.raises(ConfigError, match=r"m: expected no such folder, got one; pass overwrite=True to replace it$"):
        write_repository(config, tmp_path, RepositoryOptions())
    assert model.read_text() == "mine" and not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match=r"m: expected a model that hps-numba wrote, but config.pbtxt is a file, but not"):
        write_repository(config, tmp_path, RepositoryOptions(overwrite=True))
    assert model.read_text() == "mine" and not (tmp_path / "other").exists()
    model.unlink()
    with pytest.raises(ConfigError, match=r"m: expected a model that hps-numba wrote, but config.pbtxt is missing"):
        write_repository(config, tmp_path, RepositoryOptions(overwrite=True))
    shutil.rmtree(tmp_path / "m")
    write_repository(config, tmp_path, options)
    written = model.read_bytes()
    model.write_bytes(written + b"\n# changed by hand\n")
    write_repository(config, tmp_path, RepositoryOptions(overwrite=True))
    assert model.read_bytes() == written and (tmp_path / "other" / "1" / "model.py").exists()
    assert not list(tmp_path.rglob("*.new"))


def test_what_does_not_fit_is_named(workshop: Workshop, config: ServerConfig, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"^model: expected one of m, other, got 'x'$"):
        write_repository(config, tmp_path, RepositoryOptions(models=("x",)))
    with pytest.raises(ConfigError, match=r"^config: expected one that was read from a file"):
        write_repository(read_config(config.to_dict()), tmp_path, RepositoryOptions())
    with pytest.raises(ConfigError, match=r"^instances: expected 1 to 1024, got 0$"):
        RepositoryOptions(instances=0)
    with pytest.raises(ConfigError, match=r"^key_dimensions: expected 1 with max_batch_size"):
        RepositoryOptions(max_batch_size=4, key_dimensions=2)
    path = tmp_path / "keys.json"
    reserved = config.to_dict()
    reserved["models"][1]["embedding_table_names"] = ["KEYS"]
    path.write_text(json.dumps(reserved))
    with pytest.raises(ConfigError, match=r"^other: table 'KEYS': expected another name"):
        write_repository(read_config(path), tmp_path / "repository", RepositoryOptions())


# -- ensembles ---------------------------------------------------------------------


def test_an_ensemble(config: ServerConfig, tmp_path: Path) -> None:
    program = save_scores(tmp_path / "scores.pt2", user=(2, 4), item_id=(8,), dense=(3,))
    made = written(config, tmp_path / "repository", models=("m",), dense={"m": program})
    assert list(made) == ["m", "m_dense", "m_scores"]
    tables, dense, scores = made.values()
    assert tensors(tables.input)["user"] == (-1, 2) and "user.offsets" not in tensors(tables.input)
    assert tensors(tables.input)["item-id"] == (-1,)
    assert tensors(dense.input) == {"user": (-1, 2, 4), "item_id": (-1, 8), "dense": (-1, 3)}
    assert tensors(dense.output) == {"OUTPUT0": (-1, 1)}
    assert tensors(scores.input) == {
        "user": (-1, 2),
        "item-id": (-1,),
        "item-id.offsets": (-1,),
        "item-id.weights": (-1,),
        "dense": (-1, 3),
    }
    assert [tensor.name for tensor in scores.input if tensor.optional] == ["item-id.offsets", "item-id.weights"]
    steps = scores.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["m", "m_dense"]
    assert dict(steps[0].output_map) == {"user": "user.rows", "item-id": "item-id.rows"}
    assert dict(steps[1].input_map) == {"user": "user.rows", "item_id": "item-id.rows", "dense": "dense"}
    assert (tmp_path / "repository" / "m_dense" / "1" / "model.pt2").read_bytes() == program.read_bytes()
    assert (tmp_path / "repository" / "m_scores" / "1").is_dir()


def test_an_ensemble_that_batches(config: ServerConfig, tmp_path: Path) -> None:
    program = save_scores(tmp_path / "scores.pt2", user=(2, 4), dense=(3,))
    made = written(config, tmp_path / "repository", models=("m",), dense={"m": program}, max_batch_size=16)
    assert [one.max_batch_size for one in made.values()] == [16, 16, 16]
    assert tensors(made["m"].input)["user"] == (2,)
    assert tensors(made["m_dense"].input) == {"user": (2, 4), "dense": (3,)}
    assert tensors(made["m_scores"].input) == {"user": (2,), "dense": (3,)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense": (3,)}, r"^dense: expected an argument with the name of a table \(user, item-id\), got dense$"),
        ({"user": (2, 5)}, r"^dense: argument user: expected FP32 rows \[..., 4\] of table user, got FP32 \[-1, 2, 5\]$"),
    ],
)
def test_a_program_that_does_not_fit(config: ServerConfig, tmp_path: Path, arguments: Any, message: str) -> None:
    program = save_scores(tmp_path / "scores.pt2", **arguments)
    with pytest.raises(ConfigError, match=message):
        write_repository(config, tmp_path / "repository", RepositoryOptions(dense={"m": program}))
    assert not (tmp_path / "repository").exists()


def test_a_written_model_is_one_that_loads(config: ServerConfig, tmp_path: Path) -> None:
    write_repository(config, tmp_path, RepositoryOptions())
    text = (tmp_path / "m" / "config.pbtxt").read_text()
    path = text.split('key: "ps" value { string_value: "')[1].split('"')[0]
    with HPS(path) as server:
        assert server.models == ("m", "other")
