"""Simulate policies over a trace: each in caches of several sizes, fully associative and in the geometry of the GPU cache.

*Sampling.* Of a huge trace a share of the keys, chosen by a hash, is simulated with all its requests, in caches smaller by
that share (C. Waldspurger et al., "Efficient MRC construction with SHARDS", FAST 2015). A miss of a sampled key stands for
1/rate misses; hits are what is left of all requests, so that it does not matter whether the most popular keys are in the
sample (the paper's SHARDS-adj). The error is measured: four disjoint quarters of the sample are simulated as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from hps_numba.cache.sizing import CacheShape, index_sets
from hps_numba.errors import ConfigError, TraceError
from hps_numba.kernels.dtypes import ELEMENT_BYTES, row_stride
from hps_numba.kernels.host.numbering import sample_keys, tally
from hps_numba.runtime.progress import rows_progress
from hps_numba.runtime.threads import available_cores
from hps_numba.simulate.algorithms._algorithm import ADMITTED, EVICTED, RESIDENT
from hps_numba.simulate.candidates import BOUNDS, Candidate, contenders
from hps_numba.simulate.dense_trace import HASH_BITS, NumberedTrace, number_trace
from hps_numba.simulate.geometry import WAYS, GpuGeometry
from hps_numba.simulate.results import Run, Simulation
from hps_numba.simulate.sizes import DEFAULT_SIZES, rows_of
from hps_numba.traces.trace import Trace, open_trace

__all__ = [
    "DEFAULT_POLICIES",
    "GEOMETRIES",
    "Settings",
    "check_settings",
    "in_threads",
    "number_for",
    "parts_of_sample",
    "run",
    "simulate_numbered",
    "simulate_one",
    "warmup_of",
    "with_error",
]

DEFAULT_POLICIES = ("lru", "fifo", "lfu", "clock", "sieve", "s3fifo", "arc", "wtinylfu")
GEOMETRIES = ("both", "gpu", "associative")
_Result = TypeVar("_Result")
_WINDOWS, _GROUPS = 100, 12
_LEAST_SAMPLE = 64  # rows of the smallest cache of a quarter of a sample
_QUARTERS = 4
_STUDENT = 3.18  # two-sided 95 % of Student's t with 3 degrees of freedom


@dataclass(frozen=True)
class Settings:
    """How a cache is simulated.

    Attributes:
        batch: keys of a call.   warmup: requests that do not count.   window: requests of a window.
        dim, row_dtype: of a row, for bytes.
    """

    batch: int
    warmup: int
    window: int
    dim: int
    row_dtype: str


def run(
    trace: Any,
    policies: Any = DEFAULT_POLICIES,
    sizes: Any = DEFAULT_SIZES,
    *,
    geometry: str = "both",
    batch: int = 1024,
    warmup: float = 0,
    sample: float = 1.0,
    bounds: bool = True,
    dim: int = 32,
    row_dtype: str = "float32",
    windows: int = _WINDOWS,
    threads: int | None = None,
    allow_code: bool = False,
    progress: bool | None = None,
) -> Simulation:
    """Hits, admissions, evictions and bytes of policies over a trace.

    Args:
        trace: a path, an integer array, or a ``Trace`` of ``open_trace``, which has more options.
        policies: one or several of: names (``contenders.known_names``), ``file.py:NAME``, ``module:NAME``, classes.
        sizes: of the cache, see ``sizes.rows_of``: rows, shares of the distinct keys, ranges. Where a GPU's cache is among
            what is simulated, all are rounded up to its whole sets, so that caches of one size are compared.
        geometry: ``gpu``: sets of ten ways and calls of ``batch`` keys, exactly as the cache does it; ``associative``: one
            order of all rows, and one request after the other; ``both``: whatever there is of each policy.
        batch: keys of a call. In ``gpu`` all of a batch are looked up before any comes in, as in a lookup; in both, what
            "distinct keys of a batch" are.
        warmup: requests at the beginning that do not count: below 1 a share of the trace, else their number; whole batches.
        sample: share of the keys to simulate, above 0 and up to 1.
        bounds: also Belady's optimum and the infinite cache.
        dim, row_dtype: of a row, for what is counted in bytes.
        windows: into how many the trace is cut for what changes over time.
        threads: caches simulated at a time; by default as many as there are cores.
        allow_code: a policy given as a file may be run.
        progress: draw a bar; by default on a terminal, if there is much to do.

    Raises:
        TraceError: the trace cannot be read, or is empty.   PolicyError: a policy is unknown or not sound.
        ConfigError: an argument makes no sense.
    """
    given = [policies] if isinstance(policies, (str, type)) or not isinstance(policies, Sequence) else policies
    chosen = contenders(given, allow_code=allow_code)
    check_settings(geometry, batch, warmup, sample, dim, row_dtype, windows)
    opened = open_trace(trace)
    numbered = number_for(opened, sample, progress)
    return simulate_numbered(
        numbered,
        opened.format,
        chosen,
        sizes,
        geometry=geometry,
        batch=batch,
        warmup=warmup,
        bounds=bounds,
        dim=dim,
        row_dtype=row_dtype,
        windows=windows,
        threads=threads,
        progress=progress,
    )


def check_settings(geometry: str, batch: int, warmup: float, sample: float, dim: int, row_dtype: str, windows: int) -> None:
    """Raise ConfigError if one makes no sense."""
    if geometry not in GEOMETRIES:
        raise ConfigError(f"geometry: {geometry!r}, wanted one of {', '.join(GEOMETRIES)}")
    if row_dtype not in ELEMENT_BYTES:
        raise ConfigError(f"row_dtype: {row_dtype!r}, wanted one of {', '.join(ELEMENT_BYTES)}")
    for name, value in (("batch", batch), ("dim", dim), ("windows", windows)):
        if value < 1:
            raise ConfigError(f"{name}: {value}, wanted 1 or more")
    if not 0 <= warmup < 1 << 62:
        raise ConfigError(f"warmup: {warmup}, wanted a share below 1 or a number of requests")
    if not 0 < sample <= 1:
        raise ConfigError(f"sample: {sample}, wanted a share of the keys above 0 and up to 1")


def number_for(trace: Trace, sample: float, progress: bool | None) -> NumberedTrace:
    """The trace with dense numbers, or a sample of its keys, behind a progress bar.

    Raises:
        TraceError: it cannot be read, or is empty.   ConfigError: the sample is empty.
    """
    with rows_progress(trace.requests or 0, progress, unit="requests", doing="reading") as on_requests:
        numbered = number_trace(trace, rate=sample, on_requests=lambda n: on_requests("reading", n))
    if numbered.requests == 0:
        raise TraceError(f"{trace.name}: is empty, wanted keys")
    if len(numbered) == 0:
        raise ConfigError(f"sample: {sample} leaves none of the keys of {trace.name}, wanted more")
    return numbered


def simulate_numbered(
    numbered: NumberedTrace,
    format: str,
    chosen: list[Candidate],
    sizes: Any,
    *,
    geometry: str,
    batch: int,
    warmup: float,
    bounds: bool,
    dim: int,
    row_dtype: str,
    windows: int = _WINDOWS,
    threads: int | None = None,
    progress: bool | None = None,
) -> Simulation:
    """``run`` for a trace that was read before."""
    skip = warmup_of(warmup, numbered.requests, batch)
    settings = Settings(batch, skip, -(-len(numbered) // windows), dim, row_dtype)
    rows = rows_of(sizes, round(numbered.distinct / numbered.rate))
    if geometry != "associative" and any(one.policy is not None for one in chosen):
        rows = sorted({index_sets(size, fixed=False, whole=False) * WAYS for size in rows})  # the same in both geometries
    jobs, skipped = _jobs(chosen, rows, geometry, bounds)
    samples = parts_of_sample(numbered, rows)
    for part in samples:  # before threads ask for them
        part.firsts(max(1, round(batch * part.rate)))
        if any(job.contender.algorithm is not None and job.contender.algorithm.looks_ahead for job in jobs):
            part.future()
    with rows_progress(len(jobs) * sum(map(len, samples)), progress, unit="requests", doing="simulating") as advance:

        def work(job: _Job, check: Callable[[], None]) -> Run:
            def on_requests(n: int) -> None:
                check()
                advance(f"{job.contender.name}, {job.rows:,} rows", n)

            whole, *quarters = (
                simulate_one(job.contender, job.geometry, job.rows, part, settings, on_requests) for part in samples
            )
            return with_error(whole, quarters)

        runs = tuple(in_threads(work, jobs, threads))
    heat, group_keys, counts = _heat(numbered, settings.window)
    return Simulation(
        trace=numbered.name,
        format=format,
        requests=numbered.requests,
        distinct=round(numbered.distinct / numbered.rate),
        simulated=len(numbered),
        rate=numbered.rate,
        batch=batch,
        warmup=skip,
        dim=dim,
        row_dtype=row_dtype,
        window=settings.window,
        windows=counts,
        heat=heat,
        group_keys=group_keys,
        runs=runs,
        skipped=skipped,
    )


class _Stopped(Exception):
    """Another simulation failed, or the user interrupted all of them."""


def in_threads(work: Callable[[Any, Callable[[], None]], _Result], items: Sequence[Any], threads: int | None) -> list[_Result]:
    """``work(item, check)`` of each item, several at a time; ``check`` raises once one failed or the user interrupted all."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def check() -> None:
        if stop.is_set():
            raise _Stopped

    def one(item: Any) -> _Result:
        check()
        try:
            return work(item, check)
        except _Stopped:
            raise
        except BaseException as problem:
            failed.append(problem)
            stop.set()  # here: the caller's thread may wake up late, and others would begin meanwhile
            raise

    with ThreadPoolExecutor(max(1, threads or available_cores())) as pool:
        try:
            return list(pool.map(one, items))
        except BaseException as problem:
            stop.set()
            if not isinstance(problem, _Stopped):
                raise
    raise failed[0]  # what stopped them


