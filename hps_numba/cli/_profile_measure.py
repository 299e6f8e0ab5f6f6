"""Measurements of the profiler: draw keys, time their lookups, and compare one batch with the true rows.

Calls are made in rounds: all threads first draw the keys of a round and then look them up, so that only lookups run while
lookups are timed. Every call has new keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import methodcaller
from typing import Any

import numpy as np

from hps_numba.cli._latency import percentiles, seconds_of
from hps_numba.cli._profile_keys import KeySource, KeyStream
from hps_numba.cli._profile_target import Target
from hps_numba.errors import ConfigError

__all__ = ["Calls", "latency", "measure", "measure_refresh"]

_ROUND_KEYS = 1 << 22  # 32 MiB of keys are drawn in advance
_REDRAWS = 20  # attempts to draw keys that exist
_CHECKED_AFTER_REFRESH = 1000


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The number of calls.

    Attributes:
        iterations: timed calls of each thread.
        warmup: calls of each thread before them, which are not timed.
        threads: number of threads that call at the same time.
    """

    iterations: int
    warmup: int = 0
    threads: int = 1


def latency(seconds: np.ndarray) -> dict[str, float]:
    """Minimum, mean, maximum and percentiles, in seconds."""
    ends = {"min_seconds": float(seconds.min()), "mean_seconds": float(seconds.mean()), "max_seconds": float(seconds.max())}
    return {**ends, **percentiles(seconds)}


# -- lookups ---------------------------------------------------------------------


class _Caller:
    """The calls of one thread in mode session or host.   Thread safety: one thread at a time."""

    def __init__(self, target: Target, keys: KeyStream, num_keys: int, *, host: bool) -> None:
        self.target, self.stream, self.num_keys = target, keys, num_keys
        self.location = target.location(host=host)
        self.rows = self.location.new_rows((num_keys, target.spec.dim), target.dtype)
        self._batches: list[Any] = []

    def batches(self, count: int) -> list[np.ndarray]:
        """New keys for ``count`` calls."""
        return [self.stream.draw(self.num_keys) for _ in range(count)]

    def prepare(self, count: int) -> None:
        """Draw the keys of the next round and copy them to where they are read."""
        self._batches = [self.location.put(batch) for batch in self.batches(count)]

    def serve(self) -> np.ndarray:
        """Make the calls of a round; returns the seconds of each."""
        location, rows, lookup = self.location, self.rows, self.target.lookup
        seconds = np.empty(len(self._batches))
        with location.current():
            for number, keys in enumerate(self._batches):
                before = time.perf_counter()
                lookup(keys, rows, location.stream)
                location.wait()
                seconds[number] = time.perf_counter() - before
        return seconds

    def answer(self, keys: np.ndarray) -> np.ndarray:
        """The rows of one batch, written to memory that was filled with NaN."""
        location = self.location
        with location.current():
            rows = location.new_rows((len(keys), self.target.spec.dim), self.target.dtype)
            self.target.lookup(location.put(keys), rows, location.stream)
            location.wait()
        return location.fetch(rows)


class _HitCaller(_Caller):
    """Mode cache: every key of a round is from a batch of existing keys that was looked up just before."""

    def __init__(self, target: Target, keys: KeyStream, num_keys: int, *, seed: int) -> None:
        super().__init__(target, keys, num_keys, host=False)
        self._rng = np.random.default_rng(seed)

    def batches(self, count: int) -> list[np.ndarray]:
        """Another selection from the pool for every call."""
        pool = self._existing()
        for _ in range(3):  # a policy may admit a key only when it is requested again
            self.answer(pool)
        return [self._rng.choice(pool, self.num_keys) for _ in range(count)]

    def _existing(self) -> np.ndarray:
        for _ in range(_REDRAWS):
            drawn = self.stream.draw(self.num_keys)
            if len(found := drawn[self.target.contains(drawn)]):
                return found
        raise ConfigError(f"--mode cache: none of {_REDRAWS * self.num_keys} drawn keys has a row in {self.target.spec.tag}")


