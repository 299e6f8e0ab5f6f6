"""``convert`` and ``inspect`` at URLs, for one of several tables, and with rows of fewer bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.producers import save_sok, save_tfra
from support.sample_models import sample
from support.url_stores import Store, memory_store
from typer.testing import CliRunner, Result

from hps_numba.cli import build

KEYS, ROWS, _ = sample(400, 8)


@pytest.fixture(autouse=True)
def store() -> Iterator[type[Store]]:
    with memory_store() as found:
        yield found


def hps(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def parsed(*arguments: object) -> Any:
    result = hps(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    save_sok(tmp_path / "dump", KEYS, ROWS, "user")
    save_sok(tmp_path / "dump", KEYS[:100], ROWS[:100], "item")
    return tmp_path / "dump"


def test_to_a_url_and_back(dump: Path, tmp_path: Path) -> None:
    made = parsed("convert", f"{dump}#user", "memory://bucket/user.model")
    assert made["path"] == "memory://bucket/user.model" and made["bytes"] == KEYS.nbytes + ROWS.nbytes
    seen = parsed("inspect", "memory://bucket/user.model")
    assert (seen["path"], seen["format"], seen["rows"]) == ("memory://bucket/user.model", "directory", 400)
    assert parsed("convert", "memory://bucket/user.model", tmp_path / "back.h5")["rows"] == 400
    again = hps("convert", f"{dump}#user", "memory://bucket/user.model")
    assert again.exit_code == 1 and "exists already; pass --overwrite" in again.stderr


def test_a_table_of_a_dump(dump: Path) -> None:
    seen = parsed("inspect", f"{dump}#item")
    assert (seen["path"], seen["format"], seen["rows"]) == (f"{dump}#item", "sok", 100)
    result = hps("inspect", dump)
    assert result.exit_code == 1 and "found item, user" in result.stderr


def test_rounding_says_what_is_lost(dump: Path, tmp_path: Path) -> None:
    made = parsed("convert", f"{dump}#user", tmp_path / "half", "--dtype", "float16")
    expected = float(np.abs(ROWS.astype(np.float16).astype(np.float64) - ROWS).max())
    assert (made["dtype"], made["largest_error"]) == ("float16", expected)
    shown = hps("convert", f"{dump}#user", tmp_path / "int8", "--dtype", "int8").stdout
    assert "rounded to int8: the largest error of a value is 0.0" in shown
    assert parsed("inspect", tmp_path / "int8")["row_dtype"] == "int8"
    assert "400 x 8 float16" in hps("inspect", tmp_path / "half").stdout
    assert "rounded" not in hps("convert", f"{dump}#user", tmp_path / "whole").stdout
    result = hps("convert", f"{dump}#user", tmp_path / "x", "--dtype", "float8")
    assert result.exit_code == 1 and "dtype: expected one of float32, float16, bfloat16, int8" in result.stderr


def test_other_dtypes_are_suspected_in_dumps(tmp_path: Path) -> None:
    normal = np.random.default_rng(0).normal(size=(400, 8))
    save_tfra(tmp_path / "halves", KEYS, normal.astype(np.float16), "t")
    (warning,) = parsed("inspect", tmp_path / "halves")["warnings"]
    assert "float16 values" in warning
    save_tfra(tmp_path / "ints", np.arange(400, dtype=np.int32), normal.astype(np.float32), "t")
    (warning,) = parsed("inspect", tmp_path / "ints")["warnings"]
    assert "int32 keys" in warning


def test_credentials_are_not_shown(tmp_path: Path) -> None:
    for arguments in (("inspect", "memory://me:secret@b/a"), ("convert", "memory://me:secret@b/a", tmp_path / "x")):
        result = hps(*arguments)
        assert result.exit_code == 1 and "memory://b/a: no such file or directory" in result.stderr
        assert "secret" not in result.output
