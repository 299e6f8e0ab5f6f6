"""P2, P4, P5 in the Torch layer: ``LookupLayer`` and ``HPSEmbeddingBag`` compared with the embeddings of Torch, in one run.

``--quick --only small --dims 32`` takes under a minute: host times of small calls, through ``HPS.lookup`` and the layer, eager,
compiled and compiled for CUDA graphs (``mode="reduce-overhead"``), and 26 tables in one call, with the targets.

One model has several tables of one width, with all rows in the cache; keys are uniform and hashed by the layer, and batches are
new. Torch looks up row numbers in a tensor of the same rows, without a hash. Times are medians: by the clock of the host for an
eager call (the device may continue), by CUDA events around a call, and per call for 20 calls in a CUDA graph. Compiled calls
are compared with a compiled ``F.embedding`` and with an operator in Python that does nothing, the overhead of Torch for any of
them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import BATCHES, Call
from run import Run, median, parser_of, ratio_cells, verdict
from table import check, keys_of, rows_of

from hps_numba.frontends import torch as hps
from hps_numba.server.registry import SERVERS

EMBEDDING, MODULE, LAYER = "F.embedding", "nn.Embedding", "LookupLayer"
COMPILED = THEIRS, NOTHING, OURS = "F.embedding, compiled", "an operator without work, compiled", "LookupLayer, compiled"
BAG, ONE = "F.embedding_bag", "one table"
REDUCED = THEIRS_REDUCED, OURS_REDUCED = "F.embedding, reduce-overhead", "LookupLayer, reduce-overhead"
DIRECT, DIRECT_OUT, THEIR_MODULE = "HPS.lookup", "HPS.lookup(out=)", "nn.Embedding, compiled"
TENSOR, DICT = "tables, a tensor", "tables, a dict"
SECTIONS = ("small", "lookups", "bags", "tables")
#: P2 and P5: at most so many times the call in the second place, by host time
SMALL_TARGETS = {
    LAYER: (EMBEDDING, 1.3),
    DIRECT_OUT: (EMBEDDING, 1.0),
    OURS: (THEIRS, 1.3),
    OURS_REDUCED: (THEIRS_REDUCED, 1.05),
    TENSOR: (ONE, 1.3),
    DICT: (ONE, 2.0),
}
Figures = dict[str, dict[int, float]]

library = torch.library.Library("hps_numba_benchmark", "DEF")
library.define("nothing(Tensor keys, str request, int dim) -> Tensor")


def _nothing(keys: torch.Tensor, request: str, dim: int) -> torch.Tensor:
    return torch.empty((*keys.shape, dim), dtype=torch.float32, device=keys.device)


library.impl("nothing", _nothing, "CompositeExplicitAutograd")
torch.library.register_fake("hps_numba_benchmark::nothing", _nothing, lib=library)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 1 << 20
    tables: int = 26
    table_rows: int = 1 << 16
    batches: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536, 262_144)
    small: tuple[int, ...] = (256, 1024, 4096, 16_384)
    bags: tuple[int, ...] = (1024, 16_384)
    keys_of_bag: int = 20
    repetitions: int = 41


QUICK = Sizes(batches=(1024, 16_384, 262_144), small=(1024, 16_384), bags=(4096,), repetitions=15)
TINY = replace(
    QUICK, rows=2000, tables=3, table_rows=200, batches=(64, 256), small=(64,), bags=(32,), keys_of_bag=4, repetitions=3
)


class Served:
    """A server with one table of ``rows`` rows and several small ones, and the same rows as tensors."""

    def __init__(self, run: Run, dim: int, sizes: Sizes, folder: Path) -> None:
        self.run, self.machine, self.dim, self.sizes = run, run.machine, dim, sizes
        counts = [sizes.rows] + [sizes.table_rows] * sizes.tables
        files, self.tensors = [], []
        for number, count in enumerate(counts):
            table = folder / f"d{dim}_t{number}.model"
            table.mkdir()
            numbers = torch.arange(count, device=self.machine.device)
            rows = rows_of(numbers, dim)
            keys_of(np.arange(count)).tofile(table / "key")
            rows.cpu().numpy().tofile(table / "emb_vector")
            files.append(str(table))
            self.tensors.append(rows)
        model = {
            "model": "m",
            "sparse_files": files,
            "embedding_vecsize_per_table": [dim] * len(files),
            "maxnum_catfeature_query_per_table_per_sample": [1] * len(files),
            "default_value_for_each_table": [0.0] * len(files),
            "deployed_device_list": [] if self.machine.ordinal is None else [self.machine.ordinal],
            "max_batch_size": max(sizes.batches),
            "gpucacheper": 1.0,
        }
        run.say(f"D={dim}: loading {len(files)} tables")
        self.config = {"supportlonglong": True, "models": [model]}
        hps.Init(self.config)

    def layer(self, table: int = 0) -> Any:
        return hps.LookupLayer(self.config, "m", table, self.dim)

    def batches(self, n: int, rows: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Row numbers and keys of new batches, on the device."""
        random = np.random.default_rng(n)
        numbers = [random.integers(0, rows, n) for _ in range(BATCHES)]
        device = self.machine.device
        return [torch.from_numpy(some).to(device) for some in numbers], [
            torch.from_numpy(keys_of(some)).to(device) for some in numbers
        ]

    def lookups(self, n: int) -> dict[str, Call]:
        """By name: a call for one batch; checked if it looks up rows."""
        numbers, keys = self.batches(n, self.sizes.rows)
        weight, layer, embedding = self.tensors[0], self.layer(), torch.nn.functional.embedding
        module = torch.nn.Embedding.from_pretrained(weight)
        request, dim, nothing = layer.request, self.dim, torch.ops.hps_numba_benchmark.nothing.default
        torch.compiler.reset()  # otherwise the second size is compiled for all sizes
        theirs, without_work, ours = (
            torch.compile(function, fullgraph=True, backend="aot_eager" if self.machine.ordinal is None else "inductor")
            for function in (lambda rows: embedding(rows, weight), lambda some: nothing(some, request, dim), layer)
        )
        calls: dict[str, Call] = {
            EMBEDDING: lambda turn, stream: embedding(numbers[turn], weight),
            MODULE: lambda turn, stream: module(numbers[turn]),
            LAYER: lambda turn, stream: layer(keys[turn]),
            THEIRS: lambda turn, stream: theirs(numbers[turn]),
            NOTHING: lambda turn, stream: without_work(keys[turn]),
            OURS: lambda turn, stream: ours(keys[turn]),
        }
        for name, call in calls.items():
            rows = call(0, self.machine.stream())
            self.machine.wait()
            if name != NOTHING:
                check(name, rows, numbers[0], self.dim)
        return calls

    def measure_lookups(self) -> dict[str, Figures]:
        figures: dict[str, Figures] = {"wall": {}, "events": {}, "graph": {}}
        for n in self.sizes.batches:
            self.run.say(f"D={self.dim}: {n:,} keys")
            for name, call in self.lookups(n).items():
                for how, times in (
                    ("wall", self.machine.wall_times(call, 5)),
                    ("events", self.machine.times(call, self.sizes.repetitions)),
                    ("graph", None if name in COMPILED else self.machine.graph_times(call, self.sizes.repetitions)),
                ):
                    if times:
                        figures[how].setdefault(name, {})[n] = median(times)
        titles = {"wall": "eager, host clock", "events": "eager, events", "graph": "a node of a CUDA graph"}
        for how, some in figures.items():
            if some:
                ratio_cells(
                    f"D={self.dim}, {titles[how]}", {name: some[name] for name in some if name not in COMPILED}, EMBEDDING
                )
                compiled = {name: some[name] for name in COMPILED if name in some}
                if compiled:
                    ratio_cells(f"D={self.dim}, {titles[how].replace('eager', 'compiled')}", compiled, THEIRS)
        return figures

    def small(self, n: int) -> dict[str, Call]:
        """By name: a small call, of one table or of many with ``n`` keys in all; checked if it looks up rows."""
        numbers, keys = self.batches(n, self.sizes.rows)
        weight, layer, embedding = self.tensors[0], self.layer(), torch.nn.functional.embedding
        module, server = torch.nn.Embedding.from_pretrained(weight), SERVERS.opened[0]
        out = torch.empty(n, self.dim, device=self.machine.device)
        on_gpu = self.machine.ordinal is not None
        request, dim, nothing = layer.request, self.dim, torch.ops.hps_numba_benchmark.nothing.default
        torch.compiler.reset()
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": "inductor" if on_gpu else "aot_eager"}
        functions = {THEIRS: lambda rows: embedding(rows, weight), THEIR_MODULE: module}
        functions |= {NOTHING: lambda some: nothing(some, request, dim), OURS: layer}
        compiled = {name: torch.compile(function, **how) for name, function in functions.items()}
        if on_gpu:
            reduced = {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"}
            compiled |= {THEIRS_REDUCED: torch.compile(lambda rows: embedding(rows, weight), **reduced)}
            compiled |= {OURS_REDUCED: torch.compile(self.layer(), **reduced)}
        calls: dict[str, Call] = {
            EMBEDDING: lambda turn, stream: embedding(numbers[turn], weight),
            MODULE: lambda turn, stream: module(numbers[turn]),
            LAYER: lambda turn, stream: layer(keys[turn]),
            DIRECT: lambda turn, stream: server.lookup(keys[turn], "m", 0, None),
            DIRECT_OUT: lambda turn, stream: server.lookup(keys[turn], "m", 0, None, out=out),
        }
        for name, call in compiled.items():
            given = keys if name in (NOTHING, OURS, OURS_REDUCED) else numbers
            calls[name] = lambda turn, stream, call=call, given=given: call(given[turn])
        for name, call in calls.items():
            for _ in range(3 if name in REDUCED else 1):  # it records at the second call
                rows = call(0, self.machine.stream())
            self.machine.wait()
            if name != NOTHING:
                check(name, rows, numbers[0], self.dim)
        for name, call in self.tables(n).items():
            calls[name.removeprefix(f"{self.sizes.tables} ")] = call
        return calls

    def measure_small(self) -> dict[str, Figures]:
        """P2, P5: host times, and times by events, of small calls."""
        figures: dict[str, Figures] = {"wall": {}, "events": {}}
        for n in self.sizes.small:
            self.run.say(f"D={self.dim}: small calls, {n:,} keys")
            for name, call in self.small(n).items():
                figures["wall"].setdefault(name, {})[n] = median(self.machine.wall_times(call, 7))
                figures["events"].setdefault(name, {})[n] = median(self.machine.times(call, self.sizes.repetitions))
        for how, title in (("wall", "host clock"), ("events", "events")):
            ratio_cells(f"D={self.dim}: small calls, {title}", figures[how], EMBEDDING)
        for name, (base, most) in SMALL_TARGETS.items():
            for n, time in figures["wall"].get(name, {}).items():
                ratios = {how: some[name][n] / some[base][n] for how, some in figures.items()}
                judged = ratios["events" if base == ONE else "wall"]
                print(
                    f"{name} over {base}, {n:,} keys: {time:.1f} us, host {ratios['wall']:.2f}, events {ratios['events']:.2f} "
                    f"{verdict(judged, at_most=most)}"
                )
        print()
        return figures

    def bags(self, mode: str, count: int) -> dict[str, Call]:
        """By name: a call that pools ``count`` bags; checked to give equal rows."""
        each, weight, theirs = self.sizes.keys_of_bag, self.tensors[0], torch.nn.functional.embedding_bag
        flat_numbers, flat_keys = self.batches(count * each, self.sizes.rows)
        numbers = [some.view(count, each) for some in flat_numbers]
        keys = [some.view(count, each) for some in flat_keys]
        ours = hps.HPSEmbeddingBag(self.config, "m", 0, self.dim, mode=mode)
        calls: dict[str, Call] = {
            BAG: lambda turn, stream: theirs(numbers[turn], weight, mode=mode),
            "HPSEmbeddingBag": lambda turn, stream: ours(keys[turn]),
        }
        expected, got = (call(0, self.machine.stream()) for call in calls.values())
        if not torch.allclose(expected, got, rtol=1e-4, atol=1e-5):
            raise AssertionError(f"bags, {mode}, {count}: wrong rows")
        return calls

    def measure_bags(self) -> dict[str, Figures]:
        answers: dict[str, Figures] = {}
        for mode in ("sum", "mean"):
            figures = answers[mode] = self._events({count: self.bags(mode, count) for count in self.sizes.bags})
            ratio_cells(f"D={self.dim}, bags of {self.sizes.keys_of_bag} keys, {mode}, events", figures, BAG)
        return answers

    def tables(self, n: int) -> dict[str, Call]:
        """By name: a call that looks up ``n`` keys, from one table or spread over many."""
        tables, embedding = self.sizes.tables, torch.nn.functional.embedding
        collection = hps.LookupCollection(self.config, "m", {f"t{table}": (1 + table, self.dim) for table in range(tables)})
        one = self.layer()
        numbers, keys = self.batches(n // tables, self.sizes.table_rows)
        _, all_keys = self.batches(n // tables * tables, self.sizes.rows)
        features = [{f"t{table}": some.clone() for table in range(tables)} for some in keys]
        stacked = [torch.stack(list(some.values())) for some in features]
        calls: dict[str, Call] = {
            ONE: lambda turn, stream: one(all_keys[turn]),
            f"{tables} {DICT}": lambda turn, stream: list(collection(features[turn]).values()),
            f"{tables} {TENSOR}": lambda turn, stream: list(collection(stacked[turn])),
            f"{tables} x F.embedding": lambda turn, stream: [embedding(numbers[turn], some) for some in self.tensors[1:]],
        }
        for name in list(calls)[1:]:
            for rows in calls[name](0, self.machine.stream()):
                self.machine.wait()
                check(name, rows, numbers[0], self.dim)
        calls[f"{tables} {DICT}"] = lambda turn, stream: collection(features[turn])
        calls[f"{tables} {TENSOR}"] = lambda turn, stream: collection(stacked[turn])
        return calls

    def measure_tables(self) -> Figures:
        """P5: all tables, compared with one table and the same total number of keys."""
        figures = self._events({n: self.tables(n) for n in self.sizes.batches if n >= 16 * self.sizes.tables})
        ratio_cells(f"D={self.dim}, keys in all, events", figures, ONE)
        return figures

    def _events(self, cases: dict[int, dict[str, Call]]) -> Figures:
        """Medians by CUDA events, by name and size."""
        figures: Figures = {}
        for n, calls in cases.items():
            for name, call in calls.items():
                figures.setdefault(name, {})[n] = median(self.machine.times(call, self.sizes.repetitions))
        return figures


def measure(run: Run, dim: int, sizes: Sizes, sections: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="hps_torch_layer_") as folder:
        served = Served(run, dim, sizes, Path(folder))
    try:
        return {name: getattr(served, f"measure_{name}")() for name in sections}
    finally:
        served.machine.wait()
        SERVERS.close()


def sections_option(text: str) -> list[str]:
    """Parse ``small,tables`` into names of sections."""
    names = text.split(",")
    if not set(names) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(SECTIONS)}, got {text!r}")
    return names


def main() -> int:
    parser = parser_of("The Torch layers compared with the embeddings of Torch.", (32, 128))
    parser.add_argument("--only", type=sections_option, default=list(SECTIONS), metavar="NAME,NAME", help=", ".join(SECTIONS))
    options = parser.parse_args()
    run = Run("LookupLayer and HPSEmbeddingBag", options)
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    for dim in options.dims:
        run.section(f"D={dim}", lambda dim=dim: measure(run, dim, sizes, options.only))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
