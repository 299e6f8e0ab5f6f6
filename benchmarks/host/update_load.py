"""What the benchmarks of online updates share: a producer at a given rate, lookups beside it, and freshness from end to end.

Each tick of the producer publishes rows of random keys and of all *probes*: some keys, spread over all partitions, whose rows
hold the number of the tick. The time of a tick is taken before it is published. A thread of the serving process looks the
probes up again and again: a tick is served when the rows of all probes have its number, or a later one. Ticks that no lookup
saw because the next one was there already count until that was seen. Clocks of two processes of a host are one clock.

Each rate is measured twice, one after the other. First, what lookups lose: one thread looks up batches, and nothing else looks
up, by turns without updates and beside them. Then freshness: the thread that looks at the probes some thousand times a second
runs too, and takes its share of the GIL and of the device, with and without updates; the rate of lookups beside it is kept
apart (``probed_lookups_per_second``).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from report import child_environment

from hps_numba.updates import open_producer

__all__ = ["PROBES", "Calls", "Producer", "Spec", "calm", "key_of", "loaded", "quick_of", "warm_up"]

MODEL, TABLE = "m", "sparse_embedding0"
PROBES = 16
_ODD = 0x9E3779B1
TURNS = 3  # of lookups without updates and beside them
_POOL = 8  # different contents of a tick, used in turn
_PAUSE = 0.0005  # seconds between two looks at the probes
_PATIENCE = 120.0  # seconds for the last tick to be served
_START = 0.3  # seconds until a producer begins

Section = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """How much is measured.

    Attributes:
        rows, dim: of the table.   batch: keys of a lookup.   rate: rows a second.   seconds: of each measurement.
        tick: seconds between two calls of ``update`` and ``flush``.
    """

    rows: int = 1_000_000
    dim: int = 32
    batch: int = 1024
    rate: int = 0
    seconds: float = 8.0
    tick: float = 0.01

    @property
    def ticks(self) -> int:
        return max(1, round(self.seconds / self.tick))


def quick_of(spec: Spec) -> Spec:
    """Tiny sizes."""
    return replace(spec, rows=20_000, seconds=0.4, tick=0.02)


def key_of(numbers: np.ndarray) -> np.ndarray:
    """int64 keys of row numbers; the first ones are the probes."""
    return np.asarray(numbers, np.int64) * _ODD


# -- the producer ---------------------------------------------------------------------


def produce(section: Section, spec: Spec, start: int) -> dict[str, Any]:
    """Publish ticks numbered from ``start``; when each was published (ns), and how many rows in how many seconds."""
    rng = np.random.default_rng(start)
    each = max(PROBES, round(spec.rate * spec.tick))
    pool = [key_of(rng.integers(PROBES, spec.rows, each - PROBES)) for _ in range(_POOL)]
    keys = [np.concatenate([some, key_of(np.arange(PROBES))]) for some in pool]
    rows = rng.random((each, spec.dim), np.float32)
    published: list[int] = []
    with open_producer({"linger_ms": 0, **section}) as producer:
        rows[-PROBES:, 0].view(np.int32)[:] = start - 1
        producer.update(MODEL, TABLE, keys[0], rows)  # the first call loads kernels
        producer.flush()
        began = time.monotonic() + _START
        for tick in range(spec.ticks):
            time.sleep(max(0.0, began + tick * spec.tick - time.monotonic()))
            if published and time.monotonic() > began + 2 * spec.seconds:  # the rate is out of reach
                break
            rows[-PROBES:, 0].view(np.int32)[:] = start + tick
            published.append(time.monotonic_ns())
            producer.update(MODEL, TABLE, keys[tick % _POOL], rows)
            producer.flush()
        seconds = time.monotonic() - began
    return {"published": published, "rows": each * len(published), "seconds": seconds}


class Producer:
    """``produce`` in a process of its own; for a queue of this process, in a thread."""

    def __init__(self, section: Section, spec: Spec, start: int) -> None:
        self._found: list[dict[str, Any]] = []
        self._child: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        if section["type"] == "in_process":
            self._thread = threading.Thread(target=lambda: self._found.append(produce(section, spec, start)))
            self._thread.start()
            return
        given = json.dumps({"section": section, "spec": asdict(spec), "start": start})
        command = [sys.executable, str(Path(__file__)), given]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())

    def result(self) -> dict[str, Any]:
        """Wait for the end."""
        if self._thread is not None:
            self._thread.join()
        if self._child is not None:
            printed, _ = self._child.communicate()
            if self._child.returncode:
                raise AssertionError(f"the producer failed with exit code {self._child.returncode}")
            self._found.append(json.loads(printed))
        return self._found[0]

    def close(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()


# -- the readers ---------------------------------------------------------------------


@dataclass(frozen=True)
class Calls:
    """How rows are looked up.

    Attributes:
        many: called with int64 ``[batch]`` keys; returns when the rows are there.
        probe: called with the keys of the probes; returns their rows, float32 ``[n, dim]`` on the host.
    """

    many: Callable[[np.ndarray], object]
    probe: Callable[[np.ndarray], np.ndarray]


class Lookups:
    """A thread that looks batches up as fast as it can, and perhaps one that looks at the probes.

    Attributes:
        seen: number of a tick and the time (ns) when it, or a later one, was found in all probes; ascending.
        times: when each call of ``Calls.many`` began and ended (ns).
    """

    def __init__(self, calls: Calls, spec: Spec, *, probing: bool) -> None:
        self._calls, self._spec = calls, spec
        self._stop = False
        self.seen: list[tuple[int, int]] = []
        self.times: list[tuple[int, int]] = []
        self.problem: BaseException | None = None
        works = (self._many, self._probe) if probing else (self._many,)
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:
            self.problem = problem

    def _many(self) -> None:
        rng = np.random.default_rng(1)
        batches = [key_of(rng.integers(0, self._spec.rows, self._spec.batch)) for _ in range(64)]
        turn = 0
        while not (self._stop and self.times):
            began = time.monotonic_ns()
            self._calls.many(batches[turn % len(batches)])
            self.times.append((began, time.monotonic_ns()))
            turn += 1

    def _probe(self) -> None:
        last = -1
        while not self._stop:
            oldest = _oldest(self._calls)
            now = time.monotonic_ns()
            if oldest != last:
                self.seen.append((oldest, now))
                last = oldest
            time.sleep(_PAUSE)

    def close(self) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
        if self.problem is not None:
            raise self.problem


@contextmanager
def _lookups(calls: Calls, spec: Spec, *, probing: bool) -> Iterator[Lookups]:
    made = Lookups(calls, spec, probing=probing)
    try:
        yield made
    finally:
        made.close()


def _oldest(calls: Calls) -> int:
    """The tick that all probes have."""
    rows = calls.probe(key_of(np.arange(PROBES)))
    return int(np.ascontiguousarray(rows[:, 0]).view(np.int32).min())


def _wait_until(is_served: Callable[[], bool], tick: int) -> None:
    """Until a tick is served."""
    end = time.monotonic() + _PATIENCE
    while not is_served():
        if time.monotonic() > end:
            raise AssertionError(f"tick {tick} is not served after {_PATIENCE:g} s")
        time.sleep(_PAUSE)


def warm_up(calls: Calls, section: Section, spec: Spec, start: int = 1) -> int:
    """Load all kernels; the number of the next tick."""
    made, _ = _beside(calls, section, spec, start, probing=True)
    return start + len(made["published"])


def calm(calls: Calls, spec: Spec) -> dict[str, float]:
    """Lookups without updates: a second, and percentiles in seconds."""
    with _lookups(calls, spec, probing=False) as found:
        time.sleep(spec.seconds)
    return _lookup_figures(found.times)


def loaded(calls: Calls, section: Section, spec: Spec, start: int) -> dict[str, Any]:
    """Lookups beside updates: as ``calm``, with the rate of the rows, and percentiles of freshness in seconds.

    Lookups without and with updates are measured by turns, as a machine may be half as fast for seconds, whatever it does:
    ``kept`` and ``growth`` are medians of the ratios of each turn, of lookups a second and of p99.
    """
    turn, ticks, turns, reached = replace(spec, seconds=spec.seconds / TURNS), 0, [], []
    for _ in range(TURNS):
        before = calm(calls, turn)
        made, found = _beside(calls, section, turn, start + ticks, probing=False)
        ticks += len(made["published"])
        turns.append((before, found))
        reached.append(made["rows"] / made["seconds"])
    made, probed = _beside(calls, section, spec, start + ticks, probing=True)
    return {
        **{name: statistics.median(found[name] for _, found in turns) for name in turns[0][1]},
        **probed,
        "kept": statistics.median(found["lookups_per_second"] / before["lookups_per_second"] for before, found in turns),
        "growth": statistics.median(found["p99"] / before["p99"] for before, found in turns),
        "calm": {name: statistics.median(before[name] for before, _ in turns) for name in turns[0][0]},
        "rows_per_second": statistics.median(reached),
        "ticks": ticks + len(made["published"]),
    }


def _beside(
    calls: Calls, section: Section, spec: Spec, start: int, *, probing: bool
) -> tuple[dict[str, Any], dict[str, float]]:
    """What a producer has made, and what was measured beside it."""
    producer = Producer(section, spec, start)
    try:
        with _lookups(calls, spec, probing=probing) as found:
            made = producer.result()
            published = made["published"]
            last = start + len(published) - 1
            if probing:
                _wait_until(lambda: found.problem is not None or bool(found.seen and found.seen[-1][0] >= last), last)
        _wait_until(lambda: _oldest(calls) >= last, last)
    finally:
        producer.close()
    beside = [pair for pair in found.times if published[0] <= pair[0] <= published[-1]]
    figures = _lookup_figures(beside or found.times)  # none, if one lookup took all of that time
    if not probing:
        return made, figures
    ages = np.array([(at - published[tick]) / 1e9 for tick, at in _served(found.seen, start, len(published))])
    fresh = {f"freshness_{name}": value for name, value in percentiles(ages).items()}
    return made, {**fresh, "probed_lookups_per_second": figures["lookups_per_second"]}


def _served(seen: list[tuple[int, int]], start: int, ticks: int) -> Iterator[tuple[int, int]]:
    """Each tick, from 0, with the time when it was first seen to be served."""
    at = 0
    for tick in range(ticks):
        while seen[at][0] < start + tick:
            at += 1
        yield tick, seen[at][1]


def percentiles(values: Any) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p99": float(np.percentile(values, 99)), "max": float(np.max(values))}


def _lookup_figures(times: list[tuple[int, int]]) -> dict[str, float]:
    spans = np.diff(np.array(times)).ravel() / 1e9
    return {"lookups_per_second": len(times) / ((times[-1][1] - times[0][0]) / 1e9), **percentiles(spans)}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout.write(json.dumps(produce(asked["section"], Spec(**asked["spec"]), asked["start"])))