def warmup_of(warmup: float, requests: int, batch: int) -> int:
    """Requests that do not count, whole batches, of a share or a number.

    Raises:
        ConfigError: they are all that there are.
    """
    skip = round(warmup * requests) if warmup < 1 else round(warmup)
    if skip >= requests:
        raise ConfigError(f"warmup: {skip:,} of {requests:,} requests, wanted less than all")
    return skip // batch * batch


@dataclass(frozen=True)
class _Job:
    contender: Candidate
    geometry: str
    rows: int


def _jobs(chosen: list[Candidate], rows: list[int], geometry: str, bounds: bool) -> tuple[list[_Job], tuple[str, ...]]:
    """What is to be simulated, and what of it cannot be."""
    jobs, skipped = [], []
    deployable = [one for one in chosen if not one.is_bound]
    for one in deployable:
        ways = [("gpu", one.policy is not None), ("associative", one.is_associative)]
        wanted = [(name, possible) for name, possible in ways if geometry in ("both", name)]
        for name, possible in wanted:
            if possible:
                jobs += [_Job(one, name, size) for size in rows]
        if not any(possible for _, possible in wanted):
            what = "needs one order of all rows" if geometry == "gpu" else "is defined within a set"
            skipped.append(f"{one.name}: {what}, so it is not simulated with geometry {geometry}")
    named = [one.name for one in chosen if one.is_bound]
    for one in contenders([*dict.fromkeys([*named, *(BOUNDS if bounds else ())])]) if named or bounds else []:
        jobs += [_Job(one, "associative", size) for size in (rows if one.name != "infinite" else rows[-1:])]
    if not jobs:
        raise ConfigError(f"nothing to simulate: {'; '.join(skipped)}")
    return jobs, tuple(skipped)


