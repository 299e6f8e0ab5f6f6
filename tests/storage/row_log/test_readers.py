"""Openers that only read, beside the writer: in this process, in children, and through compactions."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.interrupts import interrupted_everywhere
from support.oracles import rows_of
from support.processes import environment
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import HANG_SECONDS, Span, join_all

from hps_numba.errors import CapacityError, ClosedError, TierError, TierUnavailable
from hps_numba.storage.row_log import records, writing
from hps_numba.storage.row_log.index import RowIndex
from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = np.arange(300)
#: bytecodes between two that are interrupted
INTERRUPT_STEP = 1 if "HPS_NUMBA_EVERY_BYTE" in os.environ else 97


def open_log(folder: Path, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), **{"segment_bytes": 4096, "sync": "never", **keys})


@pytest.mark.parametrize("reads", ["mmap", "io_uring", "threads"])
def test_a_reader_sees_what_was_acknowledged_before_its_fetch(tmp_path: Path, reads: str) -> None:
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True, reads=reads)
    assert reader.tables() == [] and not reader.contains(TAG, ints(1))[0]
    for stamp in range(8):
        writer.insert(TAG, KEYS, rows_of(KEYS, DIM, stamp))
        writer.erase(TAG, ints(stamp))
        answer, rows = fetch(reader, TAG, KEYS)
        assert np.flatnonzero(~answer.found).tolist() == [stamp]
        assert np.array_equal(rows[answer.found], rows_of(KEYS[answer.found], DIM, stamp))
        if stamp % 3 == 2:
            assert writer.compact(TAG) > 0
    writer.erase(TAG)
    assert reader.tables() == [] and reader.size(TAG) == 0
    writer.insert(TAG, ints(1), rows_of([1], DIM + 2))  # another table of that name
    assert np.array_equal(fetch(reader, TAG, ints(1), DIM + 2)[1], rows_of([1], DIM + 2))
    for tier in (writer, reader):
        tier.close()


def test_a_reader_that_slept_through_erasures_and_compactions_forgets_the_rows(tmp_path: Path) -> None:
    writer, reader = open_log(tmp_path), open_log(tmp_path, read_only=True)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    assert fetch(reader, TAG, KEYS)[0].found.all()
    writer.erase(TAG, KEYS[::2])
    for _ in range(3):
        writer.insert(TAG, KEYS[1::2], rows_of(KEYS[1::2], DIM, 1))
        writer.compact(TAG)
    segments = {path.name for path in tmp_path.glob("table-*/*.keys")}
    assert "00000001.keys" not in segments  # where the erased rows were
    answer, rows = fetch(reader, TAG, KEYS)
    assert answer.found.tolist() == [bool(key % 2) for key in KEYS]
    assert np.array_equal(rows[1::2], rows_of(KEYS[1::2], DIM, 1))
    for tier in (writer, reader):
        tier.close()


def test_a_reader_writes_nothing(tmp_path: Path) -> None:
    open_log(tmp_path).close()
    reader = open_log(tmp_path, read_only=True)
    for call in (
        lambda: reader.insert(TAG, ints(1), rows_of([1], DIM)),
        lambda: reader.erase(TAG, ints(1)),
        lambda: reader.erase(TAG),
    ):
        with pytest.raises(TierError, match="expected a writer, got one that is opened with read_only"):
            call()
    reader.close()
    with pytest.raises(ClosedError, match="closed"):
        fetch(reader, TAG, ints(1))
    with pytest.raises(TierUnavailable, match="expected the folder of a row_log"):
        open_log(tmp_path / "missing", read_only=True)


def test_a_second_writer_is_refused_until_the_first_one_has_ended(tmp_path: Path) -> None:
    code = f"""
import os, sys
from hps_numba.storage.tiers.row_log import RowLogTier
tier = RowLogTier.from_options(path={str(tmp_path)!r})
print(os.getpid(), flush=True)
sys.stdin.read()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert child.stdout is not None
    pid = child.stdout.readline().strip()
    with pytest.raises(TierUnavailable, match=rf"{tmp_path}/lock: expected no other writer, got process {pid} on"):
        open_log(tmp_path)
    open_log(tmp_path, read_only=True).close()
    child.kill()
    child.communicate(timeout=HANG_SECONDS)
    first = open_log(tmp_path)
    with pytest.raises(TierUnavailable, match="expected no other writer"):  # of this process
        open_log(tmp_path)
    first.close()
    open_log(tmp_path).close()


