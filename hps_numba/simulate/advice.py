"""Which cache policy and how large a cache reach a hit rate at the least memory of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.errors import ConfigError
from hps_numba.runtime.progress import rows_progress
from hps_numba.simulate.candidates import Candidate, contenders, known_names
from hps_numba.simulate.dense_trace import NumberedTrace, OnRequests
from hps_numba.simulate.geometry import WAYS
from hps_numba.simulate.lookup_time import ASSUMPTIONS, lookup_seconds
from hps_numba.simulate.results import Run
from hps_numba.simulate.simulation import (
    Settings,
    check_settings,
    in_threads,
    number_for,
    parts_of_sample,
    simulate_one,
    warmup_of,
    with_error,
)
from hps_numba.traces.trace import open_trace

__all__ = ["Advice", "Choice", "advise"]

_PRECISION = 1.01  # the size found is at most so much larger than one that misses the target
_ROOM = 4  # ways a distinct key of a cache in which no set is ever full: the ceiling


@dataclass(frozen=True)
class Choice:
    """The smallest cache of a policy that reaches the target.

    Attributes:
        rows, gpu_bytes: of the cache.   hit_rate: of its requests; error: half of its 95 % interval, 0 without sampling.
        lookup_seconds: of a call on average, estimated.
    """

    policy: str
    rows: int
    gpu_bytes: int
    hit_rate: float
    error: float
    lookup_seconds: float


@dataclass(frozen=True)
class Advice:
    """What reaches a hit rate at the least memory.

    Attributes:
        target: hit rate, of requests.   ceiling: that of a cache which is never full, in the same batches.
        choices: one a policy that reaches it, the least memory first.   missed: policies that do not.
        assumptions: what this holds for, in words.
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
        """The first of the choices; None if nothing reaches the target."""
        return self.choices[0] if self.choices else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
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
    """For each policy the smallest GPU cache with ``target_hit_rate``, by bisection over its size.

    Args:
        target_hit_rate: share of the requests after the warm-up, above 0 and below 1.
        policies: as for ``run``; by default all built-in cache policies. Those that a GPU cannot run are left out.
        warmup: requests at the beginning that do not count; by default a fifth, as a server warms its caches when it starts.
        Others as for ``run``.

    Raises:
        As ``run``.
    """
    if not 0 < target_hit_rate < 1:
        raise ConfigError(f"target_hit_rate: {target_hit_rate}, wanted a share above 0 and below 1")
    check_settings("gpu", batch, warmup, sample, dim, row_dtype, 1)
    if policies is None:
        policies = known_names()[1]
    given = [policies] if isinstance(policies, (str, type)) or not isinstance(policies, Sequence) else policies
    chosen = [one for one in contenders(given, allow_code=allow_code) if one.policy is not None]
    if not chosen:
        raise ConfigError("policies: none that a GPU cache can run, wanted one or more cache policies")
    numbered = number_for(open_trace(trace), sample, progress)
    skip = warmup_of(warmup, numbered.requests, batch)
    settings = Settings(batch, skip, len(numbered), dim, row_dtype)
    search = _Search(numbered, settings, target_hit_rate)
    ceiling = search.at_rest(chosen[0]).hit_rate
    with rows_progress(0, progress, unit="requests", doing="searching") as advance:

        def work(one: Candidate, check: Callable[[], None]) -> Run | None:
            def on_requests(n: int) -> None:
                check()
                advance(one.name, n)

            return search.smallest(one, on_requests)

        found = in_threads(work, chosen, threads)
    choices = [_choice(run, settings) for run in found if run is not None]
    return Advice(
        trace=numbered.name,
        target=target_hit_rate,
        ceiling=ceiling,
        batch=batch,
        warmup=skip,
        dim=dim,
        row_dtype=row_dtype,
        choices=tuple(sorted(choices, key=lambda choice: (choice.gpu_bytes, -choice.hit_rate))),
        missed=tuple(one.name for one, run in zip(chosen, found) if run is None),
        assumptions=_assumptions(numbered, settings),
    )


def _choice(run: Run, settings: Settings) -> Choice:
    seconds = lookup_seconds(settings.batch, run.hit_rate, settings.dim)
    return Choice(run.policy, run.rows, run.gpu_bytes, run.hit_rate, run.error, seconds)


def _assumptions(numbered: NumberedTrace, settings: Settings) -> tuple[str, ...]:
    sampled = () if numbered.rate == 1 else (f"hit rates are estimates from {numbered.rate:.3g} of the keys",)
    return (
        f"calls of {settings.batch:,} keys in the order of the trace; the first {settings.warmup:,} of"
        f" {numbered.requests:,} requests warm the cache and do not count; traffic goes on like this",
        *sampled,
        f"memory: index, state and rows of {settings.dim} x {settings.row_dtype} of one table's cache, no buffers of calls",
        *ASSUMPTIONS,
    )


class _Search:
    """Bisection over the size of a cache."""

    def __init__(self, trace: NumberedTrace, settings: Settings, target: float) -> None:
        self._trace, self._settings, self._target = trace, settings, target
        trace.firsts(max(1, round(settings.batch * trace.rate)))

    def _run(self, one: Candidate, rows: int, on_requests: OnRequests) -> Run:
        return simulate_one(one, "gpu", rows, self._trace, self._settings, on_requests)

    def at_rest(self, one: Candidate, on_requests: OnRequests = lambda n: None) -> Run:
        """The cache that is never full."""
        return self._run(one, _ROOM * max(1, round(self._trace.distinct / self._trace.rate)), on_requests)

    def smallest(self, one: Candidate, on_requests: OnRequests) -> Run | None:
        """The smallest cache with the target, to ``_PRECISION`` or a set; None if there is none."""
        best = self.at_rest(one, on_requests)
        if best.hit_rate < self._target:
            return None
        low, high = 0, -(-best.rows // WAYS)  # sets: too few, enough
        least = max(2, round(64 / self._trace.rate / WAYS)) if self._trace.rate < 1 else 2
        while high > low + 1 and high > least and high > low * _PRECISION:
            middle = max(least, round((max(low, 1) * high) ** 0.5))
            middle = min(max(middle, low + 1), high - 1)
            run = self._run(one, middle * WAYS, on_requests)
            if run.hit_rate >= self._target:
                high, best = middle, run
            else:
                low = middle
        if self._trace.rate < 1 and high * WAYS * self._trace.rate >= 4 * 64:
            quarters = parts_of_sample(self._trace, [high * WAYS])[1:]
            return with_error(best, [simulate_one(one, "gpu", best.rows, part, self._settings) for part in quarters])
        return best
