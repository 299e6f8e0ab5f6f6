"""Dense programs of Torch that take rows: one linear layer, with weights that add exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

__all__ = ["save_scores", "scores_of"]


def scores_of(**arguments: Any) -> np.ndarray:
    """What a program of ``save_scores`` answers: float32 ``[samples, 1]``."""
    columns = np.concatenate([np.asarray(value, np.float32).reshape(len(value), -1) for value in arguments.values()], 1)
    return (columns @ weights(columns.shape[1]))[:, None]


def weights(n: int) -> np.ndarray:
    """Powers of two, so that small rows add without rounding."""
    return (2.0 ** (np.arange(n) % 3 - 1)).astype(np.float32)


def save_scores(path: Path, **shapes: tuple[int, ...]) -> Path:
    """Write a program whose arguments have these names and, behind that of samples, these dimensions; returns the path."""
    torch = pytest.importorskip("torch")
    width = sum(int(np.prod(shape)) for shape in shapes.values())
    names = list(shapes)
    source = (
        "class Scores(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('weights', torch.from_numpy(weights(width)))\n"
        f"    def forward(self, {', '.join(names)}):\n"
        f"        columns = torch.cat([{', '.join(f'{name}.flatten(1)' for name in names)}], 1)\n"
        "        return (columns * self.weights).sum(1, keepdim=True)\n"
    )
    made: dict[str, Any] = {"torch": torch, "weights": weights, "width": width}
    exec(source, made)  # forward needs arguments of the given names
    samples = torch.export.Dim("samples", min=1)
    example = tuple(torch.zeros(3, *shape) for shape in shapes.values())
    program = torch.export.export(made["Scores"]().eval(), example, dynamic_shapes={name: {0: samples} for name in names})
    torch.export.save(program, path)
    return path
