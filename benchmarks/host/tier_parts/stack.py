"""What the stack of tiers adds to a lookup, and what concurrent lookups share (goal T5).

*Added*: all keys of a lookup are missing in host memory, so that the slower tier answers each. The tier's own batch read is
the same ``fetch`` of the same distinct keys into an array that is there already. Three tiers: one in memory (``hash_map``), the
same with 1 ms and with 10 ms of latency a call.

*Shared*: threads look up the same missing keys at the same time, or each others; the calls of the tier are counted, as it is,
and with everything shared by nobody, which is what a stack without it does, by turns. One tier answers any number of calls at a
time and says so (``parallel_fetches``, 16), the other one call after the other (1).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from model import config_of, save_model
from report import add_options, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.server.shared_fetches import SharedFetches
from hps_numba.storage import Fetched
from hps_numba.storage.tiers._wrappers import WrapperTier
from hps_numba.storage.tiers.hash_map import HashMapTier

DIM = 32
ROWS, QUICK_ROWS = 400_000, 4_000
BATCHES, QUICK_BATCHES = (64, 1024, 8192), (64, 256)
LATENCIES = (0.0, 0.001, 0.01)
ROUNDS, QUICK_ROUNDS = 61, 5
THREADS = (2, 8, 16)
LOOKUPS, QUICK_LOOKUPS = 60, 4
CROWDS, QUICK_CROWDS = 7, 1
SHARED_BATCH = 256


class LatentTier(WrapperTier):
    """A ``hash_map`` that waits ``seconds`` in each fetch, and counts them; with ``in_turn`` one call after the other."""

    in_turn = False

    def __init__(self, section: Any, *, wide_keys: bool = True) -> None:
        super().__init__(HashMapTier.from_options(wide_keys=wide_keys))
        self.seconds = 0.0
        self.fetches = 0
        self._turn = threading.Lock()

    @property
    def parallel_fetches(self) -> int:  # type: ignore[override]
        return 1 if self.in_turn else 16

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Fetched:
        self.fetches += 1
        if self.seconds:
            with self._turn if self.in_turn else nullcontext():
                time.sleep(self.seconds)
        return self.inner.fetch(table, keys, rows, deadline=deadline)


@contextmanager
def opened(folder: Path, rows: int) -> Iterator[tuple[hps_numba.HPS, LatentTier, np.ndarray]]:
    """A server with empty host memory in front of the tier, the tier, and all keys."""
    sys.modules.setdefault("stack_of_tiers", sys.modules[__name__])
    keys = save_model(folder / "table.model", rows, DIM)
    host = {"type": "hash_map", "initialize_after_startup": False}
    config = {**config_of(folder / "table.model", DIM), "tiers": [host, {"type": "stack_of_tiers:LatentTier"}]}
    config.pop("volatile_db", None)
    with hps_numba.HPS(config, allow_code=True) as server:
        yield server, server._loader.slower.tiers[0], keys


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, alternating; the first round is left out."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def added(server: hps_numba.HPS, tier: LatentTier, keys: np.ndarray, batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a lookup, and of the tier's own read of the same keys."""
    some = np.random.default_rng(batch).choice(keys, batch, replace=False)
    out, own = np.empty((batch, DIM), np.float32), np.empty((batch, DIM), np.float32)
    tag = server._catalog.table("m", 0).spec.tag
    calls = {"tier": lambda: tier.fetch(tag, some, own), "lookup": lambda: server.lookup(some, "m", 0, out=out)}
    taken = milliseconds(calls, rounds)
    if not np.array_equal(out, own):
        raise SystemExit("the lookup gives other rows than the tier")
    return taken


def show_added(results: dict[str, dict[str, list[float]]]) -> None:
    rows = []
    for name, taken in results.items():
        own, lookup = (statistics.median(taken[what]) for what in ("tier", "lookup"))
        share = lookup / own - 1
        rows.append([name, f"{own:.3f}", f"{lookup:.3f}", f"{share:+.1%}", verdict(share, at_most=0.2)])
    print_table(f"D={DIM}, all keys missing: ms, medians", ["", "tier's own read", "lookup", "added", "T5"], rows)


