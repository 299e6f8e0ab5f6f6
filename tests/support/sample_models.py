"""Sparse models for tests, in every format. Formats that cannot write have a writer here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from support.producers import PRODUCERS

from hps_numba import plugins
from hps_numba.errors import ModelFileError
from hps_numba.storage.formats._format import SparseModelFormat
from hps_numba.storage.model_files import open_model

PACKAGE = "hps_numba.storage.formats"
FORMATS = [name for name in plugins.names(PACKAGE) if name not in PRODUCERS]
"""Formats of any keys, with meta; those of other systems are in ``producers.py``."""

Arrays = Mapping[str, np.ndarray]


def _save_hdf5(path: Path, arrays: Arrays) -> None:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def _save_npy(path: Path, arrays: Arrays) -> None:
    path.mkdir()
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)


def _save_npz(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _save_safetensors(path: Path, arrays: Arrays) -> None:
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _save_parquet(path: Path, arrays: Arrays) -> None:
    columns = {name: pa.array(array) if array.ndim == 1 else _lists(array) for name, array in arrays.items()}
    pq.write_table(pa.table(columns), path, write_page_checksum=True)


def _lists(array: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(array.reshape(-1)), array.shape[1])


ARRAY_WRITERS: dict[str, Callable[[Path, Arrays], None]] = {
    "hdf5": _save_hdf5,
    "npy": _save_npy,
    "npz": _save_npz,
    "safetensors": _save_safetensors,
    "parquet": _save_parquet,
}
"""For formats that record names, shapes and dtypes: writers of any arrays, right or wrong."""


def part(name: str) -> SparseModelFormat:
    """The format called ``name``."""
    found = plugins.load(PACKAGE, name)
    assert isinstance(found, SparseModelFormat)
    return found


def path_for(folder: Path, name: str, stem: str = "table") -> Path:
    """A path in ``folder`` with a suffix of the format."""
    return folder / f"{stem}{part(name).suffixes[-1]}"


def save_model(name: str, path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None = None) -> Path:
    """A whole model in format ``name``."""
    if part(name).can_write:
        assert part(name).write(path, rows.shape[1], [(keys, rows, meta)]) == len(keys)
        return path
    if name not in ARRAY_WRITERS:
        pytest.fail(f"format {name} cannot write: add a writer to ARRAY_WRITERS in {__file__}")
    ARRAY_WRITERS[name](path, {"key": keys, "emb_vector": rows} | ({} if meta is None else {"meta": meta}))
    return path


def sample(n: int, dim: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Distinct keys from all over int64, rows and meta of ``n`` rows."""
    rng = np.random.default_rng([seed, n, dim])
    extremes = np.array([0, -1, np.iinfo(np.int64).min, np.iinfo(np.int64).max, 2**32 - 1, 2**32])
    keys = np.unique(np.concatenate([extremes, rng.integers(np.iinfo(np.int64).min, np.iinfo(np.int64).max, n)]))
    rng.shuffle(keys)
    return keys[:n], rng.standard_normal((n, dim)).astype(np.float32), rng.integers(0, 1 << 40, n)


def read_all(path: Path, dim: int | None = None, chunk_rows: int | None = None) -> int:
    """Read everything and return the number of rows."""
    with open_model(path, dim) as model:
        return sum(len(keys) for keys, _, _ in model.chunks(chunk_rows))


def failure(path: Path, dim: int | None = None) -> str:
    """The message with which reading fails; it is one line and names the path."""
    with pytest.raises(ModelFileError) as caught:
        read_all(path, dim)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def resize(path: Path, size: int) -> None:
    """Cut a file short, or append zeros."""
    with path.open("r+b") as file:
        file.truncate(size)
