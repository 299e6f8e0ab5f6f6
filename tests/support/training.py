"""Optimizer steps on arrays, for comparison with those on rows of a server."""

from __future__ import annotations

import numpy as np

from hps_numba.training.trainer import Places, Rule

__all__ = ["addresses_of_rows", "apply", "sum_in_blocks"]


def sum_in_blocks(rows: np.ndarray, block: int = 64) -> np.ndarray:
    """Sum of float32 rows ``[n, dim]``: of blocks one after the other, then of the sums of blocks, until there is one."""
    while len(rows) > 1:
        sums = []
        for start in range(0, len(rows), block):
            total = rows[start]
            for row in rows[start + 1 : start + block]:
                total = total + row
            sums.append(total)
        rows = np.array(sums)
    return rows[0]


def addresses_of_rows(rows: np.ndarray) -> np.ndarray:
    """int64 ``[n]``: the address of each row of a contiguous array."""
    start, step = rows.__array_interface__["data"][0], rows.strides[0]
    return np.array(start + step * np.arange(len(rows)), np.int64)


def apply(rule: Rule, rows: np.ndarray, states: np.ndarray, gradients: np.ndarray, step: int) -> None:
    """Change float32 rows ``[n, dim]`` and their states ``[n, width]`` in place."""
    places, state_places = (addresses_of_rows(some) for some in (rows, states))
    rule.apply(Places(places, places), Places(state_places, state_places), gradients, step, keep=False)
