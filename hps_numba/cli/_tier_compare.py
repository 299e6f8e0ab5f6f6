"""A tier and the sparse model that it should hold, compared row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hps_numba.cli._model_samples import random_ranges
from hps_numba.cli._tiers import fetch_all
from hps_numba.storage.formats._format import SparseModelReader, rows_per_chunk
from hps_numba.storage.loading import check_key_width
from hps_numba.storage.model_files import open_model
from hps_numba.storage.tiers._checked import CheckedTier

__all__ = ["Difference", "compare_table"]

_LISTED = 5  # keys of each kind
_KEYS_AT_ONCE = 1 << 24  # held in memory, to be looked for in the model's keys
_READ_KEYS = 1 << 20

OnRows = Callable[[int], None]


@dataclass
class Difference:
    """What a comparison found.

    Attributes:
        rows: of the model.   compared: those that were looked for in the tier.
        missing: those whose key the tier lacks.
        wrong: those that differ in a bit; a row whose key a later row has does not count.
        extra: keys of the tier that the model lacks; None if they were not looked for.
        missing_keys, wrong_keys, extra_keys: the first few of each.
    """

    rows: int = 0
    compared: int = 0
    missing: int = 0
    wrong: int = 0
    extra: int | None = None
    missing_keys: list[int] = field(default_factory=list)
    wrong_keys: list[int] = field(default_factory=list)
    extra_keys: list[int] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.missing or self.wrong or self.extra)


def compare_table(
    tier: CheckedTier, tag: str, path: str | Path, dim: int, *, key_bits: int, sample: int | None, seed: int, on_rows: OnRows
) -> Difference:
    """Compare the rows of a sparse model with those of a table, bit by bit.

    Memory does not depend on the size of either: differing rows and keys of the tier are looked up in the model's keys some
    millions at a time, with one pass over the keys for each.

    Args:
        sample: how many rows of the model to look for, in blocks of rows at random places; None: all, and the tier is read
            as well, for keys that the model lacks.
        on_rows: told how many more rows of the model, and of the tier, were read.

    Raises:
        TierError: the tier failed.   ModelFileError: the model is missing, damaged or of another width.
    """
    found = Difference()
    wrong = _Wrong(found, path, dim)
    with open_model(path, dim) as model:
        found.rows = model.rows
        for positions, keys, rows in _pieces(model, _ranges(model.rows, sample, seed, rows_per_chunk(dim))):
            check_key_width(model, keys, int(positions[0]), key_bits=key_bits)
            there, differs = _looked_up(tier, tag, keys, rows)
            found.compared += len(keys)
            found.missing += int(np.count_nonzero(~there))
            _list(found.missing_keys, keys[~there])
            wrong.add(keys[differs], positions[differs])
            on_rows(len(keys))
    wrong.settle()
    if sample is None:
        _find_extra(found, tier, tag, path, dim, on_rows)
    return found


def _ranges(rows: int, sample: int | None, seed: int, step: int) -> Iterator[list[tuple[int, int]]]:
    """Ascending ranges of rows; those of one list, about ``step`` rows, are looked up together."""
    if sample is None:
        yield from ([(start, min(start + step, rows))] for start in range(0, rows, step))
        return
    ranges = random_ranges(rows, sample, np.random.default_rng(seed))
    together = max(1, step // max((stop - start for start, stop in ranges), default=1))
    yield from (ranges[first : first + together] for first in range(0, len(ranges), together))


def _pieces(
    model: SparseModelReader, lists: Iterator[list[tuple[int, int]]]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Row numbers, keys and rows of each list of ranges."""
    for ranges in lists:
        positions = np.concatenate([np.arange(start, stop) for start, stop in ranges])
        keys, rows = np.empty(len(positions), np.int64), np.empty((len(positions), model.dim), np.float32)
        at = 0
        for start, stop in ranges:
            model.read(start, stop, keys[at : at + stop - start], rows[at : at + stop - start])
            at += stop - start
        yield positions, keys, rows


def _looked_up(tier: CheckedTier, tag: str, keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool ``[n]`` each: which keys the tier has, and which of their rows differ."""
    got = np.zeros_like(rows)
    there = fetch_all(tier, tag, keys, got)
    return there, there & (got.view(np.uint32) != rows.view(np.uint32)).any(axis=1)


def _list(listed: list[int], keys: np.ndarray) -> None:
    listed += [int(key) for key in keys[: _LISTED - len(listed)] if int(key) not in listed]


class _Wrong:
    """Rows that differ; of those with equal keys, only the last row of the model is one that the tier should have."""

    def __init__(self, found: Difference, path: str | Path, dim: int) -> None:
        self._found, self._path, self._dim = found, path, dim
        self._keys: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._held = 0

    def add(self, keys: np.ndarray, positions: np.ndarray) -> None:
        """Take rows that differ."""
        self._keys.append(keys)
        self._positions.append(positions)
        self._held += len(keys)
        if self._held > _KEYS_AT_ONCE:
            self.settle()

    def settle(self) -> None:
        """Count the rows taken so far, each that is the last of its key."""
        if not self._held:
            return
        keys, positions = np.concatenate(self._keys), np.concatenate(self._positions)
        self._keys, self._positions, self._held = [], [], 0
        distinct, where = np.unique(keys, return_inverse=True)
        last = np.full(len(distinct), -1, np.int64)
        for start, some in _keys_of(self._path, self._dim):
            slots, here = _search(distinct, some)
            np.maximum.at(last, slots[here], start + np.flatnonzero(here))
        real = last[where] == positions
        self._found.wrong += int(np.count_nonzero(real))
        _list(self._found.wrong_keys, keys[real])


def _find_extra(found: Difference, tier: CheckedTier, tag: str, path: str | Path, dim: int, on_rows: OnRows) -> None:
    found.extra = 0
    held: list[np.ndarray] = []
    for keys, _ in tier.scan(tag):
        held.append(np.array(keys))
        on_rows(len(keys))
        if sum(map(len, held)) > _KEYS_AT_ONCE:
            _count_extra(found, np.concatenate(held), path, dim)
            held = []
    if held:
        _count_extra(found, np.concatenate(held), path, dim)


def _count_extra(found: Difference, keys: np.ndarray, path: str | Path, dim: int) -> None:
    assert found.extra is not None
    keys = np.sort(keys)
    known = np.zeros(len(keys), bool)
    for _, some in _keys_of(path, dim):
        slots, here = _search(keys, some)
        known[slots[here]] = True
    found.extra += int(np.count_nonzero(~known))
    _list(found.extra_keys, keys[~known])


def _search(ascending: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in ``ascending``, and whether it does."""
    slots = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    return slots, ascending[slots] == keys


def _keys_of(path: str | Path, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """All keys of a model, with the number of the first row."""
    with open_model(path, dim) as model:
        for start in range(0, model.rows, _READ_KEYS):
            keys = np.empty(min(_READ_KEYS, model.rows - start), np.int64)
            model.read(start, start + len(keys), keys, None)
            yield start, keys
