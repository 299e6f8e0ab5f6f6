"""Files that are cut at any byte, or have a bit that changed at any byte: never a wrong row, and nothing is lost in silence."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.row_logs import READS
from support.tiers import DIM, TAG, content_of, fetch, ints

from hps_numba.errors import TierError
from hps_numba.storage.tiers.row_log import RowLogTier

History = dict[int, list[bytes | None]]
KEYS = np.arange(12)
#: bytes between two that are damaged; odd, so that each byte of a word has its turn
EVERY_BYTE = "HPS_NUMBA_EVERY_BYTE" in os.environ
STEP_OF_KEYS, STEP_OF_ROWS = (1, 1) if EVERY_BYTE else (11, 37)


def open_log(folder: Path, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), **{"reads": "threads", "segment_bytes": 4096, "sync": "never", **keys})


def write_history(folder: Path) -> History:
    """A table with inserts, updates and erasures, and all that each key ever was, the last state last."""
    history: History = {int(key): [None] for key in KEYS}

    def insert(keys: list[int], stamp: int) -> None:
        rows = rows_of(keys, DIM, stamp)
        tier.insert(TAG, ints(*keys), rows)
        for key, row in zip(keys, rows, strict=True):
            history[key].append(row.tobytes())

    tier = open_log(folder)
    insert([0, 1, 2, 3, 4, 5, 6, 7], 0)
    insert([2], 1)
    insert([3, 8], 2)
    assert tier.erase(TAG, ints(1, 2)) == 2
    for key in (1, 2):
        history[key].append(None)
    insert([9, 1], 3)
    insert([10], 4)
    tier.close()
    return history


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, History]:
    folder = tmp_path / "whole"
    return folder, write_history(folder)


@pytest.fixture
def copies(whole: tuple[Path, History], tmp_path: Path) -> Iterator[Path]:
    """A folder for a copy of the whole one."""
    yield tmp_path / "copy"


def file_of(folder: Path, ending: str) -> Path:
    (found,) = folder.glob(f"table-*/*.{ending}") if ending != "json" else folder.glob("manifest.json")
    return found


def answers(tier: RowLogTier) -> dict[int, bytes | TierError | None]:
    """What is found for each key, asked for alone."""
    found: dict[int, bytes | TierError | None] = {}
    for key in KEYS:
        answer, rows = fetch(tier, TAG, ints(int(key)))
        found[int(key)] = rows[0].tobytes() if answer.found[0] else None
        if answer.failed is not None:
            assert answer.failed.tolist() == [True] and not answer.found[0]
            (problem,) = here_damaged(tier, int(key))
            found[int(key)] = TierError(problem)
    return found


def here_damaged(tier: RowLogTier, key: int) -> list[str]:
    """What is wrong with the row of a key, as the log says it once."""
    table = tier._log.table(TAG)
    assert table is not None
    return list(table.fetch(ints(key), np.empty((1, DIM), np.float32))[1].values())


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_bit_that_flipped_in_a_row_is_named_and_other_keys_are_served(
    whole: tuple[Path, History], copies: Path, reads: str, read_only: bool
) -> None:
    folder, history = whole
    size = file_of(folder, "rows").stat().st_size
    steps = range(0, size, STEP_OF_ROWS)
    damaged = 0
    shutil.copytree(folder, copies)
    path = file_of(copies, "rows")
    content = path.read_bytes()
    tier = open_log(copies, reads=reads, read_only=read_only)
    for at in steps:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << at % 8]))
        found = answers(tier)
        wrong = {key: problem for key, problem in found.items() if isinstance(problem, TierError)}
        assert len(wrong) <= 1
        for key, problem in wrong.items():
            assert f"{path}: offset" in str(problem) and f"key {key}" in str(problem)
            offset = int(str(problem).partition("offset ")[2].partition(":")[0])
            assert offset <= at < offset + 32
        assert {key: row for key, row in found.items() if key not in wrong} == {
            key: states[-1] for key, states in history.items() if key not in wrong
        }
        damaged += len(wrong)
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1])
    tier.close()
    live = sum(states[-1] is not None for states in history.values())
    assert damaged == live * 32 if STEP_OF_ROWS == 1 else damaged > 2


@pytest.mark.parametrize("read_only", [False, True])
def test_a_bit_that_flipped_in_a_key_file_loses_nothing(
    whole: tuple[Path, History], copies: Path, read_only: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the last record for the writer; a reader leaves that to a writer."""
    folder, history = whole
    content = file_of(folder, "keys").read_bytes()
    last = len(content) - 8 * 7  # the last record: a header and one key
    expected = {key: states[-1] for key, states in history.items()}
    for at in [*range(0, len(content), STEP_OF_KEYS), len(content) - 1]:
        shutil.copytree(folder, copies)
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        file_of(copies, "keys").write_bytes(changed)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tier = open_log(copies, read_only=read_only)
        found = answers(tier)
        tier.close()
        if read_only and at >= last:
            assert found == {**expected, 10: None}
        else:
            assert found == expected, f"byte {at}"
        if at < last or not read_only:
            second_copy_of_erasure = not caplog.messages
            assert second_copy_of_erasure or str(file_of(copies, "keys")) in caplog.text
        if not read_only:
            tier = open_log(copies)
            assert content_of(tier, TAG) == {key: row for key, row in expected.items() if row is not None}
            assert tier.insert(TAG, ints(11), rows_of([11], DIM)) == 1
            tier.close()
        shutil.rmtree(copies)


