"""What a compaction deletes is on the disk in another place by then."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.tiers import DIM, TAG, content_of

from hps_numba.errors import TierError
from hps_numba.storage.row_log import compaction, log, writing
from hps_numba.storage.row_log.index import RowIndex
from hps_numba.storage.row_log.segment import Segment
from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = np.arange(300)


def open_log(folder: Path, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), **{"segment_bytes": 4096, "sync": "never", **keys})


class Disk:
    """Which bytes of which files were synced, as a loss of power would leave them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, int] = {}  # sizes by inode
        self.deleted: list[str] = []
        monkeypatch.setattr(writing, "_sync_data", self._sync)
        monkeypatch.setattr(log, "delete_files", self._delete)

    def _sync(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self.synced[found.st_ino] = found.st_size

    def _delete(self, segment: Segment) -> None:
        """All that is in later segments is synced by now."""
        for path in segment.rows_path.parent.iterdir():
            if int(path.stem) > segment.number:
                assert self.synced.get(path.stat().st_ino, 0) == path.stat().st_size, path
        for descriptor in (segment.rows_fd, segment.keys_fd):  # the inode may soon be that of another file
            self.synced.pop(os.fstat(descriptor).st_ino, None)
        self.deleted.append(segment.rows_path.name)
        compaction.delete_files(segment)


@pytest.mark.parametrize("sync", ["never", "always"])
def test_rows_are_synced_before_the_old_ones_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: str) -> None:
    """Also those that an earlier process wrote."""
    tier = open_log(tmp_path)
    for stamp in range(2):
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM, stamp))
    tier.close()
    disk = Disk(monkeypatch)
    tier = open_log(tmp_path, sync=sync)
    tier.erase(TAG, KEYS[:50])
    before = content_of(tier, TAG, 100)
    assert tier.compact(TAG) > 0 and len(disk.deleted) > 2
    assert content_of(tier, TAG, 100) == before
    tier.close()


def test_nothing_is_deleted_if_its_copies_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_log(tmp_path)
    for stamp in range(2):
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM, stamp))
    before = content_of(tier, TAG, 100)
    files = set(tmp_path.glob("table-*/*"))

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_sync_data", fail)
        with pytest.raises(TierError, match=r"\.rows: cannot be synced: Input/output error"):
            tier.compact(TAG)
    with pytest.raises(TierError, match=r"\.rows: cannot be synced"):  # a sync that works now says nothing about then
        tier.compact(TAG)
    assert files <= set(tmp_path.glob("table-*/*"))
    assert content_of(tier, TAG, 100) == before
    tier.close()
    tier = open_log(tmp_path)
    assert tier.compact(TAG) > 0 and content_of(tier, TAG, 100) == before
    tier.close()


def test_an_evicted_row_is_not_followed_by_an_older_one_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The segment of its last row is deleted before its eviction would have been recorded; an older row is elsewhere."""
    tier = open_log(tmp_path / "log", max_bytes=1 << 16)
    tier.insert(TAG, KEYS[:100], rows_of(KEYS[:100], DIM))  # one segment
    tier.insert(TAG, KEYS[:1], rows_of(KEYS[:1], DIM, 1))
    table = tier._log.table(TAG)
    assert table is not None and len(table.segments) == 2
    writer, compactor = tier._log._writers[TAG]

    def evict(index: RowIndex, *_: Any) -> np.ndarray:
        index.erase(KEYS[:1])
        return KEYS[:1]

    monkeypatch.setattr(RowIndex, "evict", evict)
    writer.evict(0)
    compactor.run(1)
    assert 1 in table.segments and 2 not in table.segments
    shutil.copytree(tmp_path / "log", tmp_path / "crashed")
    tier.close()
    tier = open_log(tmp_path / "crashed", max_bytes=1 << 16)
    assert tier.contains(TAG, KEYS[:100]).tolist() == [False] + 99 * [True]
    tier.close()
