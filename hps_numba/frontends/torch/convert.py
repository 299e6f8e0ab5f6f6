"""``torch.nn.Embedding`` to a sparse model and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from hps_numba.config.arguments import as_flag
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError
from hps_numba.storage.model_files import open_model, write_model

__all__ = ["load_embedding", "save_embedding"]

_CHUNK_ROWS = 1 << 16


def save_embedding(
    embedding: torch.nn.Embedding | torch.nn.EmbeddingBag | torch.Tensor,
    path: str | os.PathLike[str],
    *,
    keys: Any = None,
    format: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write the rows of an embedding as a sparse model, for the ``sparse_files`` of a config; returns how many.

    Args:
        embedding: a module with a ``weight``, or the weight: floats ``[rows, dim]`` on any device.
        path: to be created; a directory, or a ``.h5`` file (``format`` and ``overwrite`` as for ``write_model``).
        keys: integers ``[rows]``, one per row; by default the row numbers.

    Raises:
        ConfigError (a ValueError): it is not a matrix, or there is not one key per row.
        ModelFileError: as ``write_model``.   KeyDtypeError: keys are not integers.
    """
    weight = getattr(embedding, "weight", embedding)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{list(weight.shape)} of {weight.dtype}" if isinstance(weight, torch.Tensor) else type(embedding).__name__
        raise ConfigError(f"embedding: expected a module with a weight, or floats [rows, dim], got {got}")
    rows = weight.shape[0]
    try:
        names = np.arange(rows) if keys is None else np.asarray(keys.cpu() if isinstance(keys, torch.Tensor) else keys)
    except Exception as problem:  # ragged lists, or whatever a foreign object raises
        raise ConfigError(f"keys: expected an array of [{rows}] integers, got {show(keys)}") from problem
    if names.shape != (rows,):
        raise ConfigError(f"keys: expected [{rows}], one a row, got {list(names.shape)}")

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, rows, _CHUNK_ROWS):
            part = weight[start : start + _CHUNK_ROWS].detach().to("cpu", torch.float32)
            yield names[start : start + _CHUNK_ROWS], part.numpy()

    return write_model(path, weight.shape[1], chunks(), format=format, rows=rows, overwrite=overwrite)


def load_embedding(path: str | os.PathLike[str], *, freeze: bool = True) -> tuple[torch.nn.Embedding, torch.Tensor]:
    """A sparse model as ``torch.nn.Embedding``, and the key of each of its rows: int64 ``[rows]``.

    Args:
        path: of any format that ``open_model`` reads.   freeze: the weight does not require a gradient.

    Raises:
        ModelFileError: as ``open_model``.
    """
    freeze = as_flag(freeze, "freeze")
    with open_model(path) as model:
        keys, rows = np.empty(model.rows, np.int64), np.empty((model.rows, model.dim), np.float32)
        model.read(0, model.rows, keys, rows)
    return torch.nn.Embedding.from_pretrained(torch.from_numpy(rows), freeze=freeze), torch.from_numpy(keys)
