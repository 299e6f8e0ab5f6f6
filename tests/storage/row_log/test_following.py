"""Openers that only read follow the writer: when it fails, when they fail, and while other threads of theirs look up."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.interrupts import interrupted_everywhere
from support.oracles import rows_of
from support.row_logs import READS
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import join_all

from hps_numba.errors import CapacityError, TierError
from hps_numba.storage.row_log import records, writing
from hps_numba.storage.row_log.index import RowIndex
from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = np.arange(300)
#: bytecodes between two that are interrupted
INTERRUPT_STEP = 1 if "HPS_NUMBA_EVERY_BYTE" in os.environ else 97


def open_log(folder: Path, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), **{"segment_bytes": 4096, "sync": "never", **keys})


def test_a_reader_forgets_rows_of_a_commit_that_failed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw the records before they were synced."""
    writer, reader = open_log(tmp_path, sync="always", segment_bytes=1 << 20), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    before = content_of(reader, TAG, 100)
    synced = []

    def fail_at_last(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            assert reader.size(TAG) == 350
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_sync_data", fail_at_last)
        with pytest.raises(TierError, match="Input/output error"):
            writer.insert(TAG, KEYS + 50, rows_of(KEYS + 50, DIM, 1))
    writer.insert(TAG, ints(1000), rows_of([1000], DIM))
    for tier in (writer, reader):
        assert content_of(tier, TAG, 100) == {**before, 1000: rows_of([1000], DIM)[0].tobytes()}
        tier.close()


@pytest.mark.parametrize("problem", [MemoryError("no memory"), CapacityError("full"), OSError(errno.EIO, "broken")])
def test_a_reader_that_fails_to_follow_finds_the_rows_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    assert reader.size(TAG) == len(KEYS)
    for erases in (False, True):
        if erases:
            writer.erase(TAG, KEYS[::2])
        writer.insert(TAG, KEYS[1::2] + 50, rows_of(KEYS[1::2] + 50, DIM, 1))  # into several segments
        with monkeypatch.context() as patched:
            if isinstance(problem, OSError):
                patched.setattr(records.os, "pread", _raise(problem, after=1))
            else:
                patched.setattr(RowIndex, "erase" if erases else "put", _raise(problem))
            with pytest.raises((type(problem), TierError)):
                reader.size(TAG)
        assert content_of(reader, TAG, 100) == content_of(writer, TAG, 100)
    for tier in (writer, reader):
        tier.close()


def _raise(problem: Exception, after: int = 0) -> Any:
    calls = iter(range(after))
    real = os.pread

    def call(*given: Any) -> Any:
        if next(calls, None) is None:
            raise problem
        return real(*given)

    return call


def test_a_reader_that_is_interrupted_anywhere_finds_the_rows_later(tmp_path: Path) -> None:
    """By Ctrl-C, while it follows inserts, erasures and compactions."""
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    fetch(reader, TAG, KEYS)
    interrupted = 0
    files = [f"row_log/{name}.py" for name in ("table", "records", "log")]
    for number, problem in enumerate(interrupted_everywhere(lambda: reader.size(TAG), *files, step=INTERRUPT_STEP)):
        interrupted += problem is not None
        answer, rows = fetch(reader, TAG, KEYS)
        expected, wanted = fetch(writer, TAG, KEYS)
        assert answer.failed is None and np.array_equal(answer.found, expected.found)
        assert np.array_equal(rows[answer.found], wanted[expected.found])
        some = KEYS[number % 7 :: 7]
        writer.insert(TAG, some, rows_of(some, DIM, number % 60))
        writer.erase(TAG, ints(number % 300))
        if number % 2:
            writer.compact(TAG)
    assert interrupted > 10
    for tier in (writer, reader):
        tier.close()


@pytest.mark.parametrize("reads", READS)
def test_keys_are_served_while_another_thread_of_a_reader_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """Once their new places are in the index, also in segments that were opened just now."""
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True, reads=reads)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    assert reader.size(TAG) == len(KEYS)
    table = reader._log.table(TAG)
    assert table is not None
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM, 1))
    put, seen = RowIndex.put, []

    def put_and_look(index: RowIndex, keys: np.ndarray, locations: np.ndarray) -> int:
        new = put(index, keys, locations)
        rows = np.empty((len(KEYS), DIM), np.float32)
        seen.append(table.fetch(KEYS, rows))  # as a thread that has the table already
        changed = rows[:, 0] != rows_of(KEYS, DIM)[:, 0]
        assert np.array_equal(rows, np.where(changed[:, None], rows_of(KEYS, DIM, 1), rows_of(KEYS, DIM)))
        assert changed[np.isin(KEYS, keys)].all()
        return new

    monkeypatch.setattr(RowIndex, "put", put_and_look)
    reader.size(TAG)
    assert len(seen) > 1 and all(found.all() and not failed for found, failed in seen)
    for tier in (writer, reader):
        tier.close()


