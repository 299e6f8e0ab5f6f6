"""Paths as callers give them: whatever cannot name a file is one typed error, everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ModelFileError, TraceError
from hps_numba.runtime.paths import checked_path, is_free
from hps_numba.storage.bin_dump import read_bin, write_bin
from hps_numba.storage.model_files import convert_model, open_model, write_model
from hps_numba.training.checkpoint_files import write_checkpoint
from hps_numba.training.checkpoints import load_trained, save_trained


class Named:
    """A path of somebody's own."""

    def __init__(self, name: Any) -> None:
        self.name = name

    def __fspath__(self) -> Any:
        if isinstance(self.name, Exception):
            raise self.name
        return self.name


class Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


BAD: dict[str, Any] = {
    "none": None,
    "int": 5,
    "descriptor": True,
    "list": ["a"],
    "bytes": b"a",
    "empty": "",
    "nul": "a\0b.npz",
    "nul in a path": Path("a\0b"),
    "path of bytes": Named(b"a"),
    "path of nothing": Named(None),
    "path that raises": Named(ZeroDivisionError("mine")),
    "path that is empty": Named(""),
    "surrogate": "a\ud800b",
    "no repr": Unprintable(),
}
a_bad_path = pytest.mark.parametrize("path", BAD.values(), ids=BAD)
ROWS = [(np.arange(3), np.ones((3, 2), np.float32))]


@a_bad_path
def test_what_names_no_file_is_a_typed_error(path: Any) -> None:
    with pytest.raises(ModelFileError, match=r"^path: expected "):
        checked_path(path)
    with pytest.raises(TraceError, match=r"^trace: expected "):
        checked_path(path, "trace", error=TraceError)


def test_what_names_a_file_becomes_a_path(tmp_path: Path) -> None:
    for good in ("a", Path("a"), Named("a"), Named("a/"), "./a"):
        assert checked_path(good) == Path("a")
    assert os.fsencode(checked_path(os.fsdecode(b"\xff"))) == b"\xff"  # a name of bytes that are no text


CALLS: dict[str, Callable[[Any], object]] = {
    "open_model": open_model,
    "write_model": lambda path: write_model(path, 2, ROWS),
    "write_model over": lambda path: write_model(path, 2, ROWS, overwrite=True, format="hdf5"),
    "read_bin": read_bin,
    "write_bin": lambda path: write_bin(path, 8, 2, ROWS, overwrite=True),
    "save_trained": lambda path: save_trained(path, []),
    "load_trained": lambda path: load_trained(path, []),
}


@a_bad_path
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_functions_that_take_a_path_say_so(
    call: Callable[[Any], object], path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelFileError, match=r"path: expected "):
        call(path)
    assert list(tmp_path.iterdir()) == []


@a_bad_path
def test_convert_checks_both_paths(path: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "m", 2, ROWS)
    with pytest.raises(ModelFileError, match="expected "):
        convert_model(path, tmp_path / "n")
    with pytest.raises(ModelFileError, match="expected "):
        convert_model(tmp_path / "m", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


LONG = {"name": "a" * 300, "path": "a/" * 3000, "through a file": "file/a", "through nothing": "none/a"}


@pytest.mark.parametrize("name", LONG.values(), ids=LONG)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_names_that_the_system_refuses(call: Callable[[Any], object], name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelFileError):
        call(tmp_path / name)
    with pytest.raises(ModelFileError):
        write_checkpoint(tmp_path / name, [], {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_name_is_free_if_nothing_has_it_and_it_could_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert is_free(tmp_path / "new") and is_free(tmp_path / "new" / "below")
    assert not any(is_free(tmp_path / name) for name in ("file", "link", "file/below", "x" * 300))
