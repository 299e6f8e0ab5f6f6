"""What other systems write, byte by byte, as the docstrings of ``hps_numba/storage/formats`` cite it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SOK_DTYPES = ("int32", "int64", "uint32", "uint64", "float16", "float32", "float64")


def sok_header(table: str, kind: int, dtype: str, variable: str = "") -> bytes:
    """256 + 4 + 32 + 4 bytes; numbers are big-endian, names padded on the left."""
    return (
        table.rjust(256).encode()
        + struct.pack(">I", kind)
        + variable.rjust(32).encode()
        + struct.pack(">I", SOK_DTYPES.index(dtype))
    )


def save_sok(path: Path, keys: np.ndarray, rows: np.ndarray, table: str = "table0") -> None:
    path.mkdir(exist_ok=True)
    (path / f"{table}-key").write_bytes(sok_header(table, 0, keys.dtype.name) + keys.tobytes())
    (path / f"{table}-weight").write_bytes(sok_header(table, 1, rows.dtype.name) + rows.tobytes())


def save_tfra(path: Path, keys: np.ndarray, rows: np.ndarray, name: str = "emb_mht_1of1_rank0_size1") -> None:
    path.mkdir(exist_ok=True)
    (path / f"{name}-keys").write_bytes(keys.tobytes())
    (path / f"{name}-values").write_bytes(rows.tobytes())


def save_dynamicemb(
    path: Path,
    keys: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray | None = None,
    table: str = "user",
    rank: int = 0,
    ranks: int = 1,
) -> None:
    path.mkdir(exist_ok=True)
    for kind, array in (("keys", keys), ("values", rows), ("scores", scores)):
        if array is not None:
            (path / f"{table}_emb_{kind}.rank_{rank}.world_size_{ranks}").write_bytes(array.tobytes())


def nve_bytes(*matrices: tuple[int, np.ndarray]) -> bytes:
    """A header and, for each (layer, matrix), an entry and the elements."""
    found = struct.pack("<III", 0x4E564500, 0, 2)
    for layer, matrix in matrices:
        rows, columns = matrix.shape
        shape = columns | matrix.dtype.itemsize << 16 | rows << 20
        found += struct.pack("<QQQQ", shape, layer, len(found) + 32 + matrix.nbytes, matrix.nbytes) + matrix.tobytes()
    return found


def save_nve(path: Path, matrix: np.ndarray, dtype: str | None = None) -> Path:
    """An export: ``metadata.json`` beside ``weights/<path.name>``."""
    weights = path / "weights"
    weights.mkdir(parents=True)
    if dtype is not None:
        content: Mapping[str, Any] = {
            "version": 2,
            "resources": {},
            "layers": [{"id": 7, "module_path": "emb", "dtype": dtype}],
        }
        (path / "metadata.json").write_text(json.dumps(content))
    (weights / "mb-1.nve").write_bytes(nve_bytes((7, matrix)))
    return weights / "mb-1.nve"


def save_torch(path: Path, content: Any) -> None:
    torch = pytest.importorskip("torch")
    with path.open("wb") as file:
        torch.save(content, file)


def _torch_table(path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None) -> None:
    torch = pytest.importorskip("torch")
    save_torch(path, {"sparse_arch.embedding_bags.items.weight": torch.from_numpy(rows.copy())})


PRODUCERS: dict[str, Callable[[Path, np.ndarray, np.ndarray, np.ndarray | None], Any]] = {
    "dynamicemb": save_dynamicemb,
    "nve": lambda path, keys, rows, meta: path.write_bytes(nve_bytes((1, rows))),
    "sok": lambda path, keys, rows, meta: save_sok(path, keys, rows),
    "tfra": lambda path, keys, rows, meta: save_tfra(path, keys, rows),
    "torch": _torch_table,
}
"""Formats that others write and this package only reads: name -> a writer of one table."""

ROW_NUMBERS = {"nve", "torch"}
"""Those without keys: a row's number is its key."""