# -- one cache -------------------------------------------------------------------------------------


def simulate_one(
    one: Candidate,
    geometry: str,
    rows: int,
    trace: NumberedTrace,
    settings: Settings,
    on_requests: Callable[[int], object] = lambda n: None,
) -> Run:
    """One policy in a cache of one size over a trace, or over a sample of one.

    Args:
        rows: of the cache for the whole trace.   on_requests: is told of requests as they are simulated.
    """
    scaled = max(1, round(rows * trace.rate))
    batch = max(1, round(settings.batch * trace.rate))
    skip = round(settings.warmup * len(trace) / trace.requests) // batch * batch
    start = time.perf_counter()
    capacity, policy_bytes = scaled, 0
    if geometry == "gpu":
        assert one.policy is not None
        capacity = index_sets(scaled, fixed=False, whole=False) * WAYS
        cache = GpuGeometry(scaled, one.policy, batch)
        policy_bytes = round(cache.policy_bytes / trace.rate)
        step, counted = _gpu(cache, batch, trace)
    else:
        step, counted = _associative(one, scaled, batch, trace)
    windows = np.zeros(-(-len(trace) // settings.window) or 1, np.int64)
    totals, before = np.zeros(3, np.int64), np.zeros(3, np.int64)
    firsts = trace.firsts(batch)
    for at, ids in trace.pieces(batch, skip):
        if at == skip:
            before = counted()
        mine = np.empty(len(ids), np.uint8)
        step(at, ids, mine)
        tally(mine, firsts[at : at + len(ids)], at, settings.window, skip, windows, totals)
        on_requests(len(ids))
    resident, admitted, evicted = (int(value) for value in counted())
    requests = len(trace) - skip
    expected = trace.rate * (trace.requests - settings.warmup)
    whole = capacity if trace.rate == 1 else rows
    in_cache = CacheShape("dynamic", whole, False).bytes(settings.dim, row_type=settings.row_dtype)
    return Run(
        policy=one.name,
        geometry=geometry,
        bound=one.is_bound,
        rows=round(resident / trace.rate) if one.name == "infinite" else whole,
        requests=requests,
        hits=int(totals[0]),
        batch_keys=int(totals[1]),
        batch_key_hits=int(totals[2]),
        admissions=admitted - int(before[1]),
        evictions=evicted - int(before[2]),
        resident=resident,
        hit_rate=1 - (requests - int(totals[0])) / expected if expected else 0.0,
        error=0.0,
        row_bytes=row_stride(settings.dim, settings.row_dtype),
        gpu_bytes=in_cache + policy_bytes if geometry == "gpu" else 0,
        seconds=time.perf_counter() - start,
        by_window=windows,
    )


_Step = Callable[[int, np.ndarray, np.ndarray], None]
_Counted = Callable[[], np.ndarray]


def _associative(one: Candidate, capacity: int, batch: int, trace: NumberedTrace) -> tuple[_Step, _Counted]:
    algorithm = one.associative(batch, max(1, 4 * batch // capacity))
    size = min(capacity, max(1, trace.distinct))  # what a larger one holds is the same
    if one.algorithm is not None and not algorithm.bound:
        size = capacity  # queues have shares of the size
    state, counters = algorithm.state(size, trace.distinct, trace.most), algorithm.new_counters()
    future = trace.future() if algorithm.looks_ahead else None

    def step(at: int, ids: np.ndarray, hits: np.ndarray) -> None:
        ahead = () if future is None else (future[at : at + len(ids)],)
        algorithm(ids, hits, counters, size, *ahead, *state)

    return step, lambda: counters[[RESIDENT, ADMITTED, EVICTED]]


def _gpu(cache: GpuGeometry, batch: int, trace: NumberedTrace) -> tuple[_Step, _Counted]:
    def step(at: int, ids: np.ndarray, hits: np.ndarray) -> None:
        cache.replay(trace.keys[ids], hits, batch)

    def counted() -> np.ndarray:
        found = cache.counters()
        return np.array([found.inserted - found.evicted, found.inserted, found.evicted])

    return step, counted


# -- samples ---------------------------------------------------------------------------------------


def parts_of_sample(trace: NumberedTrace, rows: list[int]) -> list[NumberedTrace]:
    """The trace; if it is a sample, also four disjoint quarters of it.

    Raises:
        ConfigError: the smallest cache would have too few rows to say anything.
    """
    if trace.rate == 1:
        return [trace]
    least = rows[0] * trace.rate / _QUARTERS
    if least < _LEAST_SAMPLE:
        enough = _LEAST_SAMPLE * _QUARTERS / rows[0]
        raise ConfigError(
            f"sample: {trace.rate:g} of a cache of {rows[0]:,} rows leaves {rows[0] * trace.rate:.1f} rows, "
            + (f"wanted a sample of {enough:.2g} or more, or larger caches" if enough < 1 else "wanted larger caches")
        )
    return [trace, *(_quarter(trace, number) for number in range(_QUARTERS))]


def _quarter(trace: NumberedTrace, number: int) -> NumberedTrace:
    limit = round(trace.rate * (1 << HASH_BITS))
    edges = [limit * i // _QUARTERS for i in range(_QUARTERS + 1)]
    kept = np.empty(trace.distinct, np.int64)
    kept = kept[: sample_keys(trace.keys, kept, edges[number], edges[number + 1])]
    chosen = np.isin(trace.keys, kept)
    return trace.only(chosen, (edges[number + 1] - edges[number]) / (1 << HASH_BITS))


def with_error(whole: Run, quarters: list[Run]) -> Run:
    """The run, with what the quarters say of its error: their spread, and how far smaller samples are off on average."""
    if not quarters:
        return whole
    rates = np.array([quarter.hit_rate for quarter in quarters])
    spread = _STUDENT * rates.std(ddof=1) / len(rates) ** 0.5
    return replace(whole, error=float(spread + abs(rates.mean() - whole.hit_rate)))


# -- the trace itself ------------------------------------------------------------------------------


def _heat(trace: NumberedTrace, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(heat, group_keys, requests by window)``, see ``Simulation``."""
    any_order = np.random.default_rng(0).permutation(trace.distinct)  # equally popular keys: not in the order of time
    order = any_order[np.argsort(-trace.counts[any_order], kind="stable")]
    before = np.cumsum(trace.counts[order]) - trace.counts[order]
    groups = min(_GROUPS, trace.distinct)
    group_of = np.empty(trace.distinct, np.int64)
    group_of[order] = before * groups // max(1, len(trace))
    present, group_of = np.unique(group_of, return_inverse=True)  # one key may fill several groups
    groups, windows = len(present), -(-len(trace) // window)
    counts = np.zeros((windows, groups), np.int64)
    for at, ids in trace.pieces():
        number = np.arange(at, at + len(ids)) // window * groups + group_of[ids]
        counts += np.bincount(number, minlength=counts.size).reshape(counts.shape)
    shares = counts / counts.sum(1, keepdims=True)
    heat = (shares / (counts.sum(0) / len(trace))).T
    return heat, np.bincount(group_of, minlength=groups), counts.sum(1)
