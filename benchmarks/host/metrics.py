"""What metrics cost: the timing of a sample of lookups, one text for a server of 26 tables, and a request of a front end.

Lookups in host memory, in a cache in host memory, and calls of that cache by address with their calls timed, as those of a
cache on a GPU are: there the kernels differ, and what is timed and how do not. A call whose timing is off asks all the same
whether it is due, so that has a line of its own.

Lookups with and without the timing alternate within one process, and each round gives one difference; the median of those
counts, as single rounds differ by more than what is measured. Counting itself is not switched off: it came before metrics did.

Target (S5): metrics take at most 1 % of a lookup of one key.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from model import config_of, save_model
from others import Watch
from report import add_options, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.cache.call_times import SAMPLED as SAMPLED_CALLS
from hps_numba.cache.call_times import CallTimes
from hps_numba.kernels.host.histogram import SAMPLED
from hps_numba.metrics import RequestMetrics

DIM, ROWS, TABLES = 32, 4096, 26
BATCHES = (1, 32)
MOST = 0.01
#: rounds, and lookups in each
FULL, QUICK = (800, 1000), (8, 50)


def pairs(switch: Callable[[bool], None], call: Callable[[], Any], rounds: int, calls: int) -> list[tuple[float, float]]:
    """Nanoseconds a call, with the switch on and off, one pair a round."""

    def block(on: bool) -> float:
        switch(on)
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start) / calls

    block(True)
    taken = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        times = {on: block(on) for on in order}
        taken.append((times[True], times[False]))
    return taken


def compared(switch: Callable[[bool], None], call: Callable[[], Any], rounds: int, calls: int) -> dict[str, float]:
    taken = pairs(switch, call, rounds, calls)
    switch(True)
    with_, without = (statistics.median(times) for times in zip(*taken, strict=True))
    cost = statistics.median(on - off for on, off in taken)
    share = statistics.median(on / off for on, off in taken) - 1
    return {"timed_ns": with_, "not_timed_ns": without, "cost_ns": cost, "share": share}


def of_lookups(server: hps_numba.HPS, keys: np.ndarray, rounds: int, calls: int) -> list[dict[str, float]]:
    table = server._catalog.table("m", 0)
    results = []
    for batch in BATCHES:
        some, out = keys[:batch].copy(), np.empty((batch, DIM), np.float32)
        call = partial(server.lookup, some, "m", 0, out=out)
        results.append({"keys": batch, **compared(table.time_lookups, call, rounds, calls)})
    return results


def of_calls(server: hps_numba.HPS, keys: np.ndarray, rounds: int, calls: int) -> list[dict[str, float]]:
    """Of the cache itself, by addresses, as layers call that of a GPU."""
    cache = server._catalog.table("m", 0).cache_on(None)
    assert cache is not None
    results = []
    for batch in BATCHES:
        some, out = keys[:batch].copy(), np.empty((batch, DIM), np.float32)
        call = partial(cache.lookup, some.ctypes.data, batch, out.ctypes.data, 0)
        results.append({"keys": batch, **compared(cache.calls.switch, call, rounds, calls)})
    return results


def of_asking(rounds: int, calls: int) -> float:
    """Nanoseconds to find that a call is not timed, in a loop, whose own cost is taken off."""
    times, differences = CallTimes(), []
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in range(calls):
            pass
        empty = time.perf_counter_ns()
        for _ in range(calls):
            since = time.perf_counter_ns() if next(times.due) else 0
            if since:
                times.end(since)
        end = time.perf_counter_ns()
        differences.append(((end - empty) - (empty - start)) / calls)
    return statistics.median(differences)


def print_lookups(title: str, lookups: list[dict[str, float]]) -> None:
    head = ["keys", "timed, ns", "not timed, ns", "median difference, ns", "share"]
    names = ("timed_ns", "not_timed_ns", "cost_ns")
    cells = [[f"{row['keys']:g}", *(f"{row[name]:.1f}" for name in names), f"{row['share']:.2%}"] for row in lookups]
    print_table(title, head, cells)


def milliseconds(call: Callable[[], Any], times: int) -> float:
    """Median of some calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken)


