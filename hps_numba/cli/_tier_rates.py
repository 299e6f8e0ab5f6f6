"""Rates of one tier: rows inserted, overwritten, fetched and erased in a table of its own, which is removed afterwards.

The operations are those of HugeCTR's ``db_benchmark`` (checklist O06), which fills a database with 250 M rows; here each
measurement ends after some seconds.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hps_numba.cli._latency import percentiles
from hps_numba.cli._tier_survey import absent_keys
from hps_numba.cli._tiers import fetch_all
from hps_numba.errors import TierError
from hps_numba.storage.tiers._checked import CheckedTier

__all__ = ["TierRates"]

_PERIOD = 251  # a row is a piece of a sequence with this period, so that it can be told from its key
_CHECKED_ROWS = 10_000  # of each size of a call

Call = Callable[[np.ndarray, np.ndarray], int]
"""Does something with keys and rows; returns how many of the keys had a row."""


@dataclass
class TierRates:
    """Measures one tier.

    Attributes:
        rows: most rows in the table.   dim: floats in a row.   sizes: keys in a call.
        seconds: after which no further call of a measurement is begun.
        key_bits: width of the keys, 64 or 32.
        say: told what is measured now.
        wrong: rows that came back other than they were written.
    """

    rows: int
    dim: int
    sizes: tuple[int, ...]
    seconds: float
    key_bits: int
    say: Callable[[str], object]
    wrong: int = field(default=0, init=False)

    def run(self, tier: CheckedTier) -> list[dict[str, Any]]:
        """A result for each size and operation.

        Raises:
            TierError: the tier failed. If the table could not be removed, the message names it.
        """
        tag = f"hps_et.hps_numba_benchmark_{os.getpid()}_{secrets.token_hex(4)}.scratch"
        results: list[dict[str, Any]] = []
        try:
            self._warm_up(tier, tag)
            for size in self.sizes:
                results += self._of_size(tier, tag, size)
                tier.erase(tag)
        finally:
            _remove(tier, tag)
        return results

    def _warm_up(self, tier: CheckedTier, tag: str) -> None:
        """Call everything once: kernels are compiled or loaded, and connections opened."""
        self.say("warming up")
        keys = np.arange(8, dtype=np.int64)
        for _ in range(2):
            tier.insert(tag, keys[:4], self._rows_of(keys[:4]))
        fetch_all(tier, tag, keys, self._rows_of(keys))
        tier.erase(tag, keys)
        tier.erase(tag)

    def _of_size(self, tier: CheckedTier, tag: str, size: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(size)
        keys = self._keys(rng)

        def insert(some: np.ndarray, rows: np.ndarray) -> int:
            tier.insert(tag, some, rows)
            return len(some)

        def fetch(some: np.ndarray, rows: np.ndarray) -> int:
            return int(np.count_nonzero(fetch_all(tier, tag, some, rows)))

        inserted = self._timed("insert", size, keys, insert)
        yield inserted
        there = rng.permutation(keys[: inserted["keys"]])
        yield self._timed("upsert", size, there, insert)
        yield self._timed("fetch hit", size, rng.permutation(there), fetch)
        self._check(tier, tag, there[:_CHECKED_ROWS])
        absent = absent_keys(tier, tag, min(self.rows, 1 << 20), self.key_bits, rng)
        yield self._timed("fetch miss", size, absent, fetch)
        yield {**self._timed("erase", size, there, lambda some, _: tier.erase(tag, some)), "bytes_per_second": 0.0}

    def _timed(self, what: str, size: int, keys: np.ndarray, call: Call) -> dict[str, Any]:
        """Call with ``size`` keys after the other, until there are none left or time is up."""
        self.say(f"{what}, {size:,} keys")
        seconds: list[float] = []
        found = done = 0
        end = time.perf_counter() + self.seconds
        while done < len(keys) and (not seconds or time.perf_counter() < end):
            some = keys[done : done + size]
            rows = self._rows_of(some)
            before = time.perf_counter()
            found += call(some, rows)
            seconds.append(time.perf_counter() - before)
            done += len(some)
        total = max(sum(seconds), 1e-9)
        return {
            "operation": what,
            "batch_size": size,
            "calls": len(seconds),
            "keys": done,
            "found": found,
            "keys_per_second": done / total,
            "bytes_per_second": found * 4 * self.dim / total,
            **percentiles(np.array(seconds)),
        }

    def _keys(self, rng: np.random.Generator) -> np.ndarray:
        """Distinct keys, spread over all that there are."""
        step = (2**62 if self.key_bits == 64 else 2**32) // self.rows
        return rng.permutation(self.rows).astype(np.int64) * step + int(rng.integers(step))

    @cached_property
    def _pieces(self) -> np.ndarray:
        sequence = np.resize(np.linspace(-1, 1, _PERIOD, dtype=np.float32), _PERIOD + self.dim - 1)
        return np.lib.stride_tricks.sliding_window_view(sequence, self.dim)

    def _rows_of(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, float32 ``[n, dim]``, in new memory."""
        return np.ascontiguousarray(self._pieces[keys % _PERIOD])

    def _check(self, tier: CheckedTier, tag: str, keys: np.ndarray) -> None:
        """Compare rows with those that were written; a tier with a bound may have evicted some."""
        rows = np.full((len(keys), self.dim), np.nan, np.float32)
        found = fetch_all(tier, tag, keys, rows)
        self.wrong += int(np.count_nonzero((rows != self._rows_of(keys)).any(axis=1) & found))


def _remove(tier: CheckedTier, tag: str) -> None:
    try:
        tier.erase(tag)
    except TierError as problem:
        what = f"the table of the benchmark, {tag}, is left in the tier"
        raise TierError(f"{what}: it could not be removed: {problem}") from problem
