"""Openers that only read, beside the writer: in this process, in children, and through compactions."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.oracles import rows_of
from support.processes import environment
from support.row_logs import READS
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import HANG_SECONDS, Span, join_all, wait_until

from hps_numba.errors import ClosedError, TierError, TierUnavailable
from hps_numba.storage.row_log import writing
from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = np.arange(300)


def open_log(folder: Path, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), **{"segment_bytes": 4096, "sync": "never", **keys})


@pytest.mark.parametrize("reads", READS)
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


@pytest.mark.parametrize("reads", READS)
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
    span = Span(1.0, lambda: min(looked) > 3 and written > 1)
    while span.goes_on() and not problems and written < 100:  # a row is that of its key times 2 to the power of this
        written += 1
        writer.insert(TAG, KEYS, rows_of(KEYS, DIM, written))
        writer.compact(TAG)
    wait_until(lambda: min(looked) > 3 or problems)
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
    with tier._log._lock.held():  # while a commit is at work, others queue up

        def insert(number: int) -> None:
            keys = np.arange(100 * number, 100 * number + 100)
            assert tier.insert(TAG, keys, rows_of(keys, DIM)) == 100

        threads = [threading.Thread(target=insert, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(tier._log._waiting) == 8)
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


@pytest.mark.parametrize("reads", READS)
def test_closing_beside_reads_is_safe(tmp_path: Path, reads: str) -> None:
    tier = open_log(tmp_path, reads=reads)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    problems: list[BaseException] = []
    started = threading.Event()

    def look() -> None:
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
