"""Models for the host benchmarks: permuted multiples of an odd number as keys, random rows, in directory form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["config_of", "save_model"]

ODD = 0x9E3779B1
_CHUNK_BYTES = 64 << 20


def save_model(folder: Path, rows: int, dim: int) -> np.ndarray:
    """Write a model; returns its keys in the order of the file."""
    rng = np.random.default_rng(dim)
    keys = rng.permutation(rows) * ODD
    folder.mkdir()
    keys.tofile(folder / "key")
    step = _CHUNK_BYTES // (4 * dim)
    with (folder / "emb_vector").open("wb") as file:
        for start in range(0, rows, step):
            rng.random((min(step, rows - start), dim), np.float32).tofile(file)
        file.flush()
        os.fsync(file.fileno())  # otherwise the system writes it to disk during a measurement
    return keys


def config_of(folder: Path, dim: int) -> dict[str, Any]:
    """A config with this model, called ``m``, and one table in host memory."""
    model = {
        "model": "m",
        "sparse_files": [str(folder)],
        "embedding_vecsize_per_table": [dim],
        "default_value_for_each_table": [0.0],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "deployed_device_list": [],
        "max_batch_size": 1024,
    }
    return {"supportlonglong": True, "models": [model]}
