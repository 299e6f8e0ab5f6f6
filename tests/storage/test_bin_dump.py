"""The ``.bin`` dump of a database table (checklist F11)."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sample_models import sample

from hps_numba.errors import KeyDtypeError, ModelFileError
from hps_numba.storage.bin_dump import BinDump, read_bin, write_bin


def contents(dump: BinDump, chunk_pairs: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    chunks = list(dump.chunks(chunk_pairs))
    if not chunks:
        return np.empty(0, np.int64), np.empty((0, dump.dim), np.float32)
    assert {(keys.dtype.name, rows.dtype.name) for keys, rows in chunks} == {("int64", "float32")}
    return np.concatenate([keys for keys, _ in chunks]), np.concatenate([rows for _, rows in chunks])


def header(version: int = 1, key_bytes: int = 8, value_bytes: int = 8, magic: bytes = b"bin\0") -> bytes:
    return magic + struct.pack("<3I", version, key_bytes, value_bytes)


def test_the_bytes_are_those_of_hugectr(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_bin(path, 8, 2, [([-1, 5], np.array([[1.0, 2.0], [3.0, 4.0]]))]) == 2
    assert path.read_bytes() == b"bin\0" + struct.pack("<IIIqffqff", 1, 8, 8, -1, 1.0, 2.0, 5, 3.0, 4.0)
    assert write_bin(path, 4, 1, [([2**32 - 1], np.array([[9.0]]))], overwrite=True) == 1
    assert path.read_bytes() == b"bin\0" + struct.pack("<IIIIf", 1, 4, 4, 2**32 - 1, 9.0)


@pytest.mark.parametrize("key_bytes", [4, 8])
@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 50), dim=st.sampled_from([1, 3, 16, 17]), step=st.integers(1, 60), chunk_pairs=st.integers(1, 60))
def test_round_trip(
    key_bytes: int, n: int, dim: int, step: int, chunk_pairs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("dump") / "a.bin"
    keys, rows, _ = sample(n, dim)
    keys = keys & 0xFFFFFFFF if key_bytes == 4 else keys
    chunks = [(keys[start : start + step], rows[start : start + step]) for start in range(0, n, step)]
    assert write_bin(path, key_bytes, dim, chunks) == n
    dump = read_bin(path)
    assert (dump.key_bytes, dump.pairs, dump.value_bytes) == (key_bytes, n, 4 * dim if n else 0)
    for size in (chunk_pairs, None):
        got_keys, got_rows = contents(dump, size)
        assert got_keys.tolist() == keys.tolist() and got_rows.tobytes() == rows.tobytes()


def test_a_table_without_rows_and_a_table_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_bin(path, 4, 3, []) == 0
    assert path.read_bytes() == header(key_bytes=4, value_bytes=0)
    assert read_bin(path) == BinDump(path, 4, 0, 0) and list(read_bin(path).chunks()) == []
    path.write_bytes(header()[:12])
    assert read_bin(path) == BinDump(path, 8, 0, 0) and list(read_bin(path).chunks()) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "expected a header of 16 bytes, got 0 bytes"),
        (header()[:11], "expected a header of 16 bytes, got 11 bytes"),
        (header()[:14], "14 bytes with values of"),
        (header(magic=b"bim\0"), r"expected a file that starts with b'bin\x00', got b'bim\x00'"),
        (header(version=2), "expected version 1, got 2"),
        (header(key_bytes=0), "expected keys of 4 or 8 bytes, got 0"),
        (header(key_bytes=16), "expected keys of 4 or 8 bytes, got 16"),
        (header(value_bytes=6), "16 bytes with values of 6 bytes"),
        (header(value_bytes=0) + bytes(8), "expected no bytes after the header of an empty table, got 8"),
        (header() + bytes(15), "expected a multiple of 8 + 8 bytes of pairs, got 15"),
        (header(value_bytes=2**32 - 4) + bytes(16), f"expected a multiple of 8 + {2**32 - 4} bytes of pairs, got 16"),
    ],
)
def test_damaged_dumps(data: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        read_bin(path)
    assert expected in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        read_bin(tmp_path / "a.bin")
    with pytest.raises(ModelFileError, match="expected a file, got a directory"):
        read_bin(tmp_path)
    with pytest.raises(ModelFileError, match="expected a file, got a directory"):
        write_bin(tmp_path, 8, 2, [], overwrite=True)


def test_a_dump_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    keys, rows, _ = sample(50, 3)
    write_bin(path, 8, 3, [(keys, rows)])
    chunks = read_bin(path).chunks(10)
    next(chunks)
    with path.open("r+b") as file:
        file.truncate(16 + 30 * 20 - 1)
    next(chunks)
    with pytest.raises(ModelFileError, match="ends after 615 bytes, 616 were expected"):
        next(chunks)


@pytest.mark.parametrize("key", [-1, 2**32, -(2**63)])
def test_keys_that_do_not_fit_4_bytes_leave_nothing(key: int, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=rf"expected keys in 0\.\.4294967295, which fit 4 bytes, got {key}"):
        write_bin(tmp_path / "a.bin", 4, 1, [([1], np.ones((1, 1))), ([key], np.ones((1, 1)))])
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with pytest.raises(ValueError, match="key_bytes: expected 4 or 8, got 2"):
        write_bin(path, 2, 1, [])
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        write_bin(path, 4, 0, [])
    with pytest.raises(KeyDtypeError, match="chunk 0: keys: expected integers, got float64"):
        write_bin(path, 4, 1, [([1.5], np.ones((1, 1)))])
    with pytest.raises(ModelFileError, match=r"chunk 0: rows: expected shape \[1, 1\], got \[1, 2\]"):
        write_bin(path, 4, 1, [([1], np.ones((1, 2)))])
    write_bin(path, 4, 1, [([1], np.ones((1, 1)))])
    with pytest.raises(ModelFileError, match="exists already"):
        write_bin(path, 4, 1, [])
    with pytest.raises(ValueError, match="chunk_pairs: expected at least 1, got 0"):
        list(read_bin(path).chunks(0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]
