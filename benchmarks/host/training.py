"""P12 on the host: one optimizer step on rows in host memory, compared with Torch's sparse gradients.

``RowTrainer.step`` takes distinct keys and the sums of their gradients; "summed" is what comes before it in a framework, the
sums of equal keys. Torch's embedding has as many rows in a tensor, without a hash, and its step is given a coalesced sparse
gradient. ``HPS.insert`` of rows that exist is a step without arithmetic. Each repetition draws new keys and times every
candidate once; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import config_of, save_model
from report import add_options, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.runtime import threads as hps_threads
from hps_numba.training.trainer import Adagrad, Adam, RowTrainer, Rule, Sgd, summed_rows

#: keys of a batch -> distinct keys among them, as in batches of log-uniform keys
BATCHES = {16_384: 9_000, 1 << 20: 259_000}
RULES: list[Rule] = [Sgd(0.1), Adagrad(0.1), Adam(0.1)]
SCALING_TARGET = 1.7
INSERT, SUMS = "HPS.insert", "summed"
TORCH = {"torch.optim.SGD": torch.optim.SGD, "torch.optim.SparseAdam": torch.optim.SparseAdam}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    table_bytes: int = 1 << 29
    batches: tuple[tuple[int, int], ...] = tuple(BATCHES.items())
    repetitions: int = 7
    warmups: int = 3  # the first steps also take memory for states and for the rows that are written beside the old ones


QUICK = Sizes(table_bytes=1 << 20, batches=((1024, 300),), repetitions=3, warmups=1)


@dataclass
class Bench:
    """A served table, its optimizers, and the same rows as a tensor."""

    server: hps_numba.HPS
    keys: np.ndarray
    dim: int

    def __post_init__(self) -> None:
        self.trainers = {rule.name: RowTrainer(self.server, "m", 0, rule) for rule in RULES}
        self.weight = torch.nn.Parameter(torch.from_numpy(self.server.lookup(self.keys, "m", 0)))
        self.optimizers = {name: kind([self.weight], lr=0.1) for name, kind in TORCH.items()}

    def calls(self, n: int, distinct: int, random: np.random.Generator) -> dict[str, Callable[[], object]]:
        """By name: one call of each candidate, on new keys."""
        numbers = random.choice(len(self.keys), distinct, replace=False)
        keys, gradients = self.keys[numbers], random.random((distinct, self.dim), np.float32)
        rows = random.random((n, self.dim), np.float32)
        groups = random.permutation(np.append(np.arange(distinct), random.integers(0, distinct, n - distinct)))
        order, starts = np.argsort(groups, kind="stable"), np.append(0, np.cumsum(np.bincount(groups, minlength=distinct)))
        indices, values = torch.from_numpy(numbers)[None], torch.from_numpy(gradients)
        order_of_rows = torch.argsort(indices[0])
        sparse = torch.sparse_coo_tensor(
            indices[:, order_of_rows], values[order_of_rows], self.weight.shape, is_coalesced=True, check_invariants=False
        )

        def step_of_torch(name: str) -> None:
            self.weight.grad = sparse
            self.optimizers[name].step()

        return {
            **{name: lambda name=name: self.trainers[name].step(keys, gradients) for name in self.trainers},
            INSERT: lambda: self.server.insert(keys, gradients, "m", 0),
            SUMS: lambda: summed_rows(rows, order, starts),
            **{name: lambda name=name: step_of_torch(name) for name in self.optimizers},
        }


def check(bench: Bench) -> None:
    """A step of SGD changes the rows as Torch's does."""
    keys = bench.keys[:100]
    before = bench.server.lookup(keys, "m", 0)
    gradients = np.random.default_rng(0).random((100, bench.dim), np.float32)
    bench.trainers["sgd"].step(keys, gradients)
    if not np.array_equal(bench.server.lookup(keys, "m", 0), before - np.float32(0.1) * gradients):
        raise AssertionError("a step made wrong rows")


def measure_batch(bench: Bench, n: int, distinct: int, sizes: Sizes) -> dict[str, dict[int, float]]:
    """Median milliseconds of each candidate with one and two threads."""
    times: dict[str, dict[int, float]] = {}
    random = np.random.default_rng(n)
    for threads in (1, 2):
        hps_threads._pool.threads = threads
        torch.set_num_threads(threads)
        taken: dict[str, list[float]] = {}
        for _ in range(sizes.warmups + sizes.repetitions):
            for name, call in bench.calls(n, distinct, random).items():
                start = time.perf_counter()
                call()
                taken.setdefault(name, []).append((time.perf_counter() - start) * 1e3)
        for name, some in taken.items():
            times.setdefault(name, {})[threads] = statistics.median(some[sizes.warmups :])
    return times


def show(dim: int, n: int, distinct: int, times: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    cells, results = [], []
    for name, some in times.items():
        scaling = some[1] / some[2]
        judged = verdict(scaling, at_least=SCALING_TARGET) if name in ("sgd", "adagrad", "adam") else ""
        rows = n if name == SUMS else distinct
        each = [f"{some[threads] * 1e6 / rows:.0f}" for threads in (1, 2)]
        cells.append([name, *(f"{some[threads]:.2f}" for threads in (1, 2)), *each, f"{scaling:.2f}", judged])
        results.append({"name": name, "ms": some, "scaling": scaling, "target": judged})
    head = ["candidate", "ms, 1 thread", "2 threads", "ns/row, 1 thread", "2 threads", "speed-up", "target"]
    print_table(f"D={dim}: {n:,} keys, {distinct:,} distinct", head, cells)
    return results


def measure(dim: int, sizes: Sizes) -> dict[str, Any]:
    """Measure one width and print its tables; returns the figures."""
    with tempfile.TemporaryDirectory(prefix="hps_training_") as temporary:
        folder = Path(temporary) / "table.model"
        keys = save_model(folder, sizes.table_bytes // (4 * dim), dim)
        server = hps_numba.HPS(config_of(folder, dim))
    with server:
        bench = Bench(server, keys, dim)
        check(bench)
        batches = [
            {"keys": n, "distinct": distinct, "candidates": show(dim, n, distinct, measure_batch(bench, n, distinct, sizes))}
            for n, distinct in sizes.batches
        ]
    return {"dim": dim, "rows": len(keys), "batches": batches}


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description="Optimizer steps on rows in host memory (P12)."))
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 128], help="widths to measure")
    options = parser.parse_args()
    print_machine("Optimizer steps on the host (P12): medians, ratios within one run", quick=options.quick)
    sizes = QUICK if options.quick else Sizes()
    finish(options.json, quick=options.quick, widths=[measure(dim, sizes) for dim in options.dims])


if __name__ == "__main__":
    main()
