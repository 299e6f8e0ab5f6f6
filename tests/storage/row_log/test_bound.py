"""A table stays within max_bytes, and the policy says which rows are evicted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.tiers import TAG, content_of, fetch

from hps_numba.errors import ConfigError
from hps_numba.storage.row_log import writing
from hps_numba.storage.tiers.row_log import RowLogTier

DIM = 16
MAX = 1 << 16
ROWS = MAX * 2 // 3 // (16 + 4 * DIM + 8)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compactions and manifests wait for the disk, which here is of no interest."""
    monkeypatch.setattr(writing, "_sync_data", lambda descriptor: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def open_log(folder: Path, policy: str, **keys: Any) -> RowLogTier:
    return RowLogTier.from_options(path=str(folder), max_bytes=MAX, overflow_policy=policy, sync="never", **keys)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("table-*/*"))


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used", "evict_oldest"])
@pytest.mark.parametrize("batch", [1, 40, 900])
def test_files_stay_within_the_bound_and_rows_are_exact(tmp_path: Path, policy: str, batch: int) -> None:
    tier = open_log(tmp_path, policy)
    last = 0
    total = {1: 250, 40: 1400, 900: 1800}[batch]
    for start in range(0, total, batch):
        keys = np.arange(start, start + batch) % 1200  # some come back
        tier.insert(TAG, keys, rows_of(keys, DIM))
        assert size_of(tmp_path) <= MAX
        assert tier.size(TAG) <= tier.capacity(TAG) == ROWS
        last = int(keys[-1])
    content = content_of(tier, TAG, 100)
    assert len(content) >= 0.7 * min(ROWS, total)
    assert batch == 900 or last in content or policy != "evict_oldest"
    assert content == {key: rows_of([key], DIM)[0].tobytes() for key in content}
    tier.close()
    again = open_log(tmp_path, policy)  # what was evicted stays so
    assert content_of(again, TAG, 100) == content
    again.close()


def test_least_used_rows_are_evicted_first_also_after_compactions(tmp_path: Path) -> None:
    tier = open_log(tmp_path, "evict_least_used", overflow_resolution_target=0.5)
    keys = np.arange(ROWS)
    for _ in range(6):
        tier.insert(TAG, keys, rows_of(keys, DIM))  # compactions move the rows
    used = keys[::3]
    for _ in range(3):
        fetch(tier, TAG, used, DIM)
    tier.compact(TAG)
    tier.insert(TAG, np.array([100_000]), rows_of([100_000], DIM))
    left = content_of(tier, TAG, 100).keys()
    assert len(left) == round(ROWS * 0.5) and set(used.tolist()) <= left
    tier.close()


def test_oldest_rows_are_evicted_first_also_after_compactions(tmp_path: Path) -> None:
    tier = open_log(tmp_path, "evict_oldest", overflow_resolution_target=0.5)
    keys = np.arange(ROWS)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    late = keys[: ROWS // 3]
    fetch(tier, TAG, late, DIM)
    tier.erase(TAG, keys[-1:])
    tier.compact(TAG)  # moving a row is no use of it
    tier.insert(TAG, np.array([100_000, 100_001]), rows_of([100_000, 100_001], DIM))
    left = content_of(tier, TAG, 100).keys()
    assert {*late.tolist(), 100_000, 100_001} <= left and len(left) == round(ROWS * 0.5)
    tier.close()


def test_an_erased_row_does_not_come_back_after_it_was_evicted(tmp_path: Path) -> None:
    tier = open_log(tmp_path, "evict_oldest")
    for start in range(0, 4 * ROWS, 100):
        keys = np.arange(start, start + 100)
        tier.insert(TAG, keys, rows_of(keys, DIM))
    gone = np.setdiff1d(np.arange(4 * ROWS), np.array(sorted(content_of(tier, TAG, 100))))
    assert tier.erase(TAG, gone) == 0
    tier.close()
    again = open_log(tmp_path, "evict_oldest")
    assert not again.contains(TAG, gone).any()
    again.close()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_bytes": 65535}, "max_bytes: expected at least 65536, got 65535"),
        ({"queue_depth": 0}, "queue_depth: expected 1 to 4096, got 0"),
        ({"threads": 257}, "threads: expected 1 to 256, got 257"),
        ({"segment_bytes": 1}, "segment_bytes: expected 4096 to"),
        ({"overflow_resolution_target": 0.0}, "overflow_resolution_target: expected more than 0"),
        ({"overflow_policy": "evict_all"}, "overflow_policy"),
        ({"reads": "tape"}, "reads"),
        ({"sync": "often"}, "sync"),
    ],
)
def test_options_are_checked(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowLogTier.from_options(path=str(tmp_path), **keys)


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError, match="path"):
        RowLogTier.from_options()
