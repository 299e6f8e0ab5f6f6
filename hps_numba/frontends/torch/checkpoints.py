"""Checkpoints of a Torch model with trained rows: rows, their optimizer and the dense part, in one file, written atomically."""

from __future__ import annotations

import io
import os
from typing import Any

import torch

from hps_numba.frontends.torch.optimizers import RowOptimizer
from hps_numba.training.checkpoint_files import CheckpointReader
from hps_numba.training.checkpoints import load_trained, save_trained

__all__ = ["load_checkpoint", "save_checkpoint"]

_SETTINGS, _DENSE = "param_groups.pt", "dense.pt"


def save_checkpoint(path: str | os.PathLike[str], optimizer: RowOptimizer, *, dense: Any = None) -> int:
    """Write the rows of all tables of an optimizer, and its state, to the file at ``path``; returns how many rows.

    A crash at any moment leaves the old file intact. Lookups continue meanwhile; steps wait. With several processes, one saves.

    Args:
        path: of the file, by convention ``.npz``: ``np.load`` can read it.
        dense: anything that ``torch.save`` accepts and ``torch.load(weights_only=True)`` returns, stored with the rows:
            ``{"model": model.state_dict(), "optimizer": dense_optimizer.state_dict(), "epoch": 3}``.

    Raises:
        ModelFileError: it cannot be written.   Otherwise as ``HPS.locked_table``.
    """

    def extra() -> dict[str, bytes]:
        return {_SETTINGS: _packed(_settings_of(optimizer)), _DENSE: _packed(dense)}

    return save_trained(path, optimizer.trainers(), extra)


def load_checkpoint(path: str | os.PathLike[str], optimizer: RowOptimizer) -> Any:
    """Restore the tables and the state of an optimizer from a checkpoint; returns ``dense``, on the CPU.

    Build the optimizer first, of the same kind and on the same tables in the same order. Rows that are not in the file are
    erased, and gradients are dropped. With several processes, each loads.

    Raises:
        ModelFileError: the file is missing or damaged; nothing changed.
        ConfigError (a ValueError): it is that of other tables or of another optimizer; nothing changed.   Otherwise as
            ``HPS.insert``.
    """

    def accept(file: CheckpointReader) -> Any:
        dense = _unpacked(file.extra(_DENSE))
        optimizer.set_settings(_unpacked(file.extra(_SETTINGS)))
        return dense

    dense = load_trained(path, optimizer.trainers(), accept)
    optimizer.zero_grad()
    return dense


def _settings_of(optimizer: RowOptimizer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    return groups


def _packed(thing: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(thing, memory)
    return memory.getvalue()


def _unpacked(content: bytes | None) -> Any:
    return None if content is None else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
