"""RocksDB that cannot be opened, written or read: typed errors that say where and what, and rows that are never wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.tiers import TAG, content_of, fetch, ints
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.errors import TierError, TierUnavailable
from hps_numba.storage.rocksdb.database import Database
from hps_numba.storage.tiers.rocks_db import RocksTier

pytest.importorskip("rocksdict")
DIM, KEYS = 64, np.arange(3000)


def opened(path: Path, **keys: Any) -> RocksTier:
    return RocksTier.from_options(path=str(path), num_threads=2, **keys)


def test_without_rocksdict_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # D22
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    with pytest.raises(TierUnavailable, match=r'RocksDB needs rocksdict: pip install "hps-numba\[rocksdb\]"'):
        opened(tmp_path / "database")
    assert list(tmp_path.iterdir()) == []


def test_paths_that_are_no_database(tmp_path: Path) -> None:  # D22
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Path, bool, str]] = [
        (tmp_path / "file", False, "expected a folder for the database, got a file"),
        (tmp_path / "file", True, "cannot be read: Not a directory"),
        (tmp_path / "file" / "below", False, "the folder of the database cannot be made: Not a directory"),
        (tmp_path / "empty", True, "opened read-only, got no file CURRENT"),
        (tmp_path / "missing", True, "read-only, got nothing: no process has made it yet"),
    ]
    for path, read_only, expected in cases:
        with pytest.raises(TierUnavailable, match=f"{path}: .*{expected}") as caught:
            opened(path, read_only=read_only)
        assert "\n" not in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["empty", "file"]
    assert list((tmp_path / "empty").iterdir()) == []


OTHER_USER = """
import os, sys
from hps_numba.storage.tiers.rocks_db import RocksTier
from hps_numba.errors import TierUnavailable
RocksTier.from_options(path=sys.argv[1]).close()  # imports what another user may not
for place in (sys.argv[1], *(entry.path for entry in os.scandir(sys.argv[1]))):
    os.chmod(place, 0o555 if place == sys.argv[1] else 0o444)
if os.geteuid() == 0:
    os.seteuid(65534)
for path in (sys.argv[1], sys.argv[1] + "/new", "/root/new"):
    try:
        RocksTier.from_options(path=path)
    except TierUnavailable as problem:
        print(problem)
