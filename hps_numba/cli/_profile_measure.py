"""The profiler's way: draw keys, look them up while the clock runs, count, and compare one batch with the true rows.

Calls are made in rounds. All threads draw the keys of a round first, then all look them up, so that nothing but lookups runs
while lookups are timed. Every call has keys of its own.
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

from hps_numba.cli._profile_keys import KeySource, KeyStream
from hps_numba.cli._profile_target import Target
from hps_numba.errors import ConfigError

__all__ = ["PERCENTILES", "Calls", "latency", "measure", "measure_refresh"]

PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}

_ROUND_KEYS = 1 << 22  # 32 MiB of keys are drawn ahead
_REDRAWS = 20  # until keys that exist must have come
_CHECKED_AFTER_REFRESH = 1000


@dataclass(frozen=True, kw_only=True)
class Calls:
    """How often to call.

    Attributes:
        iterations: timed calls of each thread.
        warmup: calls of each thread before, which are dropped.
        threads: that call at the same time.
    """

    iterations: int
    warmup: int = 0
    threads: int = 1


def latency(seconds: np.ndarray) -> dict[str, float]:
    """Minimum, mean, percentiles (as ``np.percentile`` interpolates them) and maximum, in seconds."""
    between = np.percentile(seconds, list(PERCENTILES.values()))
    named = {f"{name}_seconds": float(value) for name, value in zip(PERCENTILES, between, strict=True)}
    ends = {"min_seconds": float(seconds.min()), "mean_seconds": float(seconds.mean()), "max_seconds": float(seconds.max())}
    return {**ends, **named}


# -- lookups ---------------------------------------------------------------------


class _Caller:
    """One thread's calls in mode session or host.   **Threads:** one at a time."""

    def __init__(self, target: Target, keys: KeyStream, num_keys: int, *, host: bool) -> None:
        self.target, self.stream, self.num_keys = target, keys, num_keys
        self.place = target.place(host=host)
        self.rows = self.place.new_rows((num_keys, target.spec.dim), target.dtype)
        self._batches: list[Any] = []

    def batches(self, count: int) -> list[np.ndarray]:
        """New keys for ``count`` calls."""
        return [self.stream.draw(self.num_keys) for _ in range(count)]

    def prepare(self, count: int) -> None:
        """Draw the keys of the next round and put them where they are read."""
        self._batches = [self.place.put(batch) for batch in self.batches(count)]

    def serve(self) -> np.ndarray:
        """Make the calls of a round; returns the seconds of each."""
        place, rows, lookup = self.place, self.rows, self.target.lookup
        seconds = np.empty(len(self._batches))
        with place.current():
            for number, keys in enumerate(self._batches):
                before = time.perf_counter()
                lookup(keys, rows, place.stream)
                place.wait()
                seconds[number] = time.perf_counter() - before
        return seconds

    def answer(self, keys: np.ndarray) -> np.ndarray:
        """The rows of one batch, in memory that held NaN before."""
        place = self.place
        with place.current():
            rows = place.new_rows((len(keys), self.target.spec.dim), self.target.dtype)
            self.target.lookup(place.put(keys), rows, place.stream)
            place.wait()
        return place.fetch(rows)


class _HitCaller(_Caller):
    """Mode cache: every key of a round is one of a batch of existing keys that was looked up just before."""

    def __init__(self, target: Target, keys: KeyStream, num_keys: int, *, seed: int) -> None:
        super().__init__(target, keys, num_keys, host=False)
        self._rng = np.random.default_rng(seed)

    def batches(self, count: int) -> list[np.ndarray]:
        """Keys of the pool, in another selection for every call."""
        pool = self._existing()
        for _ in range(3):  # a policy may admit a key only when it comes again
            self.answer(pool)
        return [self._rng.choice(pool, self.num_keys) for _ in range(count)]

    def _existing(self) -> np.ndarray:
        for _ in range(_REDRAWS):
            drawn = self.stream.draw(self.num_keys)
            if len(found := drawn[self.target.contains(drawn)]):
                return found
        raise ConfigError(f"--mode cache: none of {_REDRAWS * self.num_keys} keys has a row in {self.target.spec.tag}")


