"""The contract of a tier, for each way in which a row_log reads; and a server above one."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import rows_of
from support.row_logs import needs_ring
from support.tiers import TAG

from hps_numba.storage.tiers.row_log import RowLogTier
from hps_numba.testing import TierContract


class OfRowLog(TierContract):
    """A row_log whose folder is that of the test."""

    tier = RowLogTier
    reads: str

    def options(self, folder: Path) -> dict[str, Any]:
        return {"path": str(folder / f"log{len(list(folder.iterdir()))}"), "reads": self.reads}


class TestMapped(OfRowLog):
    reads = "mmap"


@needs_ring
class TestRing(OfRowLog):
    reads = "io_uring"


class TestThreads(OfRowLog):
    reads = "threads"


def test_a_server_with_little_host_memory_serves_every_row_from_the_disk(workshop: Workshop, tmp_path: Path) -> None:
    """A bounded host store above it, as for a table larger than memory."""
    keys = np.arange(3000)
    tiers = [
        {
            "type": "hash_map",
            "num_partitions": 1,
            "overflow_margin": 100,
            "initialize_after_startup": False,
            "cache_missed_embeddings": True,
        },
        {"type": "row_log", "path": str(tmp_path / "rows")},
    ]
    model = workshop.model((keys, 8), max_batch_size=512)
    server = workshop.open(model, tiers=tiers)
    shuffled = np.random.default_rng(0).permutation(keys)
    for start in range(0, len(keys), 500):
        some = shuffled[start : start + 500]
        assert np.array_equal(server.lookup(some, "m", 0), rows_of(some, 8))
    server.update(keys[:10], rows_of(keys[:10], 8, 3), "m", 0)
    assert np.array_equal(server.lookup(keys[:20], "m", 0)[:10], rows_of(keys[:10], 8, 3))
    server.close()
    tier = RowLogTier.from_options(path=str(tmp_path / "rows"), read_only=True)
    assert [tier.size(table) for table in tier.tables()] == [3000]
    tier.close()


def test_an_interrupted_insert_is_whole(tmp_path: Path) -> None:
    tier = RowLogTier.from_options(path=str(tmp_path))
    commit = tier._log._commit

    def interrupted(table: Any, jobs: Any) -> None:
        signal.raise_signal(signal.SIGINT)  # arrives at the main thread, which waits
        commit(table, jobs)

    tier._log._commit = interrupted  # type: ignore[method-assign]
    keys = np.arange(100)
    with pytest.raises(KeyboardInterrupt):
        tier.insert(TAG, keys, rows_of(keys, 4))
    tier._log._commit = commit  # type: ignore[method-assign]
    rows = np.zeros((100, 4), np.float32)
    assert tier.fetch(TAG, keys, rows).found.all() and np.array_equal(rows, rows_of(keys, 4))
    assert tier.insert(TAG, keys, rows_of(keys, 4, 1)) == 0
    tier.close()


def test_rows_survive_a_restart_and_need_no_reload(workshop: Workshop, tmp_path: Path) -> None:  # D23
    keys = np.arange(9)
    for start, stamp in enumerate([0, 5]):
        rows = {"type": "row_log", "path": str(tmp_path / "rows"), "initialize_after_startup": start == 0}
        cold = {"type": "hash_map", "initialize_after_startup": False}
        model = workshop.model((keys, 3), stamp=stamp)  # other rows at the second start
        server = workshop.open(model, tiers=[cold, rows])
        assert np.array_equal(server.lookup(keys, "m", 0), rows_of(keys, 3))
        server.close()
