"""The tier ``multi_process_hash_map`` beside a private store in each process: the rate of their lookups, in one run.

As many processes as there are cores, and twice as many, look up random keys, first in one store that they share, then each in a
private store of the same size, in turns, so that both see the same machine. Then the shared one again with another process that
writes all the time. The goal (T4) is a rate within 5 % of the private stores.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import add_options, finish, print_machine, print_table, verdict

DIM, BATCH = 32, 1024
TABLE = "hps_et.bench.items"
TARGET = 0.95
MIB = 1 << 20
CONTEXT = multiprocessing.get_context("spawn")


def open_store(name: str | None, rows: int) -> tuple[Any, Any]:
    """A tier and its store of ``rows`` rows: in the segment of a name, else private."""
    from hps_numba.config import VolatileDatabaseConfig
    from hps_numba.storage.tiers.hash_map import HashMapTier
    from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

    if name is None:
        tier: Any = HashMapTier(VolatileDatabaseConfig(type="hash_map"))
    else:
        size = rows * 4 * DIM * 3 + 64 * MIB
        section = VolatileDatabaseConfig(type="multi_process_hash_map", shared_memory_name=name, shared_memory_size=size)
        tier = MultiProcessHashMapTier(section)
    if not tier.size(TABLE):
        keys = np.arange(rows)
        store = tier.store(TABLE, DIM)
        content = store.new_content(rows)
        content.rows_view(0, rows)[:] = keys[:, None]
        content.fill(keys, time.monotonic_ns())
        store.replace(content)
    return tier, tier.store(TABLE, DIM)


def read(name: str, rows: int, pipe: Any) -> None:
    """A process that looks up in the store that it is told, for as long as it is told, and says how many rows a second."""
    tiers = {"shared": open_store(name, rows), "private": open_store(None, rows)}
    keys = np.random.default_rng(os.getpid()).integers(0, rows, (256, BATCH))
    out = np.empty((BATCH, DIM), np.float32)
    pipe.send("ready")
    while (told := pipe.recv()) is not None:
        kind, begin, seconds = told
        store, done = tiers[kind][1], 0
        store.lookup(keys[0], out)
        time.sleep(max(0.0, begin - time.monotonic()))
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            store.lookup(keys[done % len(keys)], out, threads=1)
            done += 1
        if not (out == keys[(done - 1) % len(keys)][:, None]).all():
            raise SystemExit("wrong rows")
        pipe.send(done * BATCH / (time.perf_counter() - started))
    for tier, _ in tiers.values():
        tier.close()


def write(name: str, rows: int, stop: multiprocessing.synchronize.Event, pipe: Any) -> None:
    """A process that writes until told to stop, and says how many rows a second."""
    tier, store = open_store(name, rows)
    keys = np.random.default_rng(1).integers(0, rows, (64, BATCH))
    rows_of_one = np.ones((1, DIM), np.float32)
    store.upsert(keys[0, :1], keys[0, :1, None] * rows_of_one)
    pipe.send("ready")
    done, started = 0, time.perf_counter()
    while not stop.is_set():
        some = keys[done % len(keys)]
        store.upsert(some, some[:, None] * rows_of_one)
        done += 1
    pipe.send(done * BATCH / (time.perf_counter() - started))
    tier.close()


class Readers:
    """Processes that look up at the same time."""

    def __init__(self, count: int, name: str, rows: int) -> None:
        self.pipes, self.processes = [], []
        for _ in range(count):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=read, args=(name, rows, theirs))
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()

    def rate(self, kind: str, seconds: float) -> float:
        """Rows a second of all of them together."""
        begin = time.monotonic() + 0.05
        for pipe in self.pipes:
            pipe.send((kind, begin, seconds))
        return float(sum(pipe.recv() for pipe in self.pipes))

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join()


def measure(processes: int, rows: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Rates with so many processes: medians over rounds, and of the ratio in each round."""
    name = f"hps_bench_{uuid.uuid4().hex}"
    tier, _ = open_store(name, rows)
    readers = Readers(processes, name, rows)
    shared, private = [], []
    for number in range(rounds):
        pair = ("shared", "private") if number % 2 else ("private", "shared")
        rates = {kind: readers.rate(kind, seconds) for kind in pair}
        shared.append(rates["shared"])
        private.append(rates["private"])
    stop, (ours, theirs) = CONTEXT.Event(), CONTEXT.Pipe()
    writer = CONTEXT.Process(target=write, args=(name, rows, stop, theirs))
    writer.start()
    ours.recv()
    beside = statistics.median(readers.rate("shared", seconds) for _ in range(max(3, rounds // 3)))
    stop.set()
    written = float(ours.recv())
    writer.join()
    readers.close()
    tier.close()
    return {
        "processes": processes,
        "shared": statistics.median(shared),
        "private": statistics.median(private),
        "ratio": statistics.median(a / b for a, b in zip(shared, private, strict=True)),
        "beside_a_writer": beside,
        "written": written,
    }


def run(quick: bool) -> list[dict[str, Any]]:
    """Print the table, and return its figures."""
    rows, rounds, seconds = (20_000, 2, 0.05) if quick else (1_000_000, 21, 0.5)
    cores = len(os.sched_getaffinity(0))
    results = [measure(count, rows, rounds, seconds) for count in ([2] if quick else sorted({cores, 8}))]
    table = [
        [
            f"{line['processes']}",
            *(f"{line[key] / 1e6:.2f}" for key in ("private", "shared")),
            f"{line['ratio']:.3f}",
            *(f"{line[key] / 1e6:.2f}" for key in ("beside_a_writer", "written")),
        ]
        for line in results
    ]
    head = ["processes", "private, M rows/s", "shared, M rows/s", "shared / private", "shared beside a writer", "written"]
    print_table(f"Shared memory: {rows:,} rows of {DIM}, batches of {BATCH:,}, one thread a process", head, table)
    for line in results:
        print(f"{line['processes']} processes: shared over private: {verdict(line['ratio'], at_least=TARGET)}")
    print()
    return results


def main() -> None:
    """Run this part alone."""
    import argparse

    options = add_options(argparse.ArgumentParser(description=__doc__.partition("\n")[0])).parse_args()
    print_machine("The tier in shared memory", quick=options.quick)
    finish(options.json, quick=options.quick, shared_memory=run(options.quick))


if __name__ == "__main__":
    main()
