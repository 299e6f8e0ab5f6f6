"""The folder of an open log goes, moves or is replaced: nothing is acknowledged that nobody finds again. And odd paths."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of
from support.tiers import DIM, TAG, fetch

from hps_numba.errors import ConfigError, HpsError, TierError, TierUnavailable
from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = np.arange(100)
MORE = np.arange(100, 200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture(params=["always", "never"])
def tier(folder: Path, request: pytest.FixtureRequest) -> Iterator[RowLogTier]:
    opened = RowLogTier.from_options(path=str(folder), sync=request.param)
    opened.insert(TAG, KEYS, rows_of(KEYS, DIM))
    yield opened
    opened.close()


def replaced(folder: Path) -> None:
    """By another log, which has a table of the same name."""
    folder.rename(folder.with_name("before"))
    other = RowLogTier.from_options(path=str(folder))
    other.insert(TAG, KEYS[:10], rows_of(KEYS[:10], DIM, 5))
    other.close()


def copied(folder: Path) -> None:
    """The same bytes in other files."""
    folder.rename(folder.with_name("before"))
    shutil.copytree(folder.with_name("before"), folder)


def as_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


CHANGES: dict[str, Callable[[Path], object]] = {
    "deleted": shutil.rmtree,
    "renamed": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "replaced": replaced,
    "copied": copied,
    "a file": as_a_file,
    "its table deleted": lambda folder: shutil.rmtree(folder / "table-000001"),
    "its table renamed": lambda folder: (folder / "table-000001").rename(folder / "table-x"),
    "its rows deleted": lambda folder: (folder / "table-000001" / "00000001.rows").unlink(),
    "its keys deleted": lambda folder: (folder / "table-000001" / "00000001.keys").unlink(),
    "its manifest deleted": lambda folder: (folder / "manifest.json").unlink(),
    "its lock deleted": lambda folder: (folder / "lock").unlink(),
}
WRITES: dict[str, Callable[[RowLogTier], object]] = {
    "insert": lambda tier: tier.insert(TAG, MORE, rows_of(MORE, DIM)),
    "erase": lambda tier: tier.erase(TAG, KEYS[:5]),
}


def content_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_files_that_nobody_finds_again_is_refused(tier: RowLogTier, folder: Path, change: str, write: str) -> None:
    CHANGES[change](folder)
    before = content_of(folder)
    for _ in range(3):
        with pytest.raises(TierError, match=str(folder)):
            WRITES[write](tier)
    assert content_of(folder) == before
    answer, rows = fetch(tier, TAG, KEYS)  # reads go on
    assert answer.found.all()
    assert_same_bits(rows, rows_of(KEYS, DIM))
    assert not tier.contains(TAG, MORE).any() and tier.size(TAG) == len(KEYS)


@pytest.mark.parametrize("change", ["deleted", "renamed", "replaced", "copied", "a file", "its lock deleted"])
@pytest.mark.parametrize(
    "write",
    [
        lambda tier: tier.insert("hps_et.m.other", KEYS, rows_of(KEYS, DIM)),
        lambda tier: tier.erase(TAG),
    ],
    ids=["a new table", "a table dropped"],
)
def test_tables_of_another_log_are_left_alone(tier: RowLogTier, folder: Path, change: str, write: Any) -> None:
    CHANGES[change](folder)
    before = content_of(folder)
    with pytest.raises(TierError, match=str(folder)):
        write(tier)
    assert content_of(folder) == before
    assert tier.tables() == [TAG]


def test_new_segments_truncate_no_file_of_another_log(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    tier, more = RowLogTier.from_options(path=str(folder), segment_bytes=4096), np.arange(2000)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    folder.rename(tmp_path / "before")
    other = RowLogTier.from_options(path=str(folder), segment_bytes=4096)
    other.insert(TAG, more, rows_of(more, DIM, 5))
    other.close()
    before = content_of(folder)
    with pytest.raises(TierError, match=str(folder)):
        tier.insert(TAG, more, rows_of(more, DIM))
    assert content_of(folder) == before
    tier.close()


def test_a_folder_that_comes_back_is_written_to_again(tier: RowLogTier, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(TierError):
        WRITES["insert"](tier)
    folder.with_name("elsewhere").rename(folder)
    assert WRITES["insert"](tier) == len(MORE)
    tier.close()
    again = RowLogTier.from_options(path=str(folder))
    answer, rows = fetch(again, TAG, np.concatenate([KEYS, MORE]))
    assert answer.found.all()
    assert_same_bits(rows, rows_of(np.concatenate([KEYS, MORE]), DIM))
    again.close()


def test_a_relative_path_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    tier, reader = RowLogTier.from_options(path="log", segment_bytes=4096), None
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    reader = RowLogTier.from_options(path="log", read_only=True)
    monkeypatch.chdir(tmp_path / "other")
    tier.insert(TAG, MORE, rows_of(MORE, DIM))
    tier.insert("hps_et.m.other", KEYS, rows_of(KEYS, DIM))
    both = np.concatenate([KEYS, MORE])
    for some in (tier, reader):
        answer, rows = fetch(some, TAG, both)
        assert answer.found.all() and some.size("hps_et.m.other") == len(KEYS)
        assert_same_bits(rows, rows_of(both, DIM))
        some.close()
    assert not list((tmp_path / "other").iterdir())


def a_loop(folder: Path) -> str:
    folder.symlink_to(folder)
    return str(folder)


def a_file(folder: Path) -> str:
    folder.write_text("")
    return str(folder)


def gone(folder: Path) -> str:
    """A relative path, in a working directory that was deleted."""
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    return "log"


ODD: dict[str, Callable[[Path], str]] = {
    "NUL": lambda folder: f"{folder}/a\0b",
    "a lone surrogate": lambda folder: f"{folder}/a\ud800b",
    "a name too long": lambda folder: f"{folder}/{'x' * 300}",
    "a path too long": lambda folder: f"{folder}/{'x/' * 4000}",
    "a loop": a_loop,
    "inside a loop": lambda folder: f"{a_loop(folder)}/log",
    "a file": a_file,
    "inside a file": lambda folder: f"{a_file(folder)}/log",
    "a device": lambda folder: "/dev/null",
    "empty": lambda folder: "",
    "a directory that is gone": gone,
}


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_a_path_that_cannot_be_a_folder_is_a_typed_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, read_only: bool
) -> None:
    monkeypatch.chdir(folder.parent)
    path = ODD[kind](folder)
    with pytest.raises(HpsError) as caught:
        RowLogTier.from_options(path=path, read_only=read_only).close()
    expected = ConfigError if "surrogate" in kind else TierUnavailable  # which no text of a config can hold
    assert isinstance(caught.value, expected), repr(caught.value)
