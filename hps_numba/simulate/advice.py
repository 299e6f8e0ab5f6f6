"""Which cache policy and cache size reach a target hit rate with the least GPU memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.config.arguments import as_number
from hps_numba.errors import ConfigError
from hps_numba.runtime.progress import rows_progress
from hps_numba.simulate.candidates import Candidate, find_candidates, known_names
from hps_numba.simulate.concurrency import map_in_threads
from hps_numba.simulate.dense_trace import DenseTrace, OnRequests, ignore_requests
from hps_numba.simulate.geometry import WAYS
from hps_numba.simulate.lookup_time import ASSUMPTIONS, lookup_seconds
from hps_numba.simulate.replay import replay
from hps_numba.simulate.results import Run
from hps_numba.simulate.sampling import MIN_SAMPLED_ROWS, sample_and_quarters, with_error
from hps_numba.simulate.settings import Settings, check_running, check_settings, warmup_requests
from hps_numba.simulate.simulation import read_trace
from hps_numba.traces.trace import open_trace

__all__ = ["Advice", "Choice", "advise"]

_PRECISION = 1.01  # the size found is at most this factor above one that misses the target
_WAYS_PER_KEY = 4  # of a cache in which no set is ever full: the ceiling


@dataclass(frozen=True)
class Choice:
    """The smallest cache of a policy that reaches the target.

    Attributes:
        rows, gpu_bytes: of the cache.   hit_rate: share of requests; error: half of its 95 % interval, 0 without sampling.
        lookup_seconds: estimated mean time of a call.
    """

    policy: str
    rows: int
    gpu_bytes: int
    hit_rate: float
    error: float
    lookup_seconds: float


@dataclass(frozen=True)
class Advice:
    """What reaches a hit rate with the least memory.

    Attributes:
        target: hit rate, share of requests.   ceiling: that of a cache whose sets are never full, with the same batches.
        choices: one for each policy that reaches the target, least memory first.   missed: policies that do not reach it.
        assumptions: the conditions under which this holds, as text.
    """

    trace: str
    target: float
    ceiling: float
    batch: int
    warmup: int
    dim: int
    row_dtype: str
    choices: tuple[Choice, ...]
    missed: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def best(self) -> Choice | None:
        """The first of the choices; None if no policy reaches the target."""
        return self.choices[0] if self.choices else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "best": None if self.best is None else asdict(self.best)}


def advise(
    trace: Any,
    target_hit_rate: float = 0.95,
    policies: Any = None,
    *,
    batch: int = 1024,
    warmup: float = 0.2,
    sample: float = 1.0,
    dim: int = 32,
    row_dtype: str = "float32",
    threads: int | None = None,
    allow_code: bool = False,
    progress: bool | None = None,
) -> Advice:
    """For each policy, the smallest GPU cache that reaches ``target_hit_rate``, found by bisection.

    Args:
        target_hit_rate: share of the requests after the warm-up, above 0 and below 1.
        policies: as for ``run``; by default all built-in cache policies. Those that a GPU cannot run are left out.
        warmup: requests at the beginning that are not counted; by default a fifth, as a server warms its caches at start.
        Others as for ``run``.

    Raises:
        As ``run``.
    """
    if not 0 < as_number(target_hit_rate, "target_hit_rate") < 1:
        raise ConfigError(f"target_hit_rate: expected a share above 0 and below 1, got {target_hit_rate}")
    threads = check_running(threads=threads, progress=progress, allow_code=allow_code)
    check_settings(geometry="gpu", batch=batch, warmup=warmup, sample=sample, dim=dim, row_dtype=row_dtype)
    found = find_candidates(known_names()[1] if policies is None else policies, allow_code=allow_code)
    candidates = [candidate for candidate in found if candidate.policy is not None]
    if not candidates:
        raise ConfigError("policies: expected one or more cache policies, got none that a GPU cache can run")
    dense = read_trace(open_trace(trace), sample, progress)
    settings = Settings(batch, warmup_requests(warmup, dense.requests, batch), len(dense), dim, row_dtype)
    search = _Search(dense, settings, target_hit_rate)
    ceiling = search.never_full(candidates[0]).hit_rate
    runs = _search_all(search, candidates, threads, progress)
    choices = [_choice(run, settings) for run in runs if run is not None]
    return Advice(
        trace=dense.name,
        target=target_hit_rate,
        ceiling=ceiling,
        batch=batch,
        warmup=settings.warmup,
        dim=dim,
        row_dtype=row_dtype,
        choices=tuple(sorted(choices, key=lambda choice: (choice.gpu_bytes, -choice.hit_rate))),
        missed=tuple(candidate.name for candidate, run in zip(candidates, runs) if run is None),
        assumptions=_assumptions(dense, settings),
    )


def _search_all(search: _Search, candidates: list[Candidate], threads: int | None, progress: bool | None) -> list[Run | None]:
    with rows_progress(0, progress, unit="requests", doing="searching") as advance:

        def work(candidate: Candidate, check: Callable[[], None]) -> Run | None:
            def on_requests(n: int) -> None:
                check()
                advance(candidate.name, n)

            return search.smallest(candidate, on_requests)

        return map_in_threads(work, candidates, threads)


def _choice(run: Run, settings: Settings) -> Choice:
    seconds = lookup_seconds(settings.batch, run.hit_rate, settings.dim)
    return Choice(run.policy, run.rows, run.gpu_bytes, run.hit_rate, run.error, seconds)


def _assumptions(trace: DenseTrace, settings: Settings) -> tuple[str, ...]:
    sampled = () if trace.rate == 1 else (f"hit rates are estimates from {trace.rate:.3g} of the keys",)
    return (
        f"calls of {settings.batch:,} keys in the order of the trace; the first {settings.warmup:,} of"
        f" {trace.requests:,} requests warm the cache and are not counted; future traffic resembles the trace",
        *sampled,
        f"memory: index, state and rows of {settings.dim} x {settings.row_dtype} of one table's cache, without the buffers of"
        " calls",
        *ASSUMPTIONS,
    )


class _Search:
    """Bisection over the size of a cache."""

    def __init__(self, trace: DenseTrace, settings: Settings, target: float) -> None:
        self._trace, self._settings, self._target = trace, settings, target
        trace.firsts(max(1, round(settings.batch * trace.rate)))  # computed once, before several threads need them

    def _run(self, candidate: Candidate, rows: int, on_requests: OnRequests) -> Run:
        return replay(candidate, "gpu", rows, self._trace, self._settings, on_requests)

    def never_full(self, candidate: Candidate, on_requests: OnRequests = ignore_requests) -> Run:
        """A run in which no set is ever full."""
        rows = _WAYS_PER_KEY * max(1, round(self._trace.distinct / self._trace.rate))
        return self._run(candidate, rows, on_requests)

    def smallest(self, candidate: Candidate, on_requests: OnRequests) -> Run | None:
        """The smallest cache that reaches the target, to ``_PRECISION`` or one set; None if none does."""
        best = self.never_full(candidate, on_requests)
        if best.hit_rate < self._target:
            return None
        rate = self._trace.rate
        low, high = 0, -(-best.rows // WAYS)  # in sets: too few, enough
        min_sets = max(2, round(MIN_SAMPLED_ROWS / rate / WAYS)) if rate < 1 else 2
        while high > low + 1 and high > min_sets and high > low * _PRECISION:
            middle = max(min_sets, round((max(low, 1) * high) ** 0.5))
            middle = min(max(middle, low + 1), high - 1)
            run = self._run(candidate, middle * WAYS, on_requests)
            if run.hit_rate >= self._target:
                high, best = middle, run
            else:
                low = middle
        if rate < 1 and high * WAYS * rate >= 4 * MIN_SAMPLED_ROWS:
            quarters = sample_and_quarters(self._trace, [high * WAYS])[1:]
            return with_error(best, [replay(candidate, "gpu", best.rows, part, self._settings) for part in quarters])
        return best
