"""Malformed sparse models, one kind at a time: a ``ModelFileError`` with file and numbers each (checklist F05, F06, F07)."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.sample_models import ARRAY_WRITERS, FORMATS, failure, path_for, read_all, resize, sample, save_model

from hps_numba.errors import ModelFileError
from hps_numba.storage.model_files import formats, open_model

every_format = pytest.mark.parametrize("name", FORMATS)
array_format = pytest.mark.parametrize("name", sorted(ARRAY_WRITERS))
file_format = pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("directory", "npy")])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def raw_model(folder: Path) -> Path:
    """25 rows of width 16 with meta in the directory form."""
    return save_model("directory", folder / "t.model", *sample(25, 16))


@pytest.mark.parametrize(
    ("name", "size", "dim", "expected"),
    [
        ("emb_vector", 1000, 16, "/emb_vector: expected 4 * 16 * 25 = 1600 bytes for 25 keys of width 16, got 1000"),
        ("emb_vector", 1604, 16, "/emb_vector: expected 4 * 16 * 25 = 1600 bytes for 25 keys of width 16, got 1604"),
        (
            "emb_vector",
            3200,
            16,
            "/emb_vector: expected 4 * 16 * 25 = 1600 bytes for 25 keys of width 16, got 3200; are the keys int32?",
        ),
        (
            "emb_vector",
            1600,
            8,
            "/emb_vector: expected 4 * 8 * 25 = 800 bytes for 25 keys of width 8, got 1600; are the keys int32?",
        ),
        ("emb_vector", 1604, None, "/emb_vector: expected 4 * dim * 25 bytes for 25 keys and a whole dim, got 1604"),
        ("emb_vector", 1599, 16, "/emb_vector: expected a multiple of 4 bytes (float32 values), got 1599"),
        ("emb_vector", 0, 16, "/emb_vector: expected 4 * 16 * 25 = 1600 bytes for 25 keys of width 16, got 0"),
        ("emb_vector", 0, None, "/emb_vector: expected 4 * dim * 25 bytes for 25 keys and a whole dim, got 0"),
        ("key", 199, 16, "/key: expected a multiple of 8 bytes (int64 keys), got 199"),
        ("meta", 0, 16, "/meta: expected 200 bytes, as in key, got 0"),
        ("meta", 208, None, "/meta: expected 200 bytes, as in key, got 208"),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: int, dim: int | None, expected: str, tmp_path: Path) -> None:
    path = raw_model(tmp_path)
    resize(path / name, size)
    assert failure(path, dim) == f"{path}{expected}"


def test_an_empty_key_file_beside_rows(tmp_path: Path) -> None:
    path = raw_model(tmp_path)
    (path / "meta").unlink()
    resize(path / "key", 0)
    assert "expected 4 * 16 * 0 = 0 bytes for 0 keys of width 16, got 1600" in failure(path, 16)
    assert "expected 4 * dim * 0 bytes for 0 keys and a whole dim, got 1600" in failure(path)
    resize(path / "emb_vector", 0)
    assert "has no rows, so that its width is unknown; pass dim" in failure(path)
    assert read_all(path, 16) == 0


@pytest.mark.parametrize("name", ["key", "emb_vector"])
def test_a_missing_file_of_the_directory(name: str, tmp_path: Path) -> None:
    path = raw_model(tmp_path)
    (path / name).unlink()
    assert failure(path, 16) == f"{path / name}: no such file"


@pytest.mark.parametrize("name", ["key", "emb_vector", "meta"])
def test_a_directory_or_special_file_instead_of_a_file(name: str, tmp_path: Path) -> None:
    path = raw_model(tmp_path)
    (path / name).unlink()
    (path / name).mkdir()
    assert failure(path, 16) == f"{path / name}: expected a file, got a directory"
    (path / name).rmdir()
    os.mkfifo(path / name)  # to open it would wait for a writer
    assert failure(path, 16) == f"{path / name}: expected a file, got a special file"
    (path / name).unlink()
    (path / name).symlink_to(path / name)  # unreadable for root, too
    assert "cannot be opened: Too many levels of symbolic links" in failure(path, 16)


def test_a_missing_model(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path / "none" / "a.h5", Path(str(tmp_path / "a\0b"))):
        failure(path)
    assert failure(tmp_path / "none.model") == f"{tmp_path / 'none.model'}: no such file or directory"


def test_an_unknown_format_lists_what_was_tried(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello")
    assert failure(path) == f"{path}: expected one of the known formats ({', '.join(found.name for found in formats())})"
    assert "expected a directory holding key and emb_vector, got a file" in failure(save_text(tmp_path / "a.model"))
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty") == f"{tmp_path / 'empty' / 'key'}: no such file"


def save_text(path: Path) -> Path:
    path.write_text("hello")
    return path


@file_format
@pytest.mark.parametrize("content", [b"", b"\0", b"no such thing as a model" * 10])
def test_a_file_that_is_not_of_its_format(name: str, content: bytes, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    path.write_bytes(content)
    failure(path)
    path.unlink()
    path.mkdir()
    assert "expected a file, got a directory" in failure(path)
    path.rmdir()
    os.mkfifo(path)
    assert "expected a file, got a special file" in failure(path)


@every_format
@pytest.mark.parametrize("kept", [0, 1, 30_000])
def test_a_file_that_shrinks_while_it_is_read(name: str, kept: int, tmp_path: Path) -> None:
    n, dim = 20_000, 32
    rows = np.random.default_rng(0).random((n, dim), np.float32)  # nothing that packs into a few bytes
    path = save_model(name, path_for(tmp_path, name), np.arange(n), rows)
    with open_model(path) as model:
        out = np.full((n, dim), 7, np.float32)
        model.read(0, 100, None, out[:100])
        for file in [path] if path.is_file() else path.iterdir():
            resize(file, min(kept, file.stat().st_size))
        with pytest.raises(ModelFileError):
            model.read(100, n, None, out[100:])
        with pytest.raises(ModelFileError, match="an earlier read"):
            model.read(n - 1, n, None, out[:1])


WRONG_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"key": None}, "has no array 'key', found emb_vector"),
    "no rows": ({"emb_vector": None}, "has no array 'emb_vector', found key"),
    "key of two dimensions": ({"key": np.zeros((4, 3), np.int64)}, "key: expected 1 dimension, got shape [4, 3]"),
    "rows of one dimension": ({"emb_vector": np.zeros(4, np.float32)}, "emb_vector: expected 2 dimensions, got shape [4]"),
    "float keys": ({"key": np.zeros(4)}, "key: expected int64 or another integer dtype, got float64"),
    "integer rows": (
        {"emb_vector": np.zeros((4, 3), np.int32)},
        "emb_vector: expected float32 (float16, bfloat16 and float64 are converted, int8 with scale), got int32",
    ),
    "fewer keys": ({"key": np.zeros(3, np.int64)}, "key has 3 elements, emb_vector has 4 rows"),
    "more meta": ({"meta": np.zeros(5, np.int64)}, "meta has 5 elements, emb_vector has 4 rows"),
    "float meta": ({"meta": np.zeros(4, np.float32)}, "meta: expected int64 or another integer dtype, got float32"),
}


@pytest.mark.parametrize("case", WRONG_ARRAYS)
@pytest.mark.parametrize("name", sorted(set(ARRAY_WRITERS) - {"parquet"}))
def test_arrays_that_do_not_fit(name: str, case: str, tmp_path: Path) -> None:
    changes, expected = WRONG_ARRAYS[case]
    arrays = {"key": np.arange(4), "emb_vector": np.zeros((4, 3), np.float32)} | changes
    path = path_for(tmp_path, name)
    ARRAY_WRITERS[name](path, {name: array for name, array in arrays.items() if array is not None})
    if name == "npy" and "no array" in expected:
        expected = "no such file"
    assert expected in failure(path)


def parquet(path: Path, **columns: Any) -> Path:
    defaults = {"key": pa.array([1, 2, 3]), "emb_vector": pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32()))}
    pq.write_table(pa.table({name: array for name, array in (defaults | columns).items() if array is not None}), path)
    return path


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"key": None}, "has no array 'key', found emb_vector"),
        ({"key": pa.array([1, None, 3])}, "key: expected no nulls, got 1 in rows 0..3"),
        ({"key": pa.array([1.0, 2.0, 3.0])}, "key: expected int64 or another integer dtype, got float64"),
        ({"key": pa.array(["a", "b", "c"])}, "key: expected int64 or another integer dtype, got "),
        ({"key": pa.array([[1], [2], [3]])}, "key: expected "),
        ({"emb_vector": pa.array([1.0, 2.0, 3.0])}, "emb_vector: expected lists of float32, got type double"),
        (
            {"emb_vector": pa.array([[1, 2]] * 3)},
            "emb_vector: expected float32 (float16, bfloat16 and float64 are converted, int8 with scale), got int64",
        ),
        (
            {"emb_vector": pa.array([["a"]] * 3)},
            "emb_vector: expected float32 (float16, bfloat16 and float64 are converted, int8 with scale), got ",
        ),
        ({"emb_vector": pa.array([[[1.0]]] * 3)}, "emb_vector: expected "),
        ({"emb_vector": pa.array([[1.0, 2.0], [3.0], [4.0, 5.0]])}, "emb_vector row 1: expected 2 values, got 1"),
        ({"emb_vector": pa.array([[1.0, 2.0], None, [4.0, 5.0]])}, "emb_vector: expected no nulls, got 1 in rows 0..3"),
        ({"emb_vector": pa.array([None, [1.0, 2.0], [4.0, 5.0]])}, "has no first row to tell the width"),
        ({"emb_vector": pa.array([[1.0, 2.0], [3.0, None], [4.0, 5.0]])}, "emb_vector: expected no nulls, got 1"),
        ({"emb_vector": pa.array([[]] * 3, pa.list_(pa.float32()))}, "emb_vector: expected rows of width at least 1, got 0"),
        ({"meta": pa.array([1, 2, None])}, "meta: expected no nulls, got 1"),
    ],
)
def test_parquet_columns_that_do_not_fit(columns: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in failure(parquet(tmp_path / "a.parquet", **columns))


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 2)])
def test_parquet_lists_of_every_kind(kind: Any, tmp_path: Path) -> None:
    rows = [[float(i), -1.0] for i in range(1000)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": np.arange(1000), "emb_vector": pa.array(rows, kind)}), path, row_group_size=77)
    out = np.empty((1000, 2), np.float32)
    with open_model(path) as model:
        model.read(0, 3, None, out[:3])
        model.read(3, 1000, None, out[3:])
    assert out.tolist() == rows
    assert "expected rows of width 3, got 2" in failure(path, 3) or "expected 3 values, got 2" in failure(path, 3)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'needs pyarrow: pip install "hps-numba[parquet]"' in failure(path)


def test_npz_never_unpickles(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
            return Path.touch, (tmp_path / "trapped",)

    assert pickle.loads(pickle.dumps(Trap())) is None and (tmp_path / "trapped").exists()
    (tmp_path / "trapped").unlink()
    for name in ("npz", "npy"):
        path = path_for(tmp_path, name)
        trap = np.array([Trap()], object)
        ARRAY_WRITERS[name](path, {"key": trap, "emb_vector": np.zeros((1, 1), np.float32)})
        assert "expected plain numbers" in failure(path)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["npz", "npy"])
def test_arrays_stored_by_columns(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    ARRAY_WRITERS[name](path, {"key": np.arange(4), "emb_vector": np.zeros((4, 3), np.float32, order="F")})
    assert "emb_vector is stored by columns" in failure(path)


def test_npz_compressed_members_are_checked_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    keys, rows, _ = sample(2000, 16)
    np.savez_compressed(path, key=keys, emb_vector=rows)
    assert read_all(path, 16, 300) == 2000
    with zipfile.ZipFile(path) as archive:
        middle = archive.getinfo("emb_vector.npy").header_offset + archive.getinfo("emb_vector.npy").compress_size // 2
    flip(path, middle)
    failure(path, 16)


def test_npz_whose_member_is_longer_than_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_model("npz", path, *sample(10, 4)[:2])
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", members["key.npy"])
        archive.writestr("emb_vector.npy", members["emb_vector.npy"] + b"\0" * 16)
    assert "emb_vector.npy: expected 128 + 160 bytes for float32[10, 4], got 304" in failure(path)


@pytest.mark.parametrize("name", ["hdf5", "npz", "parquet"])
def test_a_flipped_byte_of_the_rows_fails_a_checksum(name: str, tmp_path: Path) -> None:
    keys, _, _ = sample(100, 16)
    rows = np.full((100, 16), 1.5, np.float32) + np.arange(1600, dtype=np.float32).reshape(100, 16) / 4096
    path = save_model(name, path_for(tmp_path, name), keys, rows)
    if name == "parquet":
        table = {"key": pa.array(keys), "emb_vector": pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), 16)}
        pq.write_table(pa.table(table), path, compression="none", use_dictionary=False, write_page_checksum=True)
    offset = path.read_bytes().index(rows[50].tobytes())
    flip(path, offset + 9)
    failure(path)


def hdf5(path: Path, fill: Callable[[h5py.File], None]) -> Path:
    with h5py.File(path, "w") as file:
        file["key"] = np.arange(100)
        fill(file)
    return path


def test_hdf5_rows_that_were_never_written_are_not_zeros(tmp_path: Path) -> None:
    def half(file: h5py.File) -> None:
        file.create_dataset("emb_vector", (100, 8), "f4", chunks=(10, 4))[:50] = 1

    def nothing(file: h5py.File) -> None:
        file.create_dataset("emb_vector", (100, 8), "f4")

    assert "emb_vector has 10 of 20 chunks; its writer did not finish" in failure(hdf5(tmp_path / "a.h5", half))
    assert "emb_vector has 0 of 3200 bytes; its writer did not finish" in failure(hdf5(tmp_path / "b.h5", nothing))


def test_hdf5_data_of_other_files(tmp_path: Path) -> None:
    save_model("hdf5", tmp_path / "other.h5", *sample(100, 8)[:2])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((100, 8), "f4")
        layout[:] = h5py.VirtualSource(tmp_path / "gone.h5", "x", (100, 8))
        file.create_virtual_dataset("emb_vector", layout)

    def external(file: h5py.File) -> None:
        file.create_dataset("emb_vector", (100, 8), "f4", external=[(tmp_path / "other.h5", 0, 3200)])

    def link(file: h5py.File) -> None:
        file["emb_vector"] = h5py.ExternalLink(tmp_path / "other.h5", "emb_vector")

    for number, fill in enumerate((virtual, external, link)):
        assert "emb_vector: expected data in this file, got data in another one" in failure(
            hdf5(tmp_path / f"{number}.h5", fill)
        )


def test_hdf5_objects_that_are_not_arrays(tmp_path: Path) -> None:
    assert "emb_vector: expected a dataset of numbers, got a Group" in failure(
        hdf5(tmp_path / "a.h5", lambda file: file.create_group("emb_vector") and None)
    )
    empty = hdf5(tmp_path / "b.h5", lambda file: file.create_dataset("emb_vector", data=h5py.Empty("f4")) and None)
    assert "emb_vector: expected a dataset of numbers, got a Dataset without a shape" in failure(empty)


def test_hdf5_one_chunk_for_all_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).random((20_000, 64), np.float32)

    def one_chunk(file: h5py.File) -> None:
        del file["key"]
        file["key"] = np.arange(len(rows))
        file.create_dataset("emb_vector", data=rows, chunks=rows.shape, compression="gzip", compression_opts=1)

    path, out = hdf5(tmp_path / "a.h5", one_chunk), np.empty_like(rows)
    with open_model(path) as model:
        for start in range(0, len(rows), 10):  # 2,000 times unpacking 5 MB would take minutes
            model.read(start, start + 10, None, out[start : start + 10])
    assert out.tobytes() == rows.tobytes()


def safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_safetensors_headers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    key = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    good = {"__metadata__": {"a": "b"}, "key": key, "emb_vector": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]}}
    assert read_all(safetensors(path, good, bytes(16))) == 1
    assert "expected 16 bytes of data, as the header says, got 24" in failure(safetensors(path, good, bytes(24)))
    assert "expected 16 bytes of data, as the header says, got 0" in failure(safetensors(path, good))
    for change, expected in (
        ({"dtype": "F8_E4M3"}, "emb_vector: expected a dtype of"),
        ({"shape": [1, 3]}, "emb_vector has 8 bytes from 8 on, but its shape is F32[1, 3]"),
        ({"shape": [-1, -2]}, "emb_vector: expected sizes of 0 or more, got shape [-1, -2]"),
        ({"data_offsets": [-8, 0]}, "emb_vector has 8 bytes from -8 on"),
        ({"shape": None}, "TypeError"),
    ):
        bad = good | {"emb_vector": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]} | change}
        assert expected in failure(safetensors(path, bad | {"rest": {"data_offsets": [0, 16]}}, bytes(16)))
    assert "expected a JSON object as the header, got list" in failure(safetensors(path, []))
    assert "RecursionError" in failure(safetensors(path, b"[" * 200_000))
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    assert f"expected a header of 2 to 100000000 bytes, got {1 << 62}" in failure(path)
    path.write_bytes((90).to_bytes(8, "little") + b"{}")
    assert "ends after 10 bytes, 98 were expected" in failure(path)