def measure(target: Target, mode: str, source: KeySource, num_keys: int, calls: Calls, *, seed: int = 0) -> dict[str, Any]:
    """Measure lookups of ``num_keys`` keys; what came of it, ready for JSON.

    Args:
        mode: session (keys on the device, if there is one), host (keys in host memory) or cache (keys that it has).
        seed: of the selection of keys in mode cache.

    Raises:
        ConfigError: mode cache, and no cache.   Otherwise as ``HPS.lookup``.
    """
    streams = [source.stream(number, calls.threads) for number in range(calls.threads)]
    callers: list[_Caller]
    if mode == "cache":
        target.check_cache(mode, source.stream(0, 1).draw(num_keys))
        callers = [_HitCaller(target, keys, num_keys, seed=seed + number) for number, keys in enumerate(streams)]
    else:
        callers = [_Caller(target, keys, num_keys, host=mode == "host") for keys in streams]
    with _side_by_side(calls.threads) as everyone:
        _run(target, callers, calls.warmup, everyone)
        seconds, wall, counts = _run(target, callers, calls.iterations, everyone)
    place = callers[0].place
    return {
        "mode": mode,
        "num_keys": num_keys,
        "threads": calls.threads,
        "keys_in": place.name,
        "timing": place.timing,
        "calls": len(seconds),
        **latency(seconds),
        **_rates(target, len(seconds) * num_keys, wall, counts),
        "counts": counts,
        **_check(target, callers[0], callers[0].batches(1)[0]),
    }


Everyone = Callable[[Callable[[_Caller], Any], list[_Caller]], list[Any]]


@contextmanager
def _side_by_side(threads: int) -> Iterator[Everyone]:
    """A function that calls a method of all callers, each in a thread of its own if there are several."""
    if threads == 1:
        yield lambda method, callers: [method(callers[0])]
        return
    with ThreadPoolExecutor(threads, "hps_profile") as pool:
        yield lambda method, callers: list(pool.map(method, callers))


def _run(
    target: Target, callers: list[_Caller], iterations: int, everyone: Everyone
) -> tuple[np.ndarray, float, dict[str, int]]:
    """Rounds of calls: the seconds of every call, those of all rounds, and what the server counted in them."""
    a_round = max(1, _ROUND_KEYS // (callers[0].num_keys * len(callers)))
    seconds: list[np.ndarray] = []
    wall, counts = 0.0, dict.fromkeys(target.counts(), 0)
    for start in range(0, iterations, a_round):
        count = min(a_round, iterations - start)
        everyone(methodcaller("prepare", count), callers)
        before, started = target.counts(), time.perf_counter()
        seconds += everyone(methodcaller("serve"), callers)
        wall += time.perf_counter() - started
        after = target.counts()
        counts = {name: total + after[name] - before[name] for name, total in counts.items()}
    return np.concatenate(seconds or [np.empty(0)]), wall, counts


def _rates(target: Target, keys: int, wall: float, counts: dict[str, int]) -> dict[str, float]:
    """What was answered in a second: keys, those of them that had a row, and bytes; and from where."""
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
    """Compare a batch bit for bit. A default in place of a row that a slower tier owed is late and not wrong."""
    before = target.counts()["unanswered"]
    got = caller.answer(keys)
    wanted = target.true_rows(keys)
    late = target.counts()["unanswered"] - before
    differs = int((_bits(got[: len(wanted)]) != _bits(wanted)).any(axis=1).sum())
    return {"checked_rows": len(wanted), "wrong_rows": max(differs - late, 0), "late_rows": min(differs, late)}


def _bits(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows).view(np.uint8)


# -- refresh ---------------------------------------------------------------------


def measure_refresh(target: Target, source: KeySource, calls: Calls) -> dict[str, Any]:
    """Measure refreshes of the table's cache, one after the other; what came of it, ready for JSON.

    Raises:
        ConfigError: there is no cache, or the server cannot refresh.   Otherwise as ``HPS.refresh``.
    """
    keys = source.stream(0, 1).draw(_CHECKED_AFTER_REFRESH)
    target.check_cache("refresh", keys)
    refresh = target.refresh()
    caller = _Caller(target, source.stream(1, 2), _CHECKED_AFTER_REFRESH, host=False)
    seconds = np.array([_timed(refresh) for _ in range(calls.warmup + calls.iterations)])[calls.warmup :]
    return {
        "mode": "refresh",
        "timing": "host wall time of HPS.refresh",
        "calls": len(seconds),
        **latency(seconds),
        **_check(target, caller, keys),
    }


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