@pytest.mark.parametrize("ending", ["rows", "keys"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_file_cut_at_any_byte_gives_no_wrong_row(
    whole: tuple[Path, History], copies: Path, ending: str, read_only: bool
) -> None:
    """Cut rows are errors. What only cut records knew, the erasures, is undone; rows that are whole are found all the same."""
    folder, history = whole
    content = file_of(folder, ending).read_bytes()
    for size in range(0, len(content), STEP_OF_KEYS if ending == "keys" else STEP_OF_ROWS):
        shutil.copytree(folder, copies)
        file_of(copies, ending).write_bytes(content[:size])
        tier = open_log(copies, read_only=read_only)
        for key, row in answers(tier).items():
            if isinstance(row, TierError):
                assert ending == "rows" and str(file_of(copies, "rows")) in str(row)
            elif ending == "rows":
                assert row == history[key][-1]
            else:
                assert row in history[key]
                assert read_only or row is not None or history[key][-1] is None, f"{size}: key {key} is lost"
        if not read_only:  # and it goes on from there
            assert tier.insert(TAG, ints(11, 0), rows_of([11, 0], DIM, 9)) in (1, 2)
            tier.close()
            tier = open_log(copies)
            answer, rows = fetch(tier, TAG, ints(11, 0))
            assert answer.found.all() and np.array_equal(rows, rows_of([11, 0], DIM, 9))
        tier.close()
        shutil.rmtree(copies)


def test_a_damaged_manifest_is_named(whole: tuple[Path, History], copies: Path) -> None:
    folder, _ = whole
    content = file_of(folder, "json").read_bytes()
    damages = [content[:size] for size in range(0, len(content), 31)]
    damages += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(0, len(content), 31)]
    shutil.copytree(folder, copies)
    for damaged in damages:
        file_of(copies, "json").write_bytes(damaged)
        with pytest.raises(TierError, match=r"manifest\.json: expected the manifest of a row_log"):
            open_log(copies)
    file_of(copies, "json").write_bytes(content)
    open_log(copies).close()


@pytest.mark.parametrize("read_only", [False, True])
def test_a_missing_manifest_is_an_error_and_deletes_nothing(whole: tuple[Path, History], read_only: bool) -> None:
    folder, history = whole
    path = file_of(folder, "json")
    content = path.read_bytes()
    reader = open_log(folder, read_only=True)
    path.unlink()
    for call in (lambda: open_log(folder, read_only=read_only), lambda: reader.contains(TAG, ints(1)), reader.tables):
        with pytest.raises(TierError, match=r"manifest\.json: expected the manifest of table-000001 .* got no file"):
            call()
    path.write_bytes(content)
    assert answers(reader) == {key: states[-1] for key, states in history.items()}
    reader.close()
    tier = open_log(folder, read_only=read_only)
    assert answers(tier) == {key: states[-1] for key, states in history.items()}
    tier.close()


def test_an_older_manifest_deletes_nothing_that_it_does_not_know(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = open_log(tmp_path)
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    older = file_of(tmp_path, "json").read_bytes()
    many = np.arange(300)
    tier.insert(TAG, many, rows_of(many, DIM, 1))
    tier.insert("another", ints(1), rows_of([1], DIM, 2))
    with tier._log._change():
        tier._log._add_segment(tier._log._tables[TAG])  # with no row yet
    expected = {name: content_of(tier, name) for name in (TAG, "another")}
    tier.close()
    newest = file_of(tmp_path, "json").read_bytes()
    unknown = [path for path in tmp_path.glob("table-000001/*") if int(path.stem) > 1]
    contents = {path: path.read_bytes() for path in [*unknown, *tmp_path.glob("table-000002/*")]}
    assert len(unknown) > 2
    file_of(tmp_path, "json").write_bytes(older)
    for stamp in (3, 4):  # it is usable, and goes on with the same numbers
        tier = open_log(tmp_path)
        tier.insert("a third", many, rows_of(many, DIM, stamp))
        tier.insert(TAG, many, rows_of(many, DIM, stamp))
        tier.close()
    assert str(unknown[0]) in caplog.text and "table-000002" in caplog.text
    for path, content in contents.items():
        parts = [f"{part}.unknown-1" if part == "table-000002" or part == path.name else part for part in path.parts]
        aside = Path(*parts) if path in unknown else Path(*parts).with_name(path.name)
        assert aside.read_bytes() == content
    shutil.rmtree(tmp_path / "table-000002")  # and may be put back
    (tmp_path / "table-000002.unknown-1").rename(tmp_path / "table-000002")
    for path in tmp_path.glob("table-000001/*.unknown-1"):
        path.rename(path.with_name(path.name.removesuffix(".unknown-1")))
    file_of(tmp_path, "json").write_bytes(newest)
    tier = open_log(tmp_path)
    assert content_of(tier, "another") == expected["another"] and tier.size(TAG) == len(expected[TAG])
    tier.close()


def test_what_a_drop_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    tier = open_log(tmp_path)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    shutil.copytree(tmp_path / "table-000001", tmp_path / "kept")
    tier.erase(TAG)
    tier.close()
    (tmp_path / "kept").rename(tmp_path / "table-000001")
    (tmp_path / "table-000002").mkdir()
    (tmp_path / "table-000002" / "00000001.rows").touch()  # made, and the manifest never said so
    tier = open_log(tmp_path)
    assert not (tmp_path / "table-000001").exists()
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM, 1))
    assert [path.name for path in tmp_path.glob("table-*")] == ["table-000002"]
    (tmp_path / "table-000002" / "00000002.keys").touch()  # a crash again
    tier.close()
    tier = open_log(tmp_path)
    many = np.arange(300)
    tier.insert(TAG, many, rows_of(many, DIM))
    assert len(content_of(tier, TAG, 100)) == 300
    assert not list(tmp_path.glob("**/*.unknown-*"))
    tier.close()


