"""P12: a training step on a GPU, compared with the embeddings of Torch that hold all their rows on the device.

A step is what an optimizer does after ``backward``: sums of the gradients of equal keys, the step itself, rows in host memory
and in the cache written. Batches are log-uniform over the row numbers. Ours is a ``LookupLayer(trainable=True)`` over a table
in host memory with ``--percent`` of it cached; theirs is ``nn.Embedding(sparse=True)`` with ``torch.optim.SGD`` and
``SparseAdam``. Times are by the clock of the host, from an idle device to an idle device, without forward and backward. The
parts of ours are measured alone: sums on the device, the copy to the host, the step of ``RowTrainer`` on arrays.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import Run, median, parser_of, print_table, verdict
from table import keys_of, rows_of

from hps_numba.frontends import torch as hps
from hps_numba.frontends.torch.row_gradients import OnHost, on_host
from hps_numba.server.registry import SERVERS

TARGETS_MS = {16_384: 1.5, 1 << 20: 20.0}
OURS = {"SGD": hps.SGD, "Adagrad": hps.Adagrad, "Adam": hps.Adam}
THEIRS = {"torch.optim.SGD": torch.optim.SGD, "torch.optim.SparseAdam": torch.optim.SparseAdam}
_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 4 << 20
    batches: tuple[int, ...] = (16_384, 131_072, 1 << 20)
    repetitions: int = 15
    warmups: int = 4  # the first steps also take and pin memory for the rows that are written beside the old ones


QUICK = Sizes(rows=1 << 20, batches=(16_384, 1 << 20), repetitions=7)
TINY = replace(QUICK, rows=3000, batches=(256, 1024), repetitions=2, warmups=1)


class Bench:
    """A served table, and the same rows in an embedding on the device."""

    def __init__(self, run: Run, dim: int, sizes: Sizes, percent: float, folder: Path) -> None:
        self.machine, self.sizes, self.dim = run.machine, sizes, dim
        table = folder / "t.model"
        table.mkdir()
        weight = torch.empty((sizes.rows, dim), device=self.machine.device)
        keys_of(np.arange(sizes.rows)).tofile(table / "key")
        with (table / "emb_vector").open("wb") as file:
            for start in range(0, sizes.rows, _CHUNK_ROWS):
                numbers = torch.arange(start, min(start + _CHUNK_ROWS, sizes.rows), device=self.machine.device)
                weight[numbers] = rows_of(numbers, dim)
                weight[numbers].cpu().numpy().tofile(file)
        self.embedding = torch.nn.Embedding.from_pretrained(weight, freeze=False, sparse=True)
        model = {
            "model": "m",
            "sparse_files": [str(table)],
            "embedding_vecsize_per_table": [dim],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [] if self.machine.ordinal is None else [self.machine.ordinal],
            "max_batch_size": max(sizes.batches),
            "gpucacheper": percent,
        }
        config = {"supportlonglong": True, "models": [model]}
        hps.Init(config)
        self.layer = hps.LookupLayer(config, "m", 0, dim, trainable=True)
        self.random = np.random.default_rng(dim)

    def numbers(self, n: int) -> np.ndarray:
        """Log-uniform row numbers, int64 ``[n]``."""
        return np.exp(self.random.random(n) * np.log(self.sizes.rows)).astype(np.int64) - 1

    def milliseconds(self, prepare: Callable[[], Callable[[], object]]) -> float:
        """Median time of what ``prepare`` returns, on new keys each time."""
        taken = []
        for _ in range(self.sizes.warmups + self.sizes.repetitions):
            call = prepare()
            self.machine.wait()
            start = time.perf_counter()
            call()
            self.machine.wait()
            taken.append((time.perf_counter() - start) * 1e3)
        return median(taken[self.sizes.warmups :])

    def gradients(self, n: int) -> tuple[np.ndarray, torch.Tensor]:
        return self.numbers(n), torch.randn((n, self.dim), device=self.machine.device)

    def ours(self, optimizer: Any, n: int) -> Callable[[], object]:
        """Keys and gradients are with the rows, as after ``backward``; gives the step."""
        numbers, gradients = self.gradients(n)
        optimizer.zero_grad()
        self.layer.rows.add_gradient(torch.from_numpy(keys_of(numbers)).to(self.machine.device), gradients)
        step: Callable[[], object] = optimizer.step
        return step

    def theirs(self, optimizer: Any, n: int) -> Callable[[], object]:
        numbers, gradients = self.gradients(n)
        self.embedding.weight.grad = torch.sparse_coo_tensor(
            torch.from_numpy(numbers)[None].to(self.machine.device),
            gradients,
            self.embedding.weight.shape,
            check_invariants=False,
        )
        step: Callable[[], object] = optimizer.step
        return step

    def parts(self, optimizer: Any, n: int) -> dict[str, float]:
        """Milliseconds of each part of a step of ours."""
        rows, trainer = self.layer.rows, optimizer.trainers()[0]

        def sums() -> Callable[[], object]:
            self.ours(optimizer, n)
            return rows.gathered

        def copy() -> Callable[[], object]:
            self.ours(optimizer, n)
            keys, gradients = rows.gathered()
            assert gradients is not None
            return lambda: arrived(on_host(keys, gradients))

        def arrived(there: OnHost) -> OnHost:
            if there.arrived is not None:
                there.arrived()
            return there

        def step(*, overwrite: bool) -> Callable[[], object]:
            keys, gradients, copied, _ = copy()()  # type: ignore[misc]
            gradients = gradients if copied else gradients.copy()
            return lambda: trainer.step(keys, gradients, overwrite=overwrite)

        answers = {"sums": self.milliseconds(sums), "copy to the host": self.milliseconds(copy)}
        answers["step, caches get the rows"] = self.milliseconds(lambda: step(overwrite=True))
        answers["step, caches read the rows"] = self.milliseconds(lambda: step(overwrite=False))
        return answers

    def check(self) -> None:
        """A step of SGD changes the rows that lookups return as Torch's does."""
        numbers, gradients = self.gradients(min(self.sizes.batches))
        keys = torch.from_numpy(keys_of(numbers)).to(self.machine.device)
        before = self.layer(keys).detach().double()
        optimizer = hps.SGD(self.layer, lr=0.5)
        self.layer.rows.add_gradient(keys, gradients)
        optimizer.step()
        optimizer.zero_grad()
        inverse = torch.from_numpy(np.unique(numbers, return_inverse=True)[1]).to(keys.device)
        total = torch.zeros((int(inverse.max()) + 1, self.dim), device=keys.device, dtype=torch.float64)
        expected = before - 0.5 * total.index_add_(0, inverse, gradients.double())[inverse]
        if not torch.allclose(self.layer(keys).detach().double(), expected, rtol=1e-4, atol=1e-4):
            raise AssertionError("a step made wrong rows")


