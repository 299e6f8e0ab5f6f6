"""A disk that is full, fails or refuses: a typed error, nothing half-visible, and it goes on when there is space."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.oracles import rows_of
from support.tiers import TAG, content_of

from hps_numba.errors import TierError, TierUnavailable
from hps_numba.storage.row_log import methods, writing
from hps_numba.storage.row_log.ring import Ring
from hps_numba.storage.tiers.row_log import RowLogTier

DIM = 32


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is refused: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_refuses_the_whole_insert_and_goes_on_later(small_disk: Path) -> None:
    tier = RowLogTier.from_options(path=str(small_disk / "log"), segment_bytes=1 << 18)
    keys = np.arange(2000)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    before = content_of(tier, TAG, 500)
    many = np.arange(1000, 9000)
    with pytest.raises(TierError, match="cannot be written: No space left on device"):
        tier.insert(TAG, many, rows_of(many, DIM, 1))
    assert content_of(tier, TAG, 500) == before
    few = np.arange(2000, 2500)
    assert tier.insert(TAG, few, rows_of(few, DIM, 2)) == 500  # what the large one took is free again
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space"), ballast.open("wb", buffering=0) as file:
        while True:
            assert file.write(bytes(4096))
    with pytest.raises(TierError, match="No space left on device"):
        tier.insert(TAG, many[:4000], rows_of(many[:4000], DIM, 1))
    ballast.unlink()
    assert tier.insert(TAG, ints_to(2500, 2600), rows_of(ints_to(2500, 2600), DIM)) == 100
    tier.close()
    again = RowLogTier.from_options(path=str(small_disk / "log"))
    expected = {**before, **{int(key): rows_of([key], DIM, 2)[0].tobytes() for key in few}}
    expected |= {key: rows_of([key], DIM)[0].tobytes() for key in range(2500, 2600)}
    assert content_of(again, TAG, 500) == expected
    again.close()


def ints_to(start: int, stop: int) -> np.ndarray:
    return np.arange(start, stop)


@pytest.mark.parametrize("failing", range(6))
def test_a_step_of_a_commit_that_fails_leaves_nothing(tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing and syncing rows and records, one after the other."""
    tier = RowLogTier.from_options(path=str(tmp_path), segment_bytes=4096)
    keys = np.arange(20)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    before = content_of(tier, TAG, 50)
    steps = [0]

    def step(call):
        def counted(*args):
            steps[0] += 1
            if steps[0] == failing + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*args)

        return counted

    with monkeypatch.context() as patched:
        patched.setattr(writing, "_write_all", step(writing._write_all))
        patched.setattr(writing, "_sync_data", step(writing._sync_data))
        with pytest.raises(TierError, match="rows cannot be written: Input/output error"):
            tier.insert(TAG, keys[10:] + 5, rows_of(keys[10:] + 5, DIM, 1))
        if failing < 3:
            steps[0] = 0
            with pytest.raises(TierError, match="an erasure cannot be written: Input/output error"):
                tier.erase(TAG, keys)
    assert steps[0] >= failing + 1
    assert content_of(tier, TAG, 50) == before
    tier.close()
    again = RowLogTier.from_options(path=str(tmp_path), segment_bytes=4096)
    assert content_of(again, TAG, 50) == before
    assert again.insert(TAG, keys + 5, rows_of(keys + 5, DIM, 1)) == 5
    again.close()


def test_where_io_uring_is_refused_threads_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Docker's default does."""

    def refuse(self: Ring, *_: int) -> None:
        raise PermissionError(errno.EPERM, "io_uring: Operation not permitted")

    monkeypatch.setattr(methods.Ring, "__init__", refuse)
    with pytest.raises(
        TierUnavailable, match=r"expected a system that allows io_uring, got .*not permitted: with auto, threads read"
    ):
        RowLogTier.from_options(path=str(tmp_path), reads="io_uring")
    keys = np.arange(500)
    for reads in ("auto", "mmap"):
        tier = RowLogTier.from_options(path=str(tmp_path), reads=reads)
        monkeypatch.setattr(methods, "disk_resident", lambda *_: False)
        tier.insert(TAG, keys, rows_of(keys, DIM))
        assert not tier._log.reads.rings
        assert len(content_of(tier, TAG, 100)) == 500
        tier.close()