def test_a_reader_that_opens_a_table_anew_serves_other_threads_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As records that it had read were cut, whose commit failed; and nothing of the old table is left behind."""
    writer, reader = open_log(tmp_path, sync="always", segment_bytes=1 << 20), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))

    def fail(descriptor: int) -> None:
        if reader.size(TAG) == 350:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_sync_data", fail)
        with pytest.raises(TierError, match="Input/output error"):
            writer.insert(TAG, KEYS + 50, rows_of(KEYS + 50, DIM, 1))
    old = reader._log._tables[TAG]
    put, seen = RowIndex.put, []

    def put_and_look(index: RowIndex, keys: np.ndarray, locations: np.ndarray) -> int:
        monkeypatch.undo()
        thread = threading.Thread(target=lambda: seen.append(reader._log._tables.get(TAG)))
        thread.start()
        join_all(thread)
        return put(index, keys, locations)

    monkeypatch.setattr(RowIndex, "put", put_and_look)
    assert content_of(reader, TAG, 100) == content_of(writer, TAG, 100)
    assert seen == [old] and reader._log._tables[TAG] is not old
    rows = np.empty((len(KEYS), DIM), np.float32)
    assert old.fetch(KEYS[:50], rows[:50])[0].all()  # a thread in the middle of a fetch
    assert np.array_equal(rows[:50], rows_of(KEYS[:50], DIM))
    gone = weakref.ref(old.index._store)
    seen.clear()
    del old
    gc.collect()
    assert gone() is None
    for tier in (writer, reader):
        tier.close()


def test_a_table_of_a_reader_that_is_not_open_yet_is_not_taken_for_none(tmp_path: Path) -> None:
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    assert reader.size(TAG) == len(KEYS)
    del reader._log._tables[TAG]  # the manifest, which is known, names it
    assert reader.size(TAG) == len(KEYS)
    assert reader.size("another") == 0
    for tier in (writer, reader):
        tier.close()


def test_a_table_that_is_dropped_ends_no_fetch_of_another_thread(tmp_path: Path) -> None:
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    for tier in (writer, reader):
        table = tier._log.table(TAG)
        assert table is not None
        writer.erase(TAG)
        assert tier.tables() == [] and not fetch(tier, TAG, KEYS)[0].found.any()
        rows = np.empty((len(KEYS), DIM), np.float32)
        assert table.fetch(KEYS, rows)[0].all() and np.array_equal(rows, rows_of(KEYS, DIM))  # begun before
        writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    for tier in (writer, reader):
        tier.close()


@pytest.mark.parametrize("step", ["_sync_data", "_write_all"])
def test_a_reader_takes_no_row_of_a_commit_over_several_segments_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, step: str
) -> None:
    """It looks when the rows are there, or the record in the first of the segments, and again after the failure."""
    writer, reader = open_log(tmp_path, sync="always"), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS[:100], rows_of(KEYS[:100], DIM))
    before = content_of(reader, TAG, 100)
    table = writer._log.table(TAG)
    assert table is not None
    count, real, looked = len(table.segments), getattr(writing, step), []
    keys = np.roll(KEYS, 20)  # new ones first, then some that were there

    def fail(descriptor: int, *given: Any) -> None:
        first = table.segments[count]
        in_second = len(table.segments) > count and descriptor == table.segments[count + 1].keys_fd
        if step == "_sync_data" or in_second:
            assert len(table.segments) > count + 1
            assert (os.fstat(first.keys_fd).st_size == first.ends.keys) == (step == "_sync_data")
            looked.append(reader.size(TAG))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, *given)

    with monkeypatch.context() as patched:
        patched.setattr(writing, step, fail)
        with pytest.raises(TierError, match="No space left on device"):
            writer.insert(TAG, keys, rows_of(keys, DIM, 1))
    assert (looked[0] == 100) == (step == "_sync_data")
    assert content_of(reader, TAG, 100) == before == content_of(writer, TAG, 100)
    assert not caplog.messages
    for tier in (writer, reader):
        tier.close()


def test_a_file_of_rows_that_was_cut_opens_a_table_anew_once(tmp_path: Path) -> None:
    writer, reader = open_log(tmp_path, segment_bytes=1 << 20), open_log(tmp_path, read_only=True, reads="threads")
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    first = reader._log.table(TAG)
    assert first is not None and not first.was_cut()
    os.truncate(tmp_path / "table-000001" / "00000001.rows", 512)
    assert first.was_cut()
    for stamp in range(2):
        writer.erase(TAG, ints(stamp))
        table = reader._log.table(TAG)
        assert table is not None and table is not first and not table.was_cut()
    assert table is reader._log.table(TAG)
    for tier in (writer, reader):
        tier.close()
