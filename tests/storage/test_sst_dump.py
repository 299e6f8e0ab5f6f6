"""The ``.sst`` dump of a database table (checklist F12)."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes import DictTier
from support.oracles import rows_of
from support.tiers import DIM, TAG, content_of, fetch, ints

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.errors import KeyDtypeError, ModelFileError, TierError, TierUnavailable
from hps_numba.storage import Fetched
from hps_numba.storage.sst_dump import SstDump, read_sst, write_sst
from hps_numba.storage.tiers.hash_map import HashMapTier
from hps_numba.storage.tiers.rocks_db import RocksTier

rocksdict = pytest.importorskip("rocksdict")


class PartlyLostTier(DictTier):
    """Of some keys a part cannot be looked for."""

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(section, wide_keys=wide_keys)
        self.lost: set[int] = set()
        self.asked: int | None = None

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        answer = super().fetch(table, keys, rows, deadline=deadline)
        failed = np.isin(keys, list(self.lost))
        return Fetched(answer.found & ~failed, answer.asked if self.asked is None else self.asked, failed)


@pytest.mark.parametrize(("lost", "asked", "count"), [({3, 5}, None, 2), (set(), 7, 2), ({3}, 7, 3)])
def test_rows_that_could_not_be_looked_for_are_no_dump(tmp_path: Path, lost: set[int], asked: int | None, count: int) -> None:
    tier = PartlyLostTier(VolatileDatabaseConfig())
    tier.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
    assert tier.dump(TAG, tmp_path / "whole.sst") == 9
    tier.lost, tier.asked = lost, asked
    with pytest.raises(TierError, match=f"^{TAG}: {count} of 9 keys could not be looked for"):
        tier.dump(TAG, tmp_path / "x.sst")
    assert not (tmp_path / "x.sst").exists()


def by_bytes(keys: list[int], key_bytes: int = 8) -> list[int]:
    return sorted(keys, key=lambda key: (key % 2 ** (8 * key_bytes)).to_bytes(key_bytes, "little"))


def written(path: Path, pairs: dict[bytes, bytes]) -> Path:
    """A file by rocksdict alone."""
    writer = rocksdict.SstFileWriter(rocksdict.Options(raw_mode=True))
    writer.open(str(path))
    for key in sorted(pairs):
        writer[key] = pairs[key]
    writer.finish()
    return path


@pytest.mark.parametrize("key_bytes", [4, 8])
@settings(max_examples=12, deadline=None)
@given(data=st.data(), dim=st.sampled_from([1, 3, 17]), step=st.integers(1, 9), chunk_pairs=st.integers(1, 9))
def test_round_trip(
    key_bytes: int, data: st.DataObject, dim: int, step: int, chunk_pairs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("dump") / "a.sst"
    low, high = (0, 2**32 - 1) if key_bytes == 4 else (-(2**63), 2**63 - 1)
    some = st.one_of(st.integers(low, high), st.sampled_from([1, 256, 255, 65536]))
    keys = by_bytes(data.draw(st.lists(some, min_size=1, max_size=40, unique=True)), key_bytes)
    rows = rows_of(keys, dim)
    chunks = [(keys[start : start + step], rows[start : start + step]) for start in range(0, len(keys), step)]
    assert write_sst(path, key_bytes, dim, chunks) == len(keys)
    dump = read_sst(path)
    assert dump == SstDump(path, key_bytes, 4 * dim, len(keys)) and dump.dim == dim
    before = path.read_bytes()
    for size in (chunk_pairs, None):
        got = list(dump.chunks(size))
        assert {(some.dtype.name, other.dtype.name) for some, other in got} == {("int64", "float32")}
        assert np.concatenate([some for some, _ in got]).tolist() == keys
        assert np.concatenate([other for _, other in got]).tobytes() == rows.tobytes()
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["a.sst"]


@pytest.mark.parametrize("tier", [HashMapTier, DictTier])
def test_tables_in_memory_are_sorted_by_bytes(tier: type, tmp_path: Path) -> None:
    """RocksDB itself reads what they wrote; keys 1 and 256 are what HugeCTR cannot write."""
    keys = [1, 256, 0, -1, 255, 2**40, -(2**63)]
    source = tier.from_options()
    source.insert(TAG, ints(*keys), rows_of(keys, DIM))
    assert source.dump(TAG, tmp_path / "a.sst") == len(keys)
    database = rocksdict.Rdict(str(tmp_path / "plain"), rocksdict.Options(raw_mode=True))
    database.ingest_external_file([str(tmp_path / "a.sst")])
    expected = {struct.pack("<q", key): struct.pack("<3f", *rows_of([key], DIM)[0]) for key in keys}
    assert list(database.items()) == sorted(expected.items())
    database.close()
    source.close()


def test_files_of_others_are_loaded_by_every_tier(tmp_path: Path) -> None:
    keys = [1, 256, 5, -1]
    path = written(tmp_path / "a.sst", {struct.pack("<q", key): rows_of([key], DIM)[0].tobytes() for key in keys})
    tiers = [HashMapTier.from_options(max_batch_size=2), RocksTier.from_options(path=str(tmp_path / "db"), max_batch_size=2)]
    for tier in tiers:
        tier.insert(TAG, ints(5, 7), rows_of([5, 7], DIM, 1))
        assert (tier.size(TAG), tier.load_dump(TAG, path), tier.size(TAG)) == (2, 4, 5)
        expected = {key: rows_of([key], DIM)[0].tobytes() for key in keys}
        assert content_of(tier, TAG) == {**expected, 7: rows_of([7], DIM, 1)[0].tobytes()}
        tier.close()
    again = RocksTier.from_options(path=str(tmp_path / "db"))
    assert again.size(TAG) == 5 and path.exists()
    again.close()


@pytest.mark.parametrize("kind", [HashMapTier, RocksTier])
def test_a_dump_that_does_not_fit_changes_nothing(kind: type, tmp_path: Path) -> None:
    more = {"path": str(tmp_path / "db")} if kind is RocksTier else {}
    narrow = written(tmp_path / "narrow.sst", {struct.pack("<I", 1): bytes(12)})
    wide = written(tmp_path / "wide.sst", {struct.pack("<q", 1): bytes(16)})
    tier = kind.from_options(**more)
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    with pytest.raises(TierError, match=r"narrow\.sst: expected keys of 8 bytes \(supportlonglong\), got 4"):
        tier.load_dump(TAG, narrow)
    with pytest.raises(TierError, match=f"{TAG}: expected rows of width 3, got 4"):
        tier.load_dump(TAG, wide)
    assert tier.tables() == [TAG] and fetch(tier, TAG, ints(1))[1].tobytes() == rows_of([1], DIM).tobytes()
    tier.close()


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({b"12": bytes(8)}, "expected keys of 4 or 8 bytes, got 2"),
        ({b"12345678": bytes(6)}, "expected rows of float32, got one of 6 bytes"),
        ({b"12345678": b""}, "expected rows of float32, got one of 0 bytes"),
        ({b"12345678": bytes(8), b"1234": bytes(8)}, r"expected keys of 4 bytes, as the first has, got one of 8"),
        ({b"12345678": bytes(8), b"22345678": bytes(4)}, r"expected rows of 8 bytes, as the first has, got one of 4"),
    ],
)
def test_other_tables_of_rocksdb_are_refused(pairs: dict[bytes, bytes], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=f"{tmp_path}/a.sst: {expected}"):
        read_sst(written(tmp_path / "a.sst", pairs))


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    path, keys = tmp_path / "a.sst", by_bytes(list(range(5000)))
    write_sst(path, 8, 16, [(keys, rows_of(keys, 16))])
    good = path.read_bytes()
    cases = [
        (good[:-100], "expected a table of RocksDB, which ends with"),
        (good[len(good) // 2 :], "cannot be read: "),
        (
            good[: len(good) // 3] + b"\xff\xff\xff\xff" + good[len(good) // 3 + 4 :],
            "cannot be read: Corruption: block checksum",
        ),
        (good[:5], "expected a table of RocksDB, got 5 bytes"),
        (b"", "expected a table of RocksDB, got 0 bytes"),
    ]
    for content, expected in cases:
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=f"{path}: {expected}") as caught:
            read_sst(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="no such file"):
        read_sst(tmp_path / "b.sst")
    with pytest.raises(ModelFileError, match="expected a file, got a directory"):
        read_sst(tmp_path)
    path.write_bytes(good)
    dump = read_sst(path)
    path.unlink()
    with pytest.raises(ModelFileError, match=f"{path}: cannot be read"):
        list(dump.chunks())


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path, row = tmp_path / "a.sst", np.ones((1, 1))
    cases = [
        (ValueError, "key_bytes: expected 4 or 8, got 2", lambda: write_sst(path, 2, 1, [])),
        (ValueError, "dim: expected at least 1, got 0", lambda: write_sst(path, 8, 0, [])),
        (KeyDtypeError, "keys: expected integers", lambda: write_sst(path, 8, 1, [([1.5], row)])),
        (ModelFileError, "which fit 4 bytes, got -1", lambda: write_sst(path, 4, 1, [([-1], row)])),
        (ModelFileError, "strict ascending order", lambda: write_sst(path, 8, 1, [([1], row), ([256], row)])),
        (ModelFileError, "strict ascending order", lambda: write_sst(path, 8, 1, [([1], row), ([1], row)])),
        (TierError, r"a\.sst: expected a table with rows, got none", lambda: write_sst(path, 8, 1, [])),
        (TierError, r"a\.sst: expected a table with rows, got none", lambda: DictTier.from_options().dump(TAG, path)),
        (ModelFileError, "expected a file, got a directory", lambda: write_sst(tmp_path, 8, 1, [([1], row)])),
    ]
    for error, expected, call in cases:
        with pytest.raises(error, match=expected):
            call()
        assert list(tmp_path.iterdir()) == []
    write_sst(path, 8, 1, [([1], row)])
    with pytest.raises(ModelFileError, match="exists already"):
        write_sst(path, 8, 1, [([1], row)])
    assert write_sst(path, 8, 1, [([2], row)], overwrite=True) == 1
    path.write_text("somebody's notes")
    with pytest.raises(ModelFileError, match=r"is a file, but not an \.sst dump"):
        write_sst(path, 8, 1, [([2], row)], overwrite=True)
    assert path.read_text() == "somebody's notes"


def test_without_rocksdict_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.sst", {struct.pack("<q", 1): bytes(4)})
    tier = DictTier.from_options()
    tier.insert(TAG, ints(1), rows_of([1], 1))
    monkeypatch.setitem(sys.modules, "rocksdict", None)
    for call in (tier.load_dump, tier.dump):
        with pytest.raises(TierUnavailable, match=r'pip install "hps-numba\[rocksdb\]"'):
            call(TAG, path)
    assert tier.dump(TAG, tmp_path / "a.bin") == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a folder read-only, as root")
def test_a_file_on_a_read_only_disk(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    write_sst(folder / "a.sst", 8, 1, [([1], np.ones((1, 1)))])
    mount = ["mount", "--bind", str(folder), str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        assert [keys.tolist() for keys, _ in read_sst(folder / "a.sst").chunks()] == [[1]]
    finally:
        subprocess.run(["umount", str(folder)], check=True)
