"""Rows at random places of a sparse model."""

from __future__ import annotations

import numpy as np

__all__ = ["random_ranges"]

_BLOCK = 64  # rows that are read together


def random_ranges(rows: int, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Ascending, disjoint ranges of about ``count`` of ``rows`` rows: blocks of 64 rows, or of ``count`` if that is less."""
    block = min(_BLOCK, count)
    blocks = -(-rows // block)
    chosen = np.sort(rng.choice(blocks, min(blocks, -(-count // block)), replace=False)) if blocks else ()
    return [(int(number) * block, min(int(number) * block + block, rows)) for number in chosen]
