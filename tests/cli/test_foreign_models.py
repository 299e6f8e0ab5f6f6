"""``inspect`` and ``convert`` on files of others: what looks misread is said, and so is what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from hps_numba.cli import build
from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import convert_model, open_model, write_model

ROWS, DIM = 400, 8
RNG = np.random.default_rng(0)
KEYS: dict[str, np.ndarray] = {
    "ascending": np.arange(ROWS),
    "hashed": RNG.integers(-(2**63), 2**63 - 1, ROWS),
    "hashed and positive": RNG.integers(0, 2**63 - 1, ROWS),
    "with a slot above": (np.arange(ROWS) % 26 << 32) | RNG.integers(0, 2**31, ROWS),
    "small": RNG.integers(0, 50, ROWS),
}
VALUES: dict[str, np.ndarray] = {
    "normal": RNG.normal(size=(ROWS, DIM)).astype(np.float32),
    "small": RNG.normal(0, 1e-4, (ROWS, DIM)).astype(np.float32),
    "zeros": np.zeros((ROWS, DIM), np.float32),
    "ones": np.ones((ROWS, DIM), np.float32),
    "once float16": RNG.normal(size=(ROWS, DIM)).astype(np.float16).astype(np.float32),
    "whole numbers": RNG.integers(0, 1000, (ROWS, DIM)).astype(np.float32),
    "once bfloat16": (RNG.normal(size=(ROWS, DIM)).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32),
}


def hps(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def parsed(*arguments: object) -> Any:
    result = hps(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def directory(folder: Path, keys: np.ndarray, rows: np.ndarray, **more: np.ndarray) -> Path:
    path = folder / "table.model"
    path.mkdir()
    for name, array in {"key": keys, "emb_vector": rows, **more}.items():
        array.tofile(path / name)
    return path


def test_int32_keys_and_float16_rows_are_suspected(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    for keys in (np.arange(ROWS), RNG.integers(0, 10**6, ROWS), RNG.permutation(2**31 - 1 - np.arange(ROWS))):
        path = directory(tmp_path, keys.astype(np.int32), VALUES["normal"])
        (warning,) = parsed("inspect", path)["warnings"]
        assert "int32 keys" in warning and warning in " ".join(hps("inspect", path).stdout.split())
        path.rename(tmp_path / "keys" / str(keys[0]))
    for scale in (1e-2, 1, 30):
        path = directory(tmp_path, KEYS["hashed"], (VALUES["normal"] * scale).astype(np.float16))
        (warning,) = parsed("inspect", path)["warnings"]
        assert "float16 values" in warning
        path.rename(tmp_path / "keys" / f"values{scale}")


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_models_that_are_in_order_are_not_suspected(keys: np.ndarray, values: np.ndarray, tmp_path: Path) -> None:
    assert parsed("inspect", directory(tmp_path, keys, values))["warnings"] == []


@pytest.mark.parametrize(
    ("keys", "rows", "hint"),
    [
        (np.arange(ROWS), VALUES["normal"].astype(np.float16), "are these float16 rows?"),
        (np.arange(ROWS, dtype=np.int32), VALUES["normal"], "are the keys int32?"),
        (np.arange(ROWS + 1, dtype=np.int32), VALUES["normal"], "are these int32 keys?"),
    ],
)
def test_sizes_of_other_dtypes_are_named(keys: np.ndarray, rows: np.ndarray, hint: str, tmp_path: Path) -> None:
    path = directory(tmp_path, keys, rows)
    with pytest.raises(ModelFileError, match=f"{hint[:-1]}.$"):
        open_model(path, DIM)


def extras(folder: Path, kind: str) -> Path:
    """A model with two arrays more than it needs."""
    keys, rows, slots = KEYS["ascending"], VALUES["normal"], np.arange(ROWS)
    if kind == "directory":
        return directory(folder, keys, rows, slot_id=slots, a_note=slots)
    arrays = {"key": keys, "emb_vector": rows, "slot_id": slots, "a_note": slots}
    path = folder / f"table.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "npy":
        path.mkdir()
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    elif kind == "parquet":
        pq.write_table(pa.table({**arrays, "emb_vector": rows.tolist()}), path)
    else:
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    return path


@pytest.mark.parametrize("kind", ["directory", "npz", "npy", "h5", "parquet", "safetensors"])
def test_convert_says_what_it_drops(kind: str, tmp_path: Path) -> None:
    path = extras(tmp_path, kind)
    with open_model(path) as model:
        assert model.ignored == ("a_note", "slot_id")
    assert parsed("convert", path, tmp_path / "a.h5")["dropped"] == ["a_note", "slot_id"]
    result = hps("convert", path, tmp_path / "b")
    assert result.exit_code == 0 and "not copied: a_note, slot_id" in result.stderr
    shown = hps("inspect", path).stdout
    assert "a_note, slot_id" in shown and parsed("inspect", path)["ignored"] == ["a_note", "slot_id"]
    assert parsed("convert", tmp_path / "a.h5", tmp_path / "c")["dropped"] == []
    assert hps("convert", tmp_path / "a.h5", tmp_path / "d").stderr == ""


@pytest.mark.parametrize("kind", ["npz", "h5", "parquet", "safetensors"])
def test_what_is_there_is_named_where_an_array_is_missing(kind: str, tmp_path: Path) -> None:
    arrays = {"rows": VALUES["normal"], "ids": KEYS["ascending"]}
    path = tmp_path / f"table.{kind}"
    if kind == "npz":
        np.savez(path, **arrays)
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
    elif kind == "parquet":
        pq.write_table(pa.table({**arrays, "rows": arrays["rows"].tolist()}), path)
    else:
        pytest.importorskip("safetensors.numpy").save_file(arrays, path)
    with pytest.raises(ModelFileError, match=r"has no array 'key', found ids, rows$"):
        open_model(path)


def test_a_copy_into_the_model_itself_is_refused(tmp_path: Path) -> None:
    path = directory(tmp_path, KEYS["ascending"], VALUES["normal"])
    (tmp_path / "link").symlink_to(path)
    for target in (path / "copy.h5", path / "key", path / "meta", tmp_path / "link" / "copy.h5"):
        with pytest.raises(ModelFileError, match="expected a place outside the model to copy"):
            convert_model(path, target, overwrite=True)
    assert sorted(entry.name for entry in path.iterdir()) == ["emb_vector", "key"]
    write_model(tmp_path / "other", DIM, [(KEYS["ascending"], VALUES["normal"])])