RocksTier.from_options(path=sys.argv[1], read_only=True).close()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="permissions and folders as on Linux")
def test_a_folder_that_may_not_be_written() -> None:  # D21, D22
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        folder = f"{outer}/kept"
        command = [sys.executable, "-c", OTHER_USER, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
        Path(folder).chmod(0o755)
    assert done.returncode == 0, done.stderr
    errors = done.stdout.splitlines()
    assert [error.split(":", 1)[0] for error in errors] == [folder, f"{folder}/new", "/root/new"]
    assert all("ermission denied" in error for error in errors), errors


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A closed database whose rows are in table files."""
    tier = opened(tmp_path / "database")
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    tier.insert("hps_et.m.b", ints(1), rows_of([1], 1))
    tier.close()
    opened(tmp_path / "database").close()  # moves rows from the log to a table file
    return tmp_path / "database"


def largest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda file: file.stat().st_size)


def flip(file: Path, at: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 0xFF
    file.write_bytes(content)


def test_a_damaged_block_is_an_error_and_no_shorter_table(database: Path, tmp_path: Path) -> None:  # D22
    flip(largest(database, "*.sst"), 0.5)
    tier = opened(database)
    right = rows_of(KEYS, DIM)
    for call in (
        lambda: fetch(tier, TAG, KEYS, DIM),
        lambda: list(tier.scan(TAG)),
        lambda: tier.size(TAG),
        lambda: tier.contains(TAG, KEYS),
        lambda: tier.erase(TAG),
        lambda: tier.dump(TAG, tmp_path / "x.sst"),
        lambda: tier.insert(TAG, KEYS, right),
    ):
        with pytest.raises(TierError, match=f"{database}: {TAG}: .*(Corruption|checksum)"):
            call()
    assert not (tmp_path / "x.sst").exists()
    good = 0
    for start in range(0, len(KEYS), 10):
        try:
            answer, rows = fetch(tier, TAG, KEYS[start : start + 10], DIM)
        except TierError:
            continue
        assert answer.found.all()
        assert_same_bits(rows, right[start : start + 10])
        good += 1
    assert 0 < good < len(KEYS) // 10
    assert_same_bits(fetch(tier, "hps_et.m.b", ints(1), 1)[1], rows_of([1], 1))
    tier.close()


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("damage", ["cut", "gone", "manifest", "current", "no current"])
def test_a_damaged_database_does_not_open(database: Path, damage: str, read_only: bool) -> None:  # D22
    rows = largest(database, "*.sst")
    if damage == "cut":
        os.truncate(rows, rows.stat().st_size // 2)
    elif damage == "gone":
        rows.unlink()
    elif damage == "manifest":
        flip(largest(database, "MANIFEST-*"), 0.5)
    elif damage == "current":
        (database / "CURRENT").write_text("junk")
    else:
        (database / "CURRENT").unlink()
    before = {file.name: file.stat().st_size for file in database.glob("*.sst")}
    with pytest.raises(TierUnavailable, match=str(database)) as caught:
        opened(database, read_only=read_only)
    assert "\n" not in str(caught.value)
    assert {file.name: file.stat().st_size for file in database.glob("*.sst")} == before


def test_a_log_that_ends_within_a_write_loses_that_write_only(tmp_path: Path) -> None:
    tier = opened(tmp_path / "database")
    tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    tier.insert(TAG, ints(2, 3), rows_of([2, 3], DIM, 1))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "database", copy)
    tier.close()
    log = largest(copy, "*.log")
    os.truncate(log, log.stat().st_size - 5)
    again = opened(copy)
    assert content_of(again, TAG) == {key: rows_of([key], DIM)[0].tobytes() for key in (1, 2)}
    again.close()


def test_what_is_not_on_the_disk_is_not_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # D22
    tier, calls = opened(tmp_path / "database", max_batch_size=2), []
    real = Database.sync
    monkeypatch.setattr(Database, "sync", lambda self: calls.append(real(self)))
    tier.insert(TAG, ints(*range(7)), rows_of(range(7), DIM))
    tier.erase(TAG, ints(1, 2, 3))
    assert len(calls) == 2

    def refused(self: Database) -> None:
        raise OSError("IO error: the disk is gone")

    monkeypatch.setattr(Database, "sync", refused)
    for call in (lambda: tier.insert(TAG, ints(9), rows_of([9], DIM)), lambda: tier.erase(TAG, ints(0))):
        with pytest.raises(TierError, match=f"{tmp_path}/database: {TAG}: IO error: the disk is gone"):
            call()
    monkeypatch.undo()
    assert tier.size(TAG) == len(content_of(tier, TAG)) == 4
    tier.close()


# --- full disks -------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, signal, sys
import numpy as np
from hps_numba.storage.tiers.rocks_db import RocksTier
from hps_numba.errors import TierError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tier = RocksTier.from_options(path=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
for stamp in range(1, 1000):
    try:
        tier.insert("hps_et.m.a", np.arange(1000), np.full((1000, 64), stamp, np.float32))
    except TierError as problem:
        print(stamp - 1, problem)
        break
rows = np.zeros((1000, 64), np.float32)
assert tier.fetch("hps_et.m.a", np.arange(1000), rows).found.all()
assert (rows == stamp - 1).all()
try:
    tier.insert("hps_et.m.a", np.arange(10), np.full((10, 64), 5000, np.float32))
except TierError as problem:
    print(0, problem)
tier.close()
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as POSIX does")
def test_files_that_may_not_grow(tmp_path: Path) -> None:  # D22
    path = tmp_path / "database"
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    (acknowledged, first), (_, second) = (line.split(" ", 1) for line in done.stdout.splitlines())
    assert first.startswith(f"{path}: hps_et.m.a: IO error") and second.startswith(f"{path}: hps_et.m.a: IO error")
    tier = opened(path)
    assert set(content_of(tier, TAG).values()) <= {
        np.full(DIM, stamp, np.float32).tobytes() for stamp in (int(acknowledged), int(acknowledged) + 1)
    }
    assert tier.size(TAG) == 1000
    tier.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a given size, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
        if done is None or done.returncode:
            pytest.skip(f"cannot mount a small disk: {done.stderr.strip() if done else 'there is no mount'}")
        mounted = True
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_and_room_again(small_disk: Callable[[str], Path]) -> None:  # D22
    path = small_disk("12m") / "database"
    tier, stamp = opened(path), 0
    with pytest.raises(TierError, match=f"{path}: {TAG}: IO error: No space left on device"):
        for stamp in range(1000):
            tier.insert(TAG, KEYS, np.full((len(KEYS), DIM), stamp, np.float32))
    answer, rows = fetch(tier, TAG, KEYS, DIM)
    assert answer.found.all() and (rows == stamp - 1).all()
    assert tier.size(TAG) == len(KEYS)
    with pytest.raises(TierError, match="No space left"):
        tier.insert(TAG, KEYS[:5], np.full((5, DIM), stamp, np.float32))
    small_disk("200m")

    def goes_on() -> bool:
        try:
            tier.insert(TAG, KEYS[:5], np.full((5, DIM), 5000, np.float32))
        except TierError:
            return False
        return True

    wait_until(goes_on)
    tier.close()
    again = opened(path)
    rows = fetch(again, TAG, KEYS, DIM)[1]
    assert (rows[:5] == 5000).all() and (rows[5:] == stamp - 1).all()
    again.close()