def measure(run: Run, dim: int, sizes: Sizes, percent: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hps_training_") as folder:
        bench = Bench(run, dim, sizes, percent, Path(folder))
    try:
        bench.check()
        answers: dict[str, Any] = {}
        for n in sizes.batches:
            run.say(f"D={dim}: {n:,} keys")
            answers[f"{n}"] = measure_batch(bench, n, percent)
        return answers
    finally:
        bench.machine.wait()
        SERVERS.close()


def measure_batch(bench: Bench, n: int, percent: float) -> dict[str, Any]:
    """Measure batches of ``n`` keys and print their tables; returns the figures."""
    distinct = len(np.unique(bench.numbers(n)))
    times = {name: bench.milliseconds(lambda kind=kind: bench.ours(kind, n)) for name, kind in optimizers(bench).items()}
    for name, kind in THEIRS.items():
        optimizer = kind([bench.embedding.weight], lr=1e-3)
        times[name] = bench.milliseconds(lambda optimizer=optimizer: bench.theirs(optimizer, n))
    show(f"D={bench.dim}: {n:,} keys, {distinct:,} distinct, {percent:.0%} cached", times, n)
    parts = bench.parts(hps.SGD(bench.layer, lr=1e-3), n)
    print_table("parts of a step, SGD", ["", "ms"], [[name, f"{some:.2f}"] for name, some in parts.items()])
    return {"distinct": distinct, "ms": times, "parts_ms": parts}


def optimizers(bench: Bench) -> dict[str, Any]:
    return {name: kind(bench.layer, lr=1e-3) for name, kind in OURS.items()}


def show(title: str, times: dict[str, float], n: int) -> None:
    cells = []
    for name, some in times.items():
        judged = verdict(some, at_most=TARGETS_MS[n]) if name in ("SGD", "Adagrad") and n in TARGETS_MS else ""
        cells.append([name, f"{some:.2f}", *(f"{some / times[other]:.2f}" for other in THEIRS), judged])
    print_table(title, ["a step", "ms", *(f"/ {name}" for name in THEIRS), "target (ms)"], cells)


def main() -> int:
    parser = parser_of("Training steps compared with sparse embeddings of Torch (P12).", (128,))
    parser.add_argument("--percent", type=float, default=0.5, help="share of the table in the cache, 0 to 1 (default 0.5)")
    options = parser.parse_args()
    run = Run("Training steps (P12)", options)
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    for dim in options.dims:
        run.section(f"D={dim}", lambda dim=dim: measure(run, dim, sizes, options.percent))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
