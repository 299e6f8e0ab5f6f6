"""Checkpoints of a Torch model with trained rows: rows, their optimizer and the dense part, in one file, written atomically."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable
from typing import Any

import torch

from hps_numba.errors import ConfigError, ModelFileError
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
        ModelFileError: it cannot be written, or there is something else than a checkpoint at ``path``.
        Otherwise as ``HPS.locked_table``.
    """

    def extra() -> dict[str, bytes]:
        return {_SETTINGS: _packed(_settings_of(optimizer)), _DENSE: _packed(dense)}

    return save_trained(path, _checked(optimizer).trainers(), extra)


def load_checkpoint(path: str | os.PathLike[str], optimizer: RowOptimizer) -> Any:
    """Restore the tables and the state of an optimizer from a checkpoint; returns ``dense``, on the CPU.

    Build the optimizer first, of the same kind and on the same tables in the same order. Rows that are not in the file are
    erased, and gradients are dropped. With several processes, each loads.

    Raises:
        ModelFileError: the file is missing or damaged.
        ConfigError (a ValueError): it is that of other tables or of another optimizer.   Otherwise as ``HPS.insert``.
        Nothing changed then, nor after an interrupt: rows that were written are taken back.
    """

    def accept(file: CheckpointReader) -> tuple[Any, Any]:
        dense = _unpacked(file, _DENSE)
        settings = _unpacked(file, _SETTINGS)
        if settings is not None:
            _check_settings(file, settings, _settings_of(optimizer), optimizer.defaults)
        return dense, settings

    def then(accepted: tuple[Any, Any]) -> None:
        _, settings = accepted
        if settings is not None:  # else the file is of another front end, and the optimizer keeps its own
            optimizer.set_settings(settings)
        optimizer.zero_grad()

    dense, _ = load_trained(path, _checked(optimizer).trainers(), accept, then)
    return dense


def _checked(optimizer: Any) -> RowOptimizer:
    if not isinstance(optimizer, RowOptimizer):
        raise ConfigError(f"optimizer: expected one of hps_numba.frontends.torch, got {type(optimizer).__name__}")
    return optimizer


def _settings_of(optimizer: RowOptimizer) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    return groups


def _packed(thing: Any) -> bytes:
    memory = io.BytesIO()
    torch.save(thing, memory)
    return memory.getvalue()


def _unpacked(file: CheckpointReader, name: str) -> Any:
    content = file.extra(name)
    if content is None:
        return None
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises whatever its unpickler does
        text = " ".join(str(problem).split())[:300]
        raise ModelFileError(f"{file.path}: {name}: cannot be read: {type(problem).__name__}: {text}") from problem


def _check_settings(file: CheckpointReader, found: Any, expected: list[dict[str, Any]], names: Iterable[str]) -> None:
    """Raise unless these are settings of an optimizer like this one: a wrong one would show at the next step only."""
    if not isinstance(found, list) or not all(isinstance(group, dict) for group in found):
        raise ModelFileError(f"{file.path}: {_SETTINGS}: expected a list of groups, got {found!r:.200}")
    if len(found) != len(expected):
        raise ConfigError(f"{file.path}: expected an optimizer of {len(expected)} groups, got one of {len(found)}")
    for number, (group, own) in enumerate(zip(found, expected, strict=True)):
        for name in ("params", *names):
            wanted, got = _numbers(own[name]), _numbers(group.get(name))
            if wanted is not None and (got is None or len(got) != len(wanted)):
                expectation = f"a setting like {own[name]!r}"
                raise ConfigError(f"{file.path}: group {number}: {name}: expected {expectation}, got {group.get(name)!r:.100}")


def _numbers(value: Any) -> list[float] | None:
    """A setting as numbers; None if it is none, or one that no optimizer accepts."""
    try:
        numbers = [float(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    return numbers if all(math.isfinite(one) and one >= 0 for one in numbers) else None
