"""A load: which requests, and how they are sent; and the cases that are measured."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.cli._serve_load.arrivals import due_times
from hps_numba.cli._serve_load.connection import ModelFacts, Probe, Target
from hps_numba.cli._serve_load.engine import Connections, closed_loop, open_loop
from hps_numba.cli._serve_load.outcomes import Outcomes
from hps_numba.cli._serve_load.process_cpu import tree_cpu_seconds
from hps_numba.cli._serve_load.prometheus import gained
from hps_numba.cli._serve_load.tensors import Shape, load_tensors
from hps_numba.errors import ConfigError

__all__ = ["Case", "Load", "Settings", "measure", "wires_of"]

_MOST_WIRE_BYTES = 128 << 20


@dataclass(frozen=True)
class Case:
    """One measurement: an open loop of ``rate`` requests a second, or a closed one of ``concurrency`` connections.

    ``share`` stands for a rate: that share of what the closed loops before it have reached.
    """

    concurrency: int | None = None
    rate: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Settings:
    """How requests are sent.

    Attributes:
        seconds, warmup: of each case, and before it without a record.
        connections: of an open loop.
        distinct: most different requests, which are sent in turn.
        pid: process of the server, whose CPU time is read; None: not.
    """

    seconds: float = 10.0
    warmup: float = 1.0
    arrivals: str = "poisson"
    connections: int = 64
    distinct: int = 1000
    timeout: float = 10.0
    seed: int = 0
    pid: int | None = None


@dataclass(frozen=True)
class Load:
    """Requests to one model, ready to be sent."""

    model: str
    keys: int
    wires: Sequence[bytes]
    probe: Probe = field(repr=False)

    @property
    def request_bytes(self) -> float:
        """Mean bytes of a request."""
        return sum(map(len, self.wires)) / len(self.wires)


def wires_of(target: Target, facts: ModelFacts, shape: Shape, parameters: Mapping[str, Any], settings: Settings) -> list[bytes]:
    """Different requests, as many as are wanted and fit into 128 MiB."""
    wires: list[bytes] = []
    size = 0
    for tensors in load_tensors(facts, shape, settings.distinct):
        wires.append(target.wire(facts.name, tensors, parameters))
        size += len(wires[-1])
        if size > _MOST_WIRE_BYTES:
            break
    return wires


async def measure(
    target: Target, load: Load, cases: Sequence[Case], settings: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The figures of each case, in order.

    Raises:
        ConfigError: a rate is a share of closed loops of which none was answered.
        ServeError: the server cannot be reached any more.
    """
    connections = Connections(target, load.probe.tensor_bytes, settings.timeout)
    results: list[dict[str, Any]] = []
    best = 0.0
    try:
        for number, case in enumerate(cases):
            rate = case.rate if case.share is None else _share(case.share, best)
            say(f"{load.keys:,} keys, " + (f"{rate:,.0f} requests/s" if rate else f"concurrency {case.concurrency}"))
            await connections.open(case.concurrency or settings.connections)
            rng = np.random.default_rng([settings.seed, number])
            if settings.warmup:
                await _run(connections, load, case, rate, settings.warmup, settings, rng)
            result = await _measured(target, connections, load, case, rate, settings, rng)
            best = max(best, result["requests_per_second"] if case.concurrency else 0.0)
            results.append(result)
    finally:
        connections.close()
    return results


def _share(share: float, best: float) -> float:
    if best <= 0:
        raise ConfigError(f"--rate: expected answers in a closed loop to take {share:.0%} of, got none")
    return best * share


async def _run(
    connections: Connections, load: Load, case: Case, rate: float | None, seconds: float, settings: Settings,
    rng: np.random.Generator,
) -> tuple[Outcomes, float, dict[str, int]]:  # fmt: skip
    if rate is None:
        return await closed_loop(connections, load.wires, seconds)
    return await open_loop(connections, load.wires, due_times(settings.arrivals, rate, seconds, rng))


async def _measured(
    target: Target, connections: Connections, load: Load, case: Case, rate: float | None, settings: Settings,
    rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    metrics, cpu = await target.text("/metrics"), _server_cpu(settings.pid)
    reopened, began, own = connections.reopened, time.perf_counter(), time.process_time()
    with _no_collection():
        outcomes, begin, marks = await _run(connections, load, case, rate, settings.seconds, settings, rng)
    own, wall = time.process_time() - own, time.perf_counter() - began
    spent = _server_cpu(settings.pid)
    figures = outcomes.summary(begin, settings.seconds)
    requests = max(1, figures["requests"])
    return {
        "keys": load.keys,
        "loop": "closed" if rate is None else "open",
        "concurrency": case.concurrency,
        "rate": rate,
        **figures,
        **marks,
        "reopened": connections.reopened - reopened,
        "client_cpu_seconds_per_request": own / requests,
        "client_cpu_share": own / wall,
        "server_cpu_seconds_per_request": None if cpu is None or spent is None else (spent - cpu) / requests,
        "metrics": gained(metrics, await target.text("/metrics")),
    }


def _server_cpu(pid: int | None) -> float | None:
    return None if pid is None else tree_cpu_seconds(pid)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No cycles are collected in the block: a collection would be in the latency of some requests."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
