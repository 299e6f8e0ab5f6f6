"""The demo's requests: drawn, served and checked in rounds by several threads.

A round has three steps, and all threads end one before the next begins: draw keys, look them up, compare every row. So nothing
but lookups runs while lookups are timed. Buffers are filled with NaN before each round, so that a row that was not
written shows as wrong.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hps_numba.server.hps import HPS
from hps_numba.simulate.workloads import power_law

__all__ = ["ALPHA", "DEFAULT_VALUE", "KEYS_PER_SAMPLE", "LARGEST_BATCH", "MODEL", "Round", "Traffic", "run_traffic"]

MODEL = "demo"
ALPHA = 1.2
DEFAULT_VALUE = -7.0  # no row holds it: values are in [-1, 1)
KEYS_PER_SAMPLE = 26  # as many as the categorical features of the Criteo data sets
STRANGERS = 0.02  # share of keys that do not exist
CALLS: Mapping[int, int] = {1: 128, 16: 32, 128: 8, 1024: 2}
"""Samples in a request, and how many such requests a thread sends in a round."""
LARGEST_BATCH = max(CALLS)
_SPECIAL = (-1, np.iinfo(np.int64).min, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Round:
    """When a round's lookups began, in seconds after the first one's, how long they took, and the keys of all threads."""

    start: float
    seconds: float
    keys: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What was sent and how it was answered.

    Attributes:
        latencies: seconds of every request, by samples in a request.
        rounds: in order.
        strangers: keys sent that do not exist.
        wrong_rows: rows that were not bit for bit what was generated, or the default value for a stranger.
    """

    latencies: dict[int, np.ndarray]
    rounds: list[Round]
    strangers: int
    wrong_rows: int

    @property
    def keys(self) -> int:
        return sum(part.keys for part in self.rounds)

    @property
    def requests(self) -> int:
        return sum(len(seconds) for seconds in self.latencies.values())

    @property
    def seconds(self) -> float:
        """Time in which lookups ran."""
        return sum(part.seconds for part in self.rounds)


def run_traffic(server: HPS, expected: np.ndarray, *, threads: int, seconds: float, seed: int) -> Traffic:
    """Send requests for about ``seconds`` and check every row.

    Args:
        expected: float32 ``[rows + 1, dim]``: what key 0, 1, ... must give, and at last what a stranger must give.
        threads: that draw, look up and check, each its own requests.
    """
    clients = [_Client(server, expected, [seed, number]) for number in range(threads)]
    rounds: list[Round] = []
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads, "hps_demo") as pool:
        while not rounds or time.perf_counter() - begin < seconds:
            drawn = list(pool.map(_Client.draw, clients))
            start = time.perf_counter()
            list(pool.map(_Client.serve, clients))
            rounds.append(Round(start - begin, time.perf_counter() - start, sum(drawn)))
            list(pool.map(_Client.check, clients))
    return Traffic(
        latencies={samples: np.concatenate([client.seconds(samples) for client in clients]) for samples in CALLS},
        rounds=rounds,
        strangers=sum(client.strangers for client in clients),
        wrong_rows=sum(client.wrong_rows for client in clients),
    )


class _Client:
    """One thread's requests.   **Threads:** one at a time."""

    def __init__(self, server: HPS, expected: np.ndarray, seed: list[int]) -> None:
        self._server = server
        self._expected = expected
        self._rows = len(expected) - 1
        self._rng = np.random.default_rng(seed)
        self._samples = np.repeat(list(CALLS), list(CALLS.values()))
        self._rng.shuffle(self._samples)
        self._ends = np.cumsum(self._samples * KEYS_PER_SAMPLE)
        self._keys = np.empty(self._ends[-1], np.int64)
        self._out = np.empty((self._ends[-1], expected.shape[1]), np.float32)
        self._strangers = np.array([*_SPECIAL, self._rows, *self._rng.integers(self._rows, 1 << 62, 1000)])
        self._latencies: list[np.ndarray] = []
        self.strangers = 0
        self.wrong_rows = 0

    def draw(self) -> int:
        """New keys for all requests of a round; their number."""
        count = len(self._keys)
        self._keys[:] = power_law(self._rows, count, ALPHA, self._rng)
        strange = self._rng.random(count) < STRANGERS
        self._keys[strange] = self._rng.choice(self._strangers, np.count_nonzero(strange))
        self.strangers += int(np.count_nonzero(strange))
        self._out.fill(np.nan)
        return count

    def serve(self) -> None:
        """Send all requests of a round, one after the other."""
        latencies = np.empty(len(self._ends))
        start = 0
        for number, end in enumerate(self._ends):
            keys, out = self._keys[start:end], self._out[start:end]
            before = time.perf_counter()
            self._server.lookup(keys, MODEL, 0, out=out)
            latencies[number] = time.perf_counter() - before
            start = end
        self._latencies.append(latencies)

    def check(self) -> None:
        """Count the rows that differ in any bit from what they must be."""
        exists = (self._keys >= 0) & (self._keys < self._rows)
        wanted = self._expected[np.where(exists, self._keys, self._rows)]
        differs = wanted.view(np.uint32) != self._out.view(np.uint32)
        self.wrong_rows += int(np.count_nonzero(differs.any(axis=1)))

    def seconds(self, samples: int) -> np.ndarray:
        """Latencies of all requests with so many samples."""
        return np.concatenate([round_[self._samples == samples] for round_ in self._latencies])
