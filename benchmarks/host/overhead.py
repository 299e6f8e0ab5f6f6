"""Where the microseconds of a small lookup go: the same keys through each layer, from the kernel upwards.

``host_lookup`` is the compiled kernel, called with known addresses. Two ways lead to it. Any arrays: ``HostStore.lookup``
checks them and finds their addresses; ``ServedTable.lookup`` counts, and would continue with slower tiers. Arrays as kernels
take them, as here: ``PlainLookups``, which ``HPS.lookup`` finds by the name of the table. All rows are in the caches of the
processor and one thread works, so the layers differ in code and not in memory.

Target (P6): one key in at most 5 us. Machines differ: look at the ratio to ``numpy.take`` in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from model import config_of, save_model
from others import Watch
from report import add_options, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.kernels.host.lookup import host_lookup

DIM, ROWS = 32, 4096
BATCHES, QUICK_BATCHES = (1, 16, 64, 256, 1024), (1, 64)
ROUNDS, QUICK_ROUNDS = 31, 9
ROUND_SECONDS, QUICK_ROUND_SECONDS = 0.004, 0.0005
TOP = "HPS.lookup(out=)"
ONE_KEY = 5.0  # microseconds at most

Call = Callable[[], Any]


def kernel_call(store: Any, keys: np.ndarray, out: np.ndarray) -> Call:
    record = store.epochs.acquire()
    places = keys.ctypes.data, 0, len(keys), out.ctypes.data
    return lambda: host_lookup(store.header, *places, 0.0, 0, store.epochs.address, record, 0, 0, False, False)


def layers(server: hps_numba.HPS, keys: np.ndarray, out: np.ndarray) -> dict[str, Call]:
    """The layers, from below."""
    session = server._catalog.table("m", 0)
    store, plain = session.store, session.plain_lookup(np.ndarray, None, 64)
    return {
        "host_lookup (kernel)": kernel_call(store, keys, out),
        "HostStore.lookup": lambda: store.lookup(keys, out),
        "ServedTable.lookup": lambda: session.lookup(keys, out),
        "PlainLookups": lambda: plain(keys, out, None),
        TOP: lambda: server.lookup(keys, "m", 0, out=out),
        "HPS.lookup": lambda: server.lookup(keys, "m", 0),
    }


def peers(keys: np.ndarray, slots: np.ndarray, rows: np.ndarray, out: np.ndarray) -> dict[str, Call]:
    """Rows by row number: NumPy and, if it is installed, Torch."""
    calls: dict[str, Call] = {"numpy.take(out=)": lambda: np.take(rows, slots, axis=0, out=out, mode="clip")}
    try:
        import torch
    except ImportError:
        return calls
    torch.set_num_threads(1)
    weight, numbers = torch.from_numpy(rows), torch.from_numpy(slots)
    embedding = torch.nn.functional.embedding
    return {**calls, "F.embedding": lambda: embedding(numbers, weight)}


def check(calls: dict[str, Call], out: np.ndarray, expected: np.ndarray) -> None:
    """Check that every call gives the same rows."""
    for name, call in calls.items():
        out[:] = -1
        answer = call()
        got = out if "out=" in name or name not in ("HPS.lookup", "F.embedding") else np.asarray(answer)
        if not np.array_equal(got, expected):
            raise SystemExit(f"{name}: wrong rows")


def microseconds(calls: dict[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Microseconds per call: one figure for each round, in which every call is repeated for about ``seconds``."""
    start = time.perf_counter()
    for call in calls.values():
        call()
    once = (time.perf_counter() - start) / len(calls)
    count = max(5, int(seconds / once))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(count):
                call()
            taken[name].append((time.perf_counter() - start) / count * 1e6)
    return taken


def measure(server: hps_numba.HPS, keys: np.ndarray, rows: np.ndarray, batch: int, *, quick: bool) -> dict[str, list[float]]:
    slots = np.random.default_rng(batch).integers(0, len(keys), batch)
    out = np.empty((batch, DIM), np.float32)
    calls = {**layers(server, keys[slots], out), **peers(keys, slots, rows, out)}
    check(calls, out, rows[slots])
    if quick:
        return microseconds(calls, QUICK_ROUNDS, QUICK_ROUND_SECONDS)
    return microseconds(calls, ROUNDS, ROUND_SECONDS)


def show(taken: dict[int, dict[str, list[float]]]) -> None:
    middle = {batch: {name: statistics.median(some) for name, some in times.items()} for batch, times in taken.items()}
    names = list(next(iter(middle.values())))
    head = ["", *(f"{batch} keys" for batch in middle)]
    cells = [[name, *(f"{times[name]:.2f}" for times in middle.values())] for name in names]
    print_table(f"D={DIM}, one thread: us per call", head, cells)
    shares = [[name, *(f"{times[name] / times[TOP]:.2f}" for times in middle.values())] for name in names]
    print_table(f"Share of {TOP}", head, shares)
    one = middle.get(1, {})
    if one:
        ratio = one[TOP] / one["numpy.take(out=)"]
        print(f"one key: {TOP} {one[TOP]:.2f} us, {ratio:.2f} times numpy.take {verdict(one[TOP], at_most=ONE_KEY)}\n")


def main() -> None:
    options = add_options(argparse.ArgumentParser(description="Microseconds of small lookups, layer by layer.")).parse_args()
    print_machine("Overhead of small lookups: medians", quick=options.quick)
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="hps_overhead_") as folder:
        keys = save_model(Path(folder) / "table.model", ROWS, DIM)
        rows = np.fromfile(Path(folder) / "table.model" / "emb_vector", np.float32).reshape(-1, DIM)
        server = hps_numba.HPS(config_of(Path(folder) / "table.model", DIM))
    with server:
        batches = QUICK_BATCHES if options.quick else BATCHES
        taken = {batch: measure(server, keys, rows, batch, quick=options.quick) for batch in batches}
    show(taken)
    if watch.disturbed:
        print(f"note: other programs kept {watch.cores():.1f} cores busy\n")
    finish(options.json, quick=options.quick, dim=DIM, microseconds=taken, cores_of_others=watch.cores())


if __name__ == "__main__":
    main()
