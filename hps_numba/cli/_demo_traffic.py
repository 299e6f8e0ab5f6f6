"""The requests of the demo: drawn, sent and checked in rounds by several threads.

A round has three steps, and all threads finish one before the next begins: draw keys, look them up, compare every row. So only
lookups run while lookups are timed. Buffers are filled with NaN before each round, so that an unwritten row is found.
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
DEFAULT_VALUE = -7.0  # occurs in no row: values are in [-1, 1)
KEYS_PER_SAMPLE = 26  # the number of categorical features in the Criteo data sets
ABSENT_SHARE = 0.02  # of the keys do not exist
CALLS: Mapping[int, int] = {1: 128, 16: 32, 128: 8, 1024: 2}
"""Samples in a request, and the number of such requests that a thread sends in a round."""
LARGEST_BATCH = max(CALLS)
_SPECIAL = (-1, np.iinfo(np.int64).min, np.iinfo(np.int64).max)


@dataclass(frozen=True)
class Round:
    """Start of the lookups of a round, in seconds since the first one; their duration; and the keys of all threads."""

    start: float
    seconds: float
    keys: int


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The requests and their answers.

    Attributes:
        latencies: seconds of every request, by samples in a request.
        rounds: in order.
        absent_keys: number of keys that do not exist.
        wrong_rows: rows that differ in any bit from the generated ones, or from the default value for absent keys.
    """

    latencies: dict[int, np.ndarray]
    rounds: list[Round]
    absent_keys: int
    wrong_rows: int

    @property
    def keys(self) -> int:
        return sum(part.keys for part in self.rounds)

    @property
    def requests(self) -> int:
        return sum(len(seconds) for seconds in self.latencies.values())

    @property
    def seconds(self) -> float:
        """Total time of the lookups."""
        return sum(part.seconds for part in self.rounds)


def run_traffic(server: HPS, expected: np.ndarray, *, threads: int, seconds: float, seed: int) -> Traffic:
    """Send requests for about ``seconds`` and check every row.

    Args:
        expected: float32 ``[rows + 1, dim]``: the rows of keys 0, 1, ..., and last the row for absent keys.
        threads: number of threads, each of which draws, looks up and checks its own requests.
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
        absent_keys=sum(client.absent_keys for client in clients),
        wrong_rows=sum(client.wrong_rows for client in clients),
    )


class _Client:
    """The requests of one thread.   Thread safety: one thread at a time."""

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
        self._absent = np.array([*_SPECIAL, self._rows, *self._rng.integers(self._rows, 1 << 62, 1000)])
        self._latencies: list[np.ndarray] = []
        self.absent_keys = 0
        self.wrong_rows = 0

    def draw(self) -> int:
        """Draw new keys for all requests of a round; returns their number."""
        count = len(self._keys)
        self._keys[:] = power_law(self._rows, count, ALPHA, self._rng)
        absent = self._rng.random(count) < ABSENT_SHARE
        self._keys[absent] = self._rng.choice(self._absent, np.count_nonzero(absent))
        self.absent_keys += int(np.count_nonzero(absent))
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
        """Count the rows that differ from the expected ones in any bit."""
        exists = (self._keys >= 0) & (self._keys < self._rows)
        expected = self._expected[np.where(exists, self._keys, self._rows)]
        differs = expected.view(np.uint32) != self._out.view(np.uint32)
        self.wrong_rows += int(np.count_nonzero(differs.any(axis=1)))

    def seconds(self, samples: int) -> np.ndarray:
        """Latencies of all requests of ``samples`` samples."""
        return np.concatenate([round_[self._samples == samples] for round_ in self._latencies])
