"""Simulate policies over a trace: each in caches of several sizes, fully associative and in the geometry of the GPU cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hps_numba.errors import ConfigError, TraceError
from hps_numba.runtime.progress import rows_progress
from hps_numba.simulate.candidates import BOUNDS, Candidate, find_candidates
from hps_numba.simulate.concurrency import map_in_threads
from hps_numba.simulate.dense_trace import DenseTrace, densify
from hps_numba.simulate.popularity import popularity_over_time
from hps_numba.simulate.replay import replay, whole_sets
from hps_numba.simulate.results import Run, Simulation
from hps_numba.simulate.sampling import sample_and_quarters, with_error
from hps_numba.simulate.settings import Settings, check_running, check_settings, warmup_requests
from hps_numba.simulate.sizes import DEFAULT_SIZES, parse_sizes
from hps_numba.traces.trace import Trace, open_trace

__all__ = ["DEFAULT_POLICIES", "read_trace", "run"]

DEFAULT_POLICIES = ("lru", "fifo", "lfu", "clock", "sieve", "s3fifo", "arc", "wtinylfu")
_WINDOWS = 100


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
    """Simulate cache policies over a trace: hits, admissions, evictions and bytes.

    Args:
        trace: a path, an integer array, or a ``Trace`` from ``open_trace``, which has more options.
        policies: one or several names (see ``known_names``), references ``file.py:NAME`` or ``module:NAME``, or classes; by
            default the most common algorithms.
        sizes: of the cache: rows, shares of the distinct keys, or ranges (see ``sizes.parse_sizes``); by default nine sizes
            from 0.1 % to 50 %. If any policy runs in the geometry of the GPU cache, all sizes are rounded up to whole sets, so
            that both geometries have equal sizes.
        geometry: ``gpu``: sets of ten ways and calls of ``batch`` keys, exactly as the GPU cache works; ``associative``: one
            order of all rows, and one request after the other; ``both``: each policy in every geometry that it supports.
        batch: keys of a call. In ``gpu``, all keys of a batch are looked up before any row is inserted, as in a lookup; in
            both geometries, it defines the distinct keys of a batch.
        warmup: requests at the beginning that are not counted: below 1 a share of the trace, else their number; whole batches.
        sample: share of the keys to simulate, above 0 and up to 1.
        bounds: also simulate Belady's optimum and the infinite cache.
        dim, row_dtype: of a row, for figures in bytes.
        windows: number of windows into which the trace is cut for figures over time; by default 100.
        threads: caches simulated at a time; by default one per core.
        allow_code: permit policies given by reference, whose code is run.
        progress: draw a progress bar; by default on a terminal, if there is much to do.

    Raises:
        TraceError: the trace cannot be read, or is empty.   PolicyError: a policy is unknown or breaks its contract.
        ConfigError: an argument is out of range.
    """
    threads = check_running(threads=threads, progress=progress, bounds=bounds, allow_code=allow_code)
    candidates = find_candidates(policies, allow_code=allow_code)
    check_settings(geometry=geometry, batch=batch, warmup=warmup, sample=sample, dim=dim, row_dtype=row_dtype, windows=windows)
    opened = open_trace(trace)
    dense = read_trace(opened, sample, progress)
    settings = Settings(batch, warmup_requests(warmup, dense.requests, batch), -(-len(dense) // windows), dim, row_dtype)
    distinct = round(dense.distinct / dense.rate)
    rows = parse_sizes(sizes, distinct)
    if geometry != "associative" and any(candidate.policy is not None for candidate in candidates):
        rows = sorted({whole_sets(size) for size in rows})  # the same in both geometries
    jobs, skipped = _plan_jobs(candidates, rows, geometry, bounds)
    runs = _run_jobs(jobs, sample_and_quarters(dense, rows), settings, threads, progress)
    heat, group_keys, requests_by_window = popularity_over_time(dense, settings.window)
    return Simulation(
        trace=dense.name,
        format=opened.format,
        requests=dense.requests,
        distinct=distinct,
        simulated=len(dense),
        rate=dense.rate,
        batch=batch,
        warmup=settings.warmup,
        dim=dim,
        row_dtype=row_dtype,
        window=settings.window,
        windows=requests_by_window,
        heat=heat,
        group_keys=group_keys,
        runs=runs,
        skipped=skipped,
    )


def read_trace(trace: Trace, sample: float, progress: bool | None) -> DenseTrace:
    """The trace, or a sample of its keys, with dense numbers; shows a progress bar.

    Raises:
        TraceError: it cannot be read, or is empty.   ConfigError: the sample is empty.
    """
    with rows_progress(trace.requests or 0, progress, unit="requests", doing="reading") as advance:
        dense = densify(trace, rate=sample, on_requests=lambda n: advance("reading", n))
    if dense.requests == 0:
        raise TraceError(f"{trace.name}: expected keys, got an empty trace")
    if len(dense) == 0:
        raise ConfigError(f"sample: expected a larger share, got {sample}, which selects no key of {trace.name}")
    return dense


@dataclass(frozen=True)
class _Job:
    candidate: Candidate
    geometry: str
    rows: int


def _plan_jobs(candidates: list[Candidate], rows: list[int], geometry: str, bounds: bool) -> tuple[list[_Job], tuple[str, ...]]:
    """What to simulate, and a line for each policy that does not support the geometry."""
    jobs, skipped = [], []
    for candidate in candidates:
        if candidate.is_bound:
            continue
        supported = {"gpu": candidate.policy is not None, "associative": candidate.is_associative}
        chosen = [name for name in supported if geometry in ("both", name) and supported[name]]
        jobs += [_Job(candidate, name, size) for name in chosen for size in rows]
        if not chosen:
            what = "needs one order of all rows" if geometry == "gpu" else "is defined within a set"
            skipped.append(f"{candidate.name}: {what}, so it is not simulated with geometry {geometry}")
    named = [candidate.name for candidate in candidates if candidate.is_bound]
    if named or bounds:
        for bound in find_candidates(list(dict.fromkeys([*named, *(BOUNDS if bounds else ())]))):
            jobs += [_Job(bound, "associative", size) for size in (rows if bound.name != "infinite" else rows[-1:])]
    if not jobs:
        raise ConfigError(f"nothing to simulate: {'; '.join(skipped)}")
    return jobs, tuple(skipped)


def _run_jobs(
    jobs: list[_Job], traces: list[DenseTrace], settings: Settings, threads: int | None, progress: bool | None
) -> tuple[Run, ...]:
    """A run for each job; ``traces``: the trace, or a sample and its quarters."""
    for trace in traces:  # computed once, before several threads need them
        trace.firsts(max(1, round(settings.batch * trace.rate)))
        if any(job.candidate.algorithm is not None and job.candidate.algorithm.looks_ahead for job in jobs):
            trace.future()
    with rows_progress(len(jobs) * sum(map(len, traces)), progress, unit="requests", doing="simulating") as advance:

        def work(job: _Job, check: Callable[[], None]) -> Run:
            def on_requests(n: int) -> None:
                check()
                advance(f"{job.candidate.name}, {job.rows:,} rows", n)

            whole, *quarters = (replay(job.candidate, job.geometry, job.rows, trace, settings, on_requests) for trace in traces)
            return with_error(whole, quarters)

        return tuple(map_in_threads(work, jobs, threads))
