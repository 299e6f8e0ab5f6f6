"""The contract of a tier, for each way in which a row_log reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


class TestRing(OfRowLog):
    reads = "io_uring"


class TestThreads(OfRowLog):
    reads = "threads"
