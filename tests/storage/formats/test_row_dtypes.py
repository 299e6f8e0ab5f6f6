"""Rows of fewer bytes in model files: float16, bfloat16, and int8 with a scale a row (row F14)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from support.sample_models import ARRAY_WRITERS, failure, path_for, sample

from hps_numba.errors import ConfigError, ModelFileError
from hps_numba.storage.formats._rounding import as_stored
from hps_numba.storage.model_files import convert_model, open_model, write_model
from hps_numba.testing.formats import read_all

ml_dtypes = pytest.importorskip("ml_dtypes")  # comes with TensorFlow and JAX
DIM = 5
BITS = np.arange(1 << 16, dtype=np.uint16)
"""Of all numbers of 16 bits."""


def bfloat16_of(bits: np.ndarray) -> np.ndarray:
    """What bfloat16 is: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def directory(path: Path, keys: np.ndarray, rows: np.ndarray, dtype: str, **more: np.ndarray) -> Path:
    path.mkdir()
    for name, array in {"key": keys, "emb_vector": rows, **more}.items():
        array.tofile(path / name)
    (path / "dtype").write_text(dtype)
    return path


def rows_of(path: Path, dim: int | None = None) -> np.ndarray:
    with open_model(path, dim) as model:
        return read_all(model, [model.rows // 2])[1]


# -- all numbers of 16 bits -----------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted(ARRAY_WRITERS), "directory"])
def test_every_float16_is_exact(name: str, tmp_path: Path) -> None:
    halves = BITS.view(np.float16).reshape(-1, 256)
    path, keys = path_for(tmp_path, name), np.arange(256)
    if name == "directory":
        directory(path, keys, halves, "float16")
    else:
        ARRAY_WRITERS[name](path, {"key": keys, "emb_vector": halves})
    np.testing.assert_array_equal(rows_of(path), halves.astype(np.float32))
    with open_model(path) as model:
        assert model.row_dtype == "float16"


def _save_safetensors(path: Path, keys: np.ndarray, bits: np.ndarray) -> None:
    safetensors.numpy.save_file({"key": keys, "emb_vector": bits.view(ml_dtypes.bfloat16)}, path)


def _save_npy(path: Path, keys: np.ndarray, bits: np.ndarray) -> None:
    ARRAY_WRITERS["npy"](path, {"key": keys, "emb_vector": bits.view(ml_dtypes.bfloat16)})


def _save_npz(path: Path, keys: np.ndarray, bits: np.ndarray) -> None:
    ARRAY_WRITERS["npz"](path, {"key": keys, "emb_vector": bits.view(ml_dtypes.bfloat16)})


def _save_torch(path: Path, keys: np.ndarray, bits: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    with path.open("wb") as file:
        torch.save({"embeddings.t.weight": torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)}, file)


BFLOAT16: dict[str, Callable[[Path, np.ndarray, np.ndarray], Any]] = {
    "safetensors": _save_safetensors,
    "npy": _save_npy,
    "npz": _save_npz,
    "torch": _save_torch,
    "directory": lambda path, keys, bits: directory(path, keys, bits, "bfloat16\n"),
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_every_bfloat16_is_exact(name: str, tmp_path: Path) -> None:
    path, bits = path_for(tmp_path, name), BITS.reshape(-1, 256)
    BFLOAT16[name](path, np.arange(256), bits)
    assert rows_of(path).view(np.uint32).tolist() == (bits.astype(np.uint32) << 16).tolist(), "NaN keep their bits"
    with open_model(path) as model:
        assert model.row_dtype == "bfloat16"


# -- int8 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*sorted(ARRAY_WRITERS), "directory"])
@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "float64"])
def test_int8_times_scale(name: str, scale_dtype: str, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 400_000 // DIM  # more than one piece
    rows, scales = rng.integers(-128, 128, (n, DIM), np.int8), rng.random(n).astype(scale_dtype)
    path = path_for(tmp_path, name)
    if name == "directory":
        scales = scales.astype(np.float32)
        directory(path, np.arange(n), rows, "int8", scale=scales)
    else:
        ARRAY_WRITERS[name](path, {"key": np.arange(n), "emb_vector": rows, "scale": scales, "more": scales})
    expected = rows.astype(np.float32) * scales.astype(np.float32)[:, None]
    assert rows_of(path).tobytes() == expected.tobytes()
    with open_model(path) as model:
        assert model.row_dtype == "int8" and model.ignored == (() if name == "directory" else ("more",))


@pytest.mark.parametrize("name", sorted(ARRAY_WRITERS))
def test_scales_that_do_not_fit(name: str, tmp_path: Path) -> None:
    rows = np.ones((6, DIM), np.int8)
    for number, (change, expected) in enumerate(
        (
            ({}, "emb_vector: expected an array scale, float32 [rows], beside int8 rows, found none"),
            ({"scale": np.ones(5, np.float32)}, "scale has 5 elements, emb_vector has 6 rows"),
            ({"scale": np.ones(6, np.int32)}, "scale: expected float32, got int32"),
            ({"scale": np.array([1, 1, 1, np.nan, 1, 1], np.float32)}, "scale: expected finite numbers, got nan at row 3"),
        )
    ):
        if name == "parquet" and len(change.get("scale", rows)) == 5:
            continue  # columns of a file have one length
        path = path_for(tmp_path, name, f"t{number}")
        ARRAY_WRITERS[name](path, {"key": np.arange(6), "emb_vector": rows, **change})
        assert expected in failure(path)


@pytest.mark.parametrize("name", sorted(ARRAY_WRITERS))
def test_a_scale_beside_floats_is_left_out(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(6, DIM)
    path = path_for(tmp_path, name)
    ARRAY_WRITERS[name](path, {"key": keys, "emb_vector": rows, "scale": np.arange(6)})
    assert rows_of(path).tobytes() == rows.tobytes()
    with open_model(path) as model:
        assert model.ignored == ("scale",)


# -- the declaration of a directory ---------------------------------------------------------


def test_declarations_that_do_not_fit(tmp_path: Path) -> None:
    keys, rows = np.arange(6), np.ones((6, DIM), np.float16)
    for number, (dtype, more, expected) in enumerate(
        (
            ("float8", {}, "dtype: expected one of float32, float16, bfloat16, int8, got 'float8'"),
            ("\xff" * 100, {}, "dtype: expected one of"),
            (
                "float32",
                {},
                "emb_vector: expected 4 * 5 * 6 = 120 bytes for 6 keys of width 5, got 60; are these float16 rows?",
            ),
            ("int8", {}, "emb_vector: expected 1 * 5 * 6 = 30 bytes for 6 keys of width 5, got 60"),
            (
                "float16",
                {"emb_vector": rows.view(np.uint8).ravel()[:-1]},
                "emb_vector: expected a multiple of 2 bytes (float16",
            ),
            ("int8", {"emb_vector": np.ones((6, DIM), np.int8)}, "expected an array scale"),
            ("int8", {"emb_vector": np.ones(30, np.int8), "scale": np.ones(5, np.float32)}, "scale: expected 4 * 6 bytes"),
        )
    ):
        assert expected in failure(directory(tmp_path / f"{number}", keys, rows, dtype, **more), DIM)


# -- writing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        (suffix, dtype)
        for suffix in (".model", ".h5")
        for dtype in ("float16", "bfloat16", "int8")
        if (suffix, dtype) != (".h5", "bfloat16")
    ],
)
def test_rounded_models(suffix: str, dtype: str, tmp_path: Path) -> None:
    keys, rows, meta = sample(50, DIM)
    rows[7] = 0
    losses: list[float] = []
    path = tmp_path / f"a{suffix}"
    write_model(
        path, DIM, [(keys[:20], rows[:20], meta[:20]), (keys[20:], rows[20:], meta[20:])], dtype=dtype, on_loss=losses.append
    )
    with open_model(path) as model:
        got = read_all(model, [13])
        assert model.row_dtype == dtype and model.ignored == ()
    assert got[0].tolist() == keys.tolist() and got[2] is not None and got[2].tolist() == meta.tolist()
    errors = np.abs(got[1].astype(np.float64) - rows)
    assert losses == [errors.max()] and losses[0] > 0
    bounds = {"float16": np.abs(rows) * 2**-11, "bfloat16": np.abs(rows) * 2**-8, "int8": np.abs(rows).max(1)[:, None] / 253}
    assert (errors <= bounds[dtype]).all() and not got[1][7].any()
    assert convert_model(path, tmp_path / "again.model", dtype=dtype, on_loss=losses.append) == 50
    assert losses[1] <= losses[0] * 1e-3, "rounding twice changes (almost) nothing"


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = np.random.default_rng(1).integers(0, 1 << 32, (1000, 8), np.uint32)
    bits[0] = (0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F800001, 0x80000001)
    with np.errstate(invalid="ignore"):
        expected = bits.view(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    got = as_stored(bits.view(np.float32), "bfloat16")[0].view(np.uint16)
    numbers = ~np.isnan(bits.view(np.float32))
    assert got[numbers].tolist() == expected[numbers].tolist()
    assert np.isnan(bfloat16_of(got[~numbers])).all()


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("float16", 1e5, "row 3: expected values in the range of float16, got 100000.0"),
        ("bfloat16", 3.4e38, "row 3: expected values in the range of bfloat16, got 3.39"),
        ("int8", np.nan, "row 3: expected finite values, got nan"),
        ("int8", np.inf, "row 3: expected finite values, got inf"),
    ],
)
def test_what_a_dtype_cannot_hold(dtype: str, value: float, expected: str, tmp_path: Path) -> None:
    rows = np.ones((5, DIM), np.float32)
    rows[3, 2] = value
    with pytest.raises(ModelFileError, match=expected):
        write_model(tmp_path / "a", DIM, [(np.arange(2), rows[:2]), (np.arange(2, 5), rows[2:])], dtype=dtype)
    assert not (tmp_path / "a").exists()