@pytest.mark.parametrize("reads", ["mmap", "io_uring", "threads"])
def test_lookups_beside_writes_and_compactions_are_exact(tmp_path: Path, reads: str) -> None:
    """Each row that is seen is whole, none is older than one seen before, and no key is missing."""
    writer = open_log(tmp_path, reads=reads)
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    tiers = [writer, open_log(tmp_path, read_only=True, reads=reads)]
    looked = [0, 0]
    problems: list[BaseException] = []
    stop = threading.Event()

    def look(number: int) -> None:
        seen = np.zeros(len(KEYS))
        try:
            while not stop.is_set():
                answer, rows = fetch(tiers[number], TAG, KEYS)
                stamps = np.log2(rows[:, 0] / rows_of(KEYS, DIM)[:, 0])
                assert answer.found.all() and (stamps >= seen).all()
                assert np.array_equal(rows, rows_of(KEYS, DIM) * np.float32(2) ** stamps.astype(np.float32)[:, None])
                seen = stamps
                looked[number] += 1
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    written = 0
    span = Span(1.0, lambda: min(looked) > 3 or problems)
    while span.goes_on() and not problems and written < 100:
        written += 1
        writer.insert(TAG, KEYS, rows_of(KEYS, DIM, written))
        writer.compact(TAG)
    stop.set()
    join_all(*threads)
    assert not problems, problems[0]
    assert written > 1 and min(looked) > 0
    for tier in tiers:
        tier.close()


def test_concurrent_inserts_share_commits_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(writing, "_sync_data", lambda descriptor: synced.append(descriptor))
    tier = open_log(tmp_path, sync="always", segment_bytes=1 << 20)
    tier.insert(TAG, ints(-1), rows_of([-1], DIM))
    synced.clear()
    inside = threading.Event()
    with tier._log._lock.held():  # while a commit is at work, others queue up

        def insert(number: int) -> None:
            keys = np.arange(100 * number, 100 * number + 100)
            assert tier.insert(TAG, keys, rows_of(keys, DIM)) == 100

        threads = [threading.Thread(target=insert, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        pause = threading.Event()
        while len(tier._log._waiting) < 8:
            pause.wait(1e-3)
        inside.set()
    join_all(*threads)
    assert len(synced) == 2  # of the rows, and of the records
    assert len(content_of(tier, TAG, 100)) == 801
    tier.close()


def test_a_forked_child_reads_on_and_writes_nothing(tmp_path: Path) -> None:
    writer = open_log(tmp_path, reads="auto")
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    fetch(writer, TAG, KEYS)

    def work() -> bool:
        with pytest.raises(TierError, match="which forked this one"):
            writer.insert(TAG, ints(1), rows_of([1], DIM))
        answer, rows = fetch(writer, TAG, KEYS)
        return bool(answer.found.all()) and np.array_equal(rows, rows_of(KEYS, DIM))

    assert in_child(work) == 0
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM, 1))
    assert np.array_equal(fetch(writer, TAG, KEYS)[1], rows_of(KEYS, DIM, 1))
    writer.close()
    open_log(tmp_path).close()


def test_closing_beside_reads_is_safe(tmp_path: Path) -> None:
    for reads in ("mmap", "io_uring", "threads"):
        tier = open_log(tmp_path, reads=reads)
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
        problems: list[BaseException] = []
        started = threading.Event()

        def look(tier: RowLogTier = tier, problems: list[BaseException] = problems, started: threading.Event = started) -> None:
            try:
                while True:
                    answer, rows = fetch(tier, TAG, KEYS)
                    assert answer.found.all() and np.array_equal(rows, rows_of(KEYS, DIM))
                    started.set()
            except BaseException as problem:
                problems.append(problem)

        thread = threading.Thread(target=look)
        thread.start()
        assert started.wait(HANG_SECONDS)
        tier.close()
        join_all(thread)
        assert isinstance(problems[0], ClosedError), problems[0]


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


@pytest.mark.parametrize("reads", ["mmap", "io_uring", "threads"])
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
