"""Two sparse models of one table, compared bit by bit: which rows are new or changed, and which keys are gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hps_numba.errors import ModelFileError
from hps_numba.storage.loading import stream_table
from hps_numba.storage.model_files import open_model
from hps_numba.storage.urls import Place

__all__ = ["Difference", "differences"]

_BYTES_AT_ONCE = 1 << 30  # of keys and rows of both models in memory
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio (Knuth): spreads ranges of keys

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class Difference:
    """What became of a share of the keys.

    Attributes:
        keys, rows: that are new or changed, int64 ``[n]`` and float32 ``[n, dim]``.
        gone: keys that the new model lacks, int64 ``[m]``.   unchanged: how many rows are as they were.
    """

    keys: np.ndarray
    rows: np.ndarray
    gone: np.ndarray
    unchanged: int


def differences(
    old: Place, new: Place, dim: int | None, *, key_bits: int, on_rows: OnRows, bytes_at_once: int = _BYTES_AT_ONCE
) -> Iterator[Difference]:
    """Compare models in shares of all keys; of equal keys of a model, the last counts.

    Memory is bounded: models that are larger than ``bytes_at_once`` together are read once for each share.

    Args:
        dim: width that both must have, or None.   on_rows: told how many more rows were read.

    Raises:
        ModelFileError: a model is missing, damaged, or of another width than the other.
    """
    with open_model(old, dim) as before, open_model(new, dim) as after:
        if before.dim != after.dim:
            raise ModelFileError(f"{old}: expected rows of width {after.dim}, as {new} has, got {before.dim}")
        dim, size = after.dim, (before.rows + after.rows) * (8 + 4 * after.dim)
    shares = max(1, -(-size // bytes_at_once))
    for share in range(shares):
        first, last = (_share_of(place, dim, share, shares, key_bits, on_rows) for place in (old, new))
        yield _compared(*first, *last)


def _share_of(place: Place, dim: int, share: int, shares: int, key_bits: int, on_rows: OnRows) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ascending keys of a share, and their rows."""
    keys, rows = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    with open_model(place, dim) as model:
        for some, part in stream_table(model, model.rows, key_bits=key_bits):
            hashed = some.view(np.uint64) * _FACTOR >> np.uint64(32)
            mine = hashed % np.uint64(shares) == share
            keys.append(some[mine])
            rows.append(part[mine])
            on_rows(len(some))
    every = np.concatenate(keys)
    distinct, from_end = np.unique(every[::-1], return_index=True)
    return distinct, np.concatenate(rows)[len(every) - 1 - from_end]


def _compared(old_keys: np.ndarray, old_rows: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> Difference:
    at = np.searchsorted(old_keys, keys)
    known = at < len(old_keys)
    known[known] = old_keys[at[known]] == keys[known]
    same = known.copy()
    same[known] = (old_rows[at[known]].view(np.uint32) == rows[known].view(np.uint32)).all(1)
    gone = np.ones(len(old_keys), bool)
    gone[at[known]] = False
    return Difference(keys[~same], rows[~same], old_keys[gone], int(np.count_nonzero(same)))