def test_infinity_and_nan_stay_in_half_types(tmp_path: Path) -> None:
    rows = np.array([[np.inf, -np.inf, np.nan, 0, 1e-30]], np.float32)
    for dtype in ("float16", "bfloat16"):
        write_model(tmp_path / dtype, DIM, [(np.arange(1), rows)], dtype=dtype)
        got = rows_of(tmp_path / dtype)
        assert np.isinf(got[0, :2]).all() and np.isnan(got[0, 2]) and got[0, 3] == 0


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    for dtype in ("float8", ["int8"], None):
        with pytest.raises(ConfigError, match="dtype: expected one of float32, float16, bfloat16, int8, got"):
            write_model(tmp_path / "a", DIM, [], dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=r"expected a format that can write bfloat16 rows \(directory\), got hdf5"):
        write_model(tmp_path / "a.h5", DIM, [], dtype="bfloat16")


def test_a_rounded_directory_is_replaced(tmp_path: Path) -> None:
    keys, rows, _ = sample(6, DIM)
    write_model(tmp_path / "a", DIM, [(keys, rows)], dtype="int8")
    write_model(tmp_path / "a", DIM, [(keys, rows)], overwrite=True)
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["emb_vector", "key"]
    assert rows_of(tmp_path / "a").tobytes() == rows.tobytes()


def test_other_libraries_agree_with_what_is_written(tmp_path: Path) -> None:
    keys, rows, _ = sample(6, DIM)
    write_model(tmp_path / "a.h5", DIM, [(keys, rows)], dtype="float16")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["emb_vector"].dtype == np.float16
        np.testing.assert_array_equal(file["emb_vector"][:], rows.astype(np.float16))
    pq.write_table(pa.table({"key": keys, "emb_vector": pa.array(list(rows.astype(np.float16)))}), tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet").tobytes() == rows.astype(np.float16).astype(np.float32).tobytes()