@pytest.mark.parametrize("ending", ["rows", "keys"])
def test_a_missing_file_is_named(whole: tuple[Path, History], ending: str) -> None:
    folder, _ = whole
    file_of(folder, ending).unlink()
    with pytest.raises(TierError, match=rf"0001\.{ending}: cannot be opened: No such file"):
        open_log(folder)


def test_records_that_cannot_be_rebuilt_are_an_error(whole: tuple[Path, History]) -> None:
    folder, _ = whole
    content = bytearray(file_of(folder, "keys").read_bytes())
    content[0] ^= 1  # of the first record
    content[8 * 14] ^= 1  # of the second
    file_of(folder, "keys").write_bytes(content)
    with pytest.raises(TierError, match=r"\.keys: offset 0: expected record 0, got a damaged one"):
        open_log(folder)


@pytest.mark.parametrize("reads", READS)
def test_a_damaged_row_costs_its_own_key_only(
    whole: tuple[Path, History], reads: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder, history = whole
    path = file_of(folder, "rows")
    content = bytearray(path.read_bytes())
    content[20] ^= 1  # key 0
    path.write_bytes(content)
    tier = open_log(folder, reads=reads, max_batch_size=3)
    keys = np.concatenate([KEYS, ints(10**6, 0)])
    for _ in range(2):
        answer, rows = fetch(tier, TAG, keys)
        assert answer.failed is not None and np.array_equal(answer.failed, keys == 0)
        expected = [history[int(key)][-1] if key in KEYS and key != 0 else None for key in keys]
        assert [row.tobytes() if found else None for row, found in zip(rows, answer.found, strict=True)] == expected
        assert np.isnan(rows[~answer.found]).all()
    assert caplog.text.count("the row of key 0 is damaged: its checksum does not match") == 1  # said once
    assert f"{TAG}: {path}: offset 0" in caplog.text
    with pytest.raises(TierError, match="the row of key 0 is damaged"):
        list(tier.scan(TAG))
    tier.close()


def test_a_compaction_keeps_a_segment_with_a_damaged_row(whole: tuple[Path, History], caplog: pytest.LogCaptureFixture) -> None:
    folder, history = whole
    path = file_of(folder, "rows")
    content = bytearray(path.read_bytes())
    content[20] ^= 1  # key 0
    path.write_bytes(content)
    tier = open_log(folder)
    with caplog.at_level(logging.WARNING):
        tier.compact(TAG)
    assert f"{path}: 1 rows are damaged: the segment is kept" in caplog.text
    found = answers(tier)
    assert isinstance(found.pop(0), TierError)
    assert found == {key: states[-1] for key, states in history.items() if key != 0}
    assert tier.insert(TAG, ints(0), rows_of([0], DIM, 5)) == 0  # written again, it is whole
    assert np.array_equal(fetch(tier, TAG, ints(0))[1], rows_of([0], DIM, 5))
    tier.close()