def crowd(server: hps_numba.HPS, tier: LatentTier, batches: list[list[np.ndarray]]) -> dict[str, float]:
    """Threads that look up their batches, all starting each one together; calls of the tier, and seconds."""
    barrier, before, start = threading.Barrier(len(batches)), tier.fetches, time.perf_counter()

    def work(mine: list[np.ndarray]) -> None:
        for some in mine:
            barrier.wait()
            server.lookup(some, "m", 0)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"calls": float(tier.fetches - before), "seconds": time.perf_counter() - start}


@contextmanager
def nothing_shared() -> Iterator[None]:
    """Each lookup asks for itself, as without ``SharedFetches``."""
    fetch = SharedFetches.fetch
    SharedFetches.fetch = lambda self, keys, count, deadline=None, *, out=None: self._lead(keys, deadline)  # type: ignore
    try:
        yield
    finally:
        SharedFetches.fetch = fetch  # type: ignore[method-assign]


def shared(
    server: hps_numba.HPS, tier: LatentTier, keys: np.ndarray, lookups: int, crowds: int
) -> dict[str, list[dict[str, float]]]:
    """Calls and seconds for threads that miss the same keys, or others, with and without sharing."""
    results: dict[str, list[dict[str, float]]] = {}
    rng = np.random.default_rng(1)
    tier.seconds = 0.001
    for in_turn, threads, same in itertools.product((False, True), THREADS, (True, False)):
        tier.in_turn = in_turn
        server._loader.slower._known = None  # it keeps what a tier has said, which does not change otherwise
        name = f"{'in turn' if in_turn else 'parallel'}, {threads} threads, {'the same keys' if same else 'other keys'}"
        for _ in range(crowds):
            of_all = [rng.choice(keys, SHARED_BATCH) for _ in range(lookups)]
            batches = [of_all if same else [rng.choice(keys, SHARED_BATCH) for _ in of_all] for _ in range(threads)]
            results.setdefault(name, []).append(crowd(server, tier, batches))
            with nothing_shared():
                results.setdefault(f"{name}, not shared", []).append(crowd(server, tier, batches))
    tier.seconds = 0.0
    return results


def show_shared(results: dict[str, list[dict[str, float]]], lookups: int) -> None:
    rows = []
    rates: dict[str, float] = {}
    for name, rounds in results.items():
        threads = name.split(", ")[1].split()[0]
        total = int(threads) * lookups
        rates[name] = statistics.median(total / counted["seconds"] for counted in rounds)
        calls = statistics.median(counted["calls"] for counted in rounds)
        rows.append([name, f"{total}", f"{calls:.0f}", f"{total / calls:.1f}", f"{rates[name]:,.0f}", ""])
    for row in rows:
        if f"{row[0]}, not shared" in rates:
            row[-1] = f"{rates[row[0]] / rates[f'{row[0]}, not shared'] - 1:+.0%}"
    head = ["", "lookups", "calls of the tier", "lookups a call", "lookups/s", "gain"]
    print_table(f"{SHARED_BATCH} keys a lookup, a tier of 1 ms a call; medians", head, rows)


def run(quick: bool) -> dict[str, Any]:
    """Measure, print, and return the figures."""
    rounds, lookups, crowds = (QUICK_ROUNDS, QUICK_LOOKUPS, QUICK_CROWDS) if quick else (ROUNDS, LOOKUPS, CROWDS)
    results: dict[str, dict[str, list[float]]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="hps_stack_") as folder,
        opened(Path(folder), QUICK_ROWS if quick else ROWS) as (server, tier, keys),
    ):
        for seconds in LATENCIES:
            for batch in QUICK_BATCHES if quick else BATCHES:
                tier.seconds = seconds
                results[f"{seconds * 1e3:g} ms a call, {batch} keys"] = added(server, tier, keys, batch, rounds)
        show_added(results)
        counted = shared(server, tier, keys, lookups, crowds)
        show_shared(counted, lookups)
    return {"added": results, "shared": counted}


def main() -> None:
    options = add_options(argparse.ArgumentParser(description="What the stack of tiers adds, and what it shares.")).parse_args()
    print_machine("The stack of tiers", quick=options.quick)
    finish(options.json, quick=options.quick, **run(options.quick))


if __name__ == "__main__":
    main()