def config_of_cache(folder: Path) -> dict[str, Any]:
    """A config whose lookups a cache in host memory answers."""
    config = config_of(folder, DIM)
    config["cache_on_cpu"] = True
    config["models"][0].update(gpucache=True, gpucacheper=1.0, deployed_device_list=[0])
    return config


def config_of_tables(folder: Path) -> dict[str, Any]:
    """A config of one model with 26 tables, which share one file."""
    config = config_of(folder, DIM)
    (model,) = config["models"]
    for name in ("sparse_files", "embedding_vecsize_per_table", "default_value_for_each_table"):
        model[name] = model[name] * TABLES
    model["maxnum_catfeature_query_per_table_per_sample"] = [1] * TABLES
    return config


def of_texts(server: hps_numba.HPS, keys: np.ndarray, times: int) -> dict[str, float]:
    for table in range(TABLES):
        for first in range(20 * SAMPLED):
            server.lookup(keys[first : first + 1], "m", table)
    text = server.metrics_text()
    return {
        "text_ms": milliseconds(server.metrics_text, times),
        "openmetrics_ms": milliseconds(lambda: server.metrics_text(openmetrics=True), times),
        "collect_ms": milliseconds(server.metrics.collect, times),
        "stats_ms": milliseconds(server.stats, times),
        "lines": float(text.count("\n")),
        "kib": len(text) / 1024,
    }


def of_requests(blocks: int) -> float:
    """Microseconds that a front end spends on counting one request: median of blocks of a hundred."""
    metrics = RequestMetrics("benchmark", "in_process")

    def one() -> None:
        with metrics.request("m") as request:
            request.keys = 32

    def block() -> None:
        for _ in range(100):
            one()

    block()
    return milliseconds(block, blocks) * 10


def main() -> None:
    options = add_options(argparse.ArgumentParser(description="What metrics cost.")).parse_args()
    print_machine("Cost of metrics: medians", quick=options.quick)
    rounds, calls = QUICK if options.quick else FULL
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="hps_metrics_") as folder:
        keys = save_model(Path(folder) / "table.model", ROWS, DIM)
        with hps_numba.HPS(config_of(Path(folder) / "table.model", DIM)) as server:
            lookups = of_lookups(server, keys, rounds, calls)
        with hps_numba.HPS(config_of_cache(Path(folder) / "table.model")) as server:
            cached, by_address = (of(server, keys, rounds, calls) for of in (of_lookups, of_calls))
        with hps_numba.HPS(config_of_tables(Path(folder) / "table.model")) as server:
            texts = of_texts(server, keys, 3 if options.quick else 50)
    requests = of_requests(3 if options.quick else 300)
    asking = of_asking(rounds, calls)
    print_lookups(f"HPS.lookup(out=), D={DIM}: one lookup in {SAMPLED} is timed", lookups)
    print_lookups(f"HPS.lookup(out=) in a cache in host memory: one lookup in {SAMPLED_CALLS} is timed", cached)
    print_lookups(f"EmbeddingCache.lookup, by addresses: one call in {SAMPLED_CALLS} is timed", by_address)
    print(f"to ask whether a call of a cache is timed: {asking:.1f} ns\n")
    print_table(f"A server of {TABLES} tables", ["", "figure"], [[name, f"{value:.2f}"] for name, value in texts.items()])
    print(f"one key: {lookups[0]['share']:.2%} of a lookup {verdict(lookups[0]['share'], at_most=MOST)}")
    print(f"one request of a front end: {requests:.2f} us\n")
    if watch.disturbed:
        print(f"note: other programs kept {watch.cores():.1f} cores busy\n")
    results = {"lookups": lookups, "cached": cached, "by_address": by_address, "asking_ns": asking}
    results |= {"texts": texts, "request_us": requests, "cores_of_others": watch.cores()}
    finish(options.json, quick=options.quick, dim=DIM, **results)


if __name__ == "__main__":
    main()