def measure(target: Target, mode: str, source: KeySource, num_keys: int, calls: Calls, *, seed: int = 0) -> dict[str, Any]:
    """Measure lookups of ``num_keys`` keys; the result, ready for JSON.

    Args:
        mode: session (keys on the device, if there is one), host (keys in host memory) or cache (keys that are cached).
        seed: of the selection of keys in mode cache.

    Raises:
        ConfigError: mode cache without a cache.   Otherwise as ``HPS.lookup``.
    """
    streams = [source.stream(number, calls.threads) for number in range(calls.threads)]
    callers: list[_Caller]
    if mode == "cache":
        target.check_cache(mode, source.stream(0, 1).draw(num_keys))
        callers = [_HitCaller(target, keys, num_keys, seed=seed + number) for number, keys in enumerate(streams)]
    else:
        callers = [_Caller(target, keys, num_keys, host=mode == "host") for keys in streams]
    with _in_parallel(calls.threads) as everyone:
        _run(target, callers, calls.warmup, everyone)
        seconds, wall, counts = _run(target, callers, calls.iterations, everyone)
    location = callers[0].location
    return {
        "mode": mode,
        "num_keys": num_keys,
        "threads": calls.threads,
        "keys_in": location.name,
        "timing": location.timing,
        "calls": len(seconds),
        **latency(seconds),
        **_rates(target, len(seconds) * num_keys, wall, counts),
        "counts": counts,
        **_check(target, callers[0], callers[0].batches(1)[0]),
    }


Everyone = Callable[[Callable[[_Caller], Any], list[_Caller]], list[Any]]


@contextmanager
def _in_parallel(threads: int) -> Iterator[Everyone]:
    """A function that calls a method of all callers, each in its own thread if there are several."""
    if threads == 1:
        yield lambda method, callers: [method(callers[0])]
        return
    with ThreadPoolExecutor(threads, "hps_profile") as pool:
        yield lambda method, callers: list(pool.map(method, callers))


def _run(
    target: Target, callers: list[_Caller], iterations: int, everyone: Everyone
) -> tuple[np.ndarray, float, dict[str, int]]:
    """Rounds of calls: the seconds of every call, the total of all rounds, and the counts of the server during them."""
    round_calls = max(1, _ROUND_KEYS // (callers[0].num_keys * len(callers)))
    seconds: list[np.ndarray] = []
    wall, counts = 0.0, dict.fromkeys(target.counts(), 0)
    for start in range(0, iterations, round_calls):
        count = min(round_calls, iterations - start)
        everyone(methodcaller("prepare", count), callers)
        before, started = target.counts(), time.perf_counter()
        seconds += everyone(methodcaller("serve"), callers)
        wall += time.perf_counter() - started
        after = target.counts()
        counts = {name: total + after[name] - before[name] for name, total in counts.items()}
    return np.concatenate(seconds or [np.empty(0)]), wall, counts


def _rates(target: Target, keys: int, wall: float, counts: dict[str, int]) -> dict[str, float]:
    """Keys, rows and bytes per second, and the shares of keys by where they were found."""
    defaults = counts["absent"] + counts["unanswered"]
    rates = {
        "seconds": wall,
        "keys_per_second": keys / wall,
        "rows_per_second": max(keys - defaults, 0) / wall,
        "bytes_per_second": keys * target.spec.dim * target.dtype.itemsize / wall,
        "host_hit_rate": counts["host_hits"] / keys,
        "default_rate": defaults / keys,
    }
    if "cache_hits" in counts:
        rates["cache_hit_rate"] = counts["cache_hits"] / keys
    return rates


def _check(target: Target, caller: _Caller, keys: np.ndarray) -> dict[str, int]:
    """Compare a batch bit by bit. A default instead of a row that a slower tier has not delivered yet is late, not wrong."""
    before = target.counts()["unanswered"]
    got = caller.answer(keys)
    expected = target.true_rows(keys)
    late = target.counts()["unanswered"] - before
    differs = int((_bits(got[: len(expected)]) != _bits(expected)).any(axis=1).sum())
    return {"checked_rows": len(expected), "wrong_rows": max(differs - late, 0), "late_rows": min(differs, late)}


def _bits(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


# -- refresh ---------------------------------------------------------------------


def measure_refresh(target: Target, source: KeySource, calls: Calls) -> dict[str, Any]:
    """Measure refreshes of the cache of the table, one after the other; the result, ready for JSON.

    Raises:
        ConfigError: there is no cache.   Otherwise as ``HPS.refresh``.
    """
    keys = source.stream(0, 1).draw(_CHECKED_AFTER_REFRESH)
    target.check_cache("refresh", keys)
    caller = _Caller(target, source.stream(1, 2), _CHECKED_AFTER_REFRESH, host=False)
    seconds = np.array([seconds_of(target.refresh) for _ in range(calls.warmup + calls.iterations)])[calls.warmup :]
    return {
        "mode": "refresh",
        "timing": "host wall time of HPS.refresh",
        "calls": len(seconds),
        **latency(seconds),
        **_check(target, caller, keys),
    }
