"""P1, P2: lookups that only hit the cache, compared with copies of rows by row number.

A cache of 4 M ways contains 3.1 M rows; keys are uniform over them, or skewed (Zipf with exponent 1.05) for large batches, and
every batch is new. In the same run: the plain gather
(16 bytes a thread, no hash: the ceiling), ``F.embedding`` and ``torch.index_select`` on a tensor with the same rows. Times are
medians: by CUDA events around one call, per call for 20 calls in a CUDA graph, and by the clock of the host for an eager call.
In a graph, a lookup is two nodes, because rows may be missing when it is replayed; ``static`` shows the first of them only.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gather import PlainGather
from measure import BATCHES, IN_A_GRAPH, Call, Machine, copy_rate
from run import Run, compact, median, parser_of, ratio_cells, verdict
from table import check, fill_store, keys_of, resident_cache, rows_of, skewed_numbers

import hps_numba

DIMS = (16, 32, 64, 128)
GATHER, EMBEDDING, SELECT = "plain gather", "F.embedding", "index_select"
UNIFORM, ZIPF = "uniform", "zipf 1.05"
#: at most this ratio to the plain gather
P1 = {
    UNIFORM: {16: 1.35, 32: 1.25, 64: 1.15, 128: 1.10},
    ZIPF: {32: 1.35, 128: 1.10},
}
P1_FROM = 262_144
P2_NODE, P2_NODE_UP_TO, P2_FASTER_FROM = 1.4, 16_384, 4096
P2_WALL, P2_WALL_OUT = 1.3, 1.0  # of our calls; of HPS.lookup with an output
OUT = "HPS.lookup(out=)"

Candidates = dict[str, Call]
Figures = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 3_100_000
    ways: int = 4_194_300
    batches: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    graph_batches: tuple[int, ...] = (256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
    wall_batches: tuple[int, ...] = (256, 1024, 4096, 16_384)
    policies: tuple[str, ...] = ("lru", "lfu", "static")
    server_rows: int = 1 << 20
    repetitions: int = 41
    copy_bytes: int = 2 << 30


QUICK = Sizes(
    batches=(1024, 16_384, 262_144, 1_048_576),
    graph_batches=(1024, 4096, 16_384, 262_144, 1_048_576),
    wall_batches=(1024, 16_384),
    policies=("lru", "static"),
    server_rows=1 << 17,
    repetitions=15,
)
TINY = replace(
    QUICK, rows=3000, ways=4000, batches=(64, 256), graph_batches=(64,), wall_batches=(64,), server_rows=500, repetitions=3,
    copy_bytes=1 << 16,
)  # fmt: skip


class Batches:
    """Batches of one size: row numbers and keys on the device, and memory for one answer."""

    def __init__(self, machine: Machine, rows: int, n: int, dim: int, count: int, keys: str = UNIFORM) -> None:
        rng = np.random.default_rng(n)
        numbers = [rng.integers(0, rows, n) if keys == UNIFORM else skewed_numbers(rng, 1.05, rows, n) for _ in range(count)]
        self.n = n
        self.numbers = [torch.from_numpy(some).to(machine.device) for some in numbers]
        self.keys = [torch.from_numpy(keys_of(some)).to(machine.device) for some in numbers]
        self.out = torch.empty((n, dim), device=machine.device)


class Table:
    """What is compared at one width: the rows as a tensor, and a warm cache of them for each policy."""

    def __init__(self, run: Run, dim: int, sizes: Sizes) -> None:
        self.machine, self.dim, self.sizes = run.machine, dim, sizes
        self.rows = torch.cat(
            [rows_of(part, dim) for part in torch.arange(sizes.rows, device=self.machine.device).split(1 << 20)]
        )
        run.say(f"D={dim}: filling a host store of {sizes.rows:,} rows")
        self.store = fill_store(self.machine, sizes.rows, dim)
        self.caches = {}
        for policy in sizes.policies:
            run.say(f"D={dim}: warming a cache, {policy}")
            options = {"kind": "static"} if policy == "static" else {"policy": policy}
            self.caches[policy] = resident_cache(self.machine, self.store, sizes.ways, **options)
        self._gather = PlainGather(self.machine, dim)

    def close(self) -> None:
        self.machine.wait()
        for cache in self.caches.values():
            cache.close()
        self.store.close()

    def candidates(self, batches: Batches) -> Candidates:
        """By name: a call that looks up one batch."""
        numbers, out, rows = batches.numbers, batches.out, self.rows
        embedding = torch.nn.functional.embedding
        calls: Candidates = {GATHER: lambda turn, stream: self._gather(numbers[turn], rows, out, stream)}
        calls |= {f"hps {policy}": self._lookup(cache, batches) for policy, cache in self.caches.items()}
        calls[EMBEDDING] = lambda turn, stream: embedding(numbers[turn], rows)
        calls[SELECT] = lambda turn, stream: torch.index_select(rows, 0, numbers[turn], out=out)
        return calls

    def _lookup(self, cache: Any, batches: Batches) -> Call:
        n, out = batches.n, batches.out.data_ptr()
        keys = [some.data_ptr() for some in batches.keys]
        lookup = cache.lookup
        return lambda turn, stream: lookup(keys[turn], n, out, stream)

    def check(self, calls: Candidates, batches: Batches) -> None:
        """Check that every candidate gives the right rows."""
        for name, call in calls.items():
            batches.out.fill_(float("nan"))
            answer = call(0, self.machine.stream())
            self.machine.wait()
            check(name, answer if name == EMBEDDING else batches.out, batches.numbers[0], self.dim)


def measure(
    run: Run,
    table: Table,
    sizes: Sequence[int],
    take: Callable[[Call], list[float] | None],
    what: str,
    keys: str = UNIFORM,
) -> Figures:
    """Medians of every candidate for every batch size, with a line of progress for each."""
    figures: Figures = {}
    for n in sizes:
        batches = Batches(table.machine, table.sizes.rows, n, table.dim, BATCHES, keys)
        calls = table.candidates(batches)
        table.check(calls, batches)
        for name, call in calls.items():
            times = take(call)
            if times is not None:
                figures.setdefault(name, {})[n] = median(times)
        found = ", ".join(f"{name} {compact(some[n])}" for name, some in figures.items() if n in some)
        run.say(f"D={table.dim} {what}, {n:,} keys, us: {found}")
    return figures


def eager(run: Run, table: Table) -> dict[str, Figures]:
    """P1: one call on an idle device, by the kind of keys."""
    machine, sizes = table.machine, table.sizes
    large = [n for n in sizes.batches if n >= P1_FROM] or sizes.batches[-1:]
    found = {}
    for keys, batches in ((UNIFORM, sizes.batches), (ZIPF, large)):

        def note(name: str, n: int, ratio: float, most: float | None = P1[keys].get(table.dim)) -> str:
            judged = name.startswith("hps") and n >= P1_FROM and most is not None
            return f" {verdict(ratio, at_most=most)}" if judged else ""

        found[keys] = measure(
            run, table, batches, lambda call: machine.times(call, sizes.repetitions), f"eager, {keys} keys", keys
        )
        ratio_cells(f"D={table.dim}: one call, {keys} keys, events (P1)", found[keys], GATHER, note=note)
    return found


def in_graphs(run: Run, table: Table) -> Figures:
    """P2: nodes of a CUDA graph. A lookup in a graph is two nodes, the lookup and the insertion that ends its batch."""
    repetitions = table.sizes.repetitions
    figures = measure(
        run, table, table.sizes.graph_batches, lambda call: table.machine.graph_times(call, repetitions), "in a graph"
    )
    if not figures:
        run.say("CUDA graphs are not available")
        return figures

    def note(name: str, n: int, ratio: float) -> str:
        return f" {verdict(ratio, at_most=P2_NODE)}" if name.startswith("hps") and n <= P2_NODE_UP_TO else ""

    ratio_cells(f"D={table.dim}: one of {IN_A_GRAPH} calls in a CUDA graph (P2)", figures, GATHER, note=note)
    for name in (name for name in figures if name.startswith("hps")):
        faster = {n: figures[name][n] / figures[EMBEDDING][n] for n in figures[name] if n >= P2_FASTER_FROM}
        said = ", ".join(f"{n:,} keys {ratio:.2f} {verdict(ratio, at_most=1.0)}" for n, ratio in faster.items())
        print(f"{name} over {EMBEDDING}: {said}\n")
    return figures


def on_the_clock(run: Run, table: Table) -> Figures:
    """P2: host time of an eager call with addresses."""
    machine, sizes = table.machine, table.sizes
    figures = measure(run, table, sizes.wall_batches, lambda call: machine.wall_times(call, 7), "host")
    title = f"D={table.dim}: host time of an eager call of EmbeddingCache.lookup (P2)"
    ratio_cells(title, figures, EMBEDDING, note=wall_note)
    return figures


def wall_note(name: str, n: int, ratio: float) -> str:
    """The target of P2 for our calls."""
    most = P2_WALL_OUT if name == OUT else P2_WALL
    return f" {verdict(ratio, at_most=most)}" if name.startswith(("hps", "HPS")) else ""


def measure_dim(run: Run, dim: int, sizes: Sizes) -> None:
    """All measurements of one width, a section each; the rows are created once."""
    tables: list[Table] = []
    run.section(f"D={dim}: preparation", lambda: tables.append(Table(run, dim, sizes)))
    for table in tables:
        for name, work in (("eager", eager), ("graph", in_graphs), ("host time", on_the_clock)):
            run.section(f"D={dim}: {name}", lambda work=work, table=table: work(run, table))
        table.close()


def server_times(run: Run, dim: int, sizes: Sizes) -> Figures:
    """P2: ``HPS.lookup`` of keys on the device, compared with ``F.embedding`` on the same rows."""
    machine, rows = run.machine, sizes.server_rows
    numbers = np.arange(rows)
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="hps_device_") as folder:
        model = Path(folder) / "table.model"
        weights = rows_of(torch.from_numpy(numbers), dim)
        hps_numba.write_model(model, dim, [(keys_of(numbers), weights.numpy())])
        server = hps_numba.HPS(config_of(model, dim, on_cpu=machine.ordinal is None))
    weights = weights.to(machine.device)
    with server:
        for n in sizes.wall_batches:
            batches = Batches(machine, rows, n, dim, BATCHES)
            calls = server_calls(server, batches, weights)
            for name, call in calls.items():
                answer = call(0, machine.stream())
                check(name, batches.out if answer is None else answer, batches.numbers[0], dim)
                figures.setdefault(name, {})[n] = median(machine.wall_times(call, 7))
    ratio_cells(f"D={dim}: host time of an eager call, {rows:,} rows (P2)", figures, EMBEDDING, note=wall_note)
    return figures


def server_calls(server: Any, batches: Batches, weights: torch.Tensor) -> Candidates:
    """``HPS.lookup`` of Torch tensors, and ``F.embedding``."""
    keys, numbers, out = batches.keys, batches.numbers, batches.out
    return {
        OUT: lambda turn, stream: server.lookup(keys[turn], "m", 0, out=out),
        "HPS.lookup": lambda turn, stream: server.lookup(keys[turn], "m", 0),
        EMBEDDING: lambda turn, stream: torch.nn.functional.embedding(numbers[turn], weights),
    }


def config_of(model: Path, dim: int, *, on_cpu: bool) -> dict[str, Any]:
    """A config of one table whose cache holds every row."""
    entry = {
        "model": "m",
        "sparse_files": [str(model)],
        "embedding_vecsize_per_table": [dim],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [0],
        "max_batch_size": 16_384,
        "gpucache": True,
        "gpucacheper": 1.0,
    }
    return {"supportlonglong": True, "cache_on_cpu": on_cpu, "models": [entry]}


def ceilings(run: Run, sizes: Sizes) -> dict[str, float]:
    """The bandwidth of the memory of the device."""
    rate = copy_rate(run.machine, sizes.copy_bytes)
    run.say(f"copy within the device: {rate:,.0f} GB/s, read plus written")
    return {"copy_gb_per_s": rate}


def main() -> int:
    options = parser_of("Lookups that only hit the cache, compared with row copies by number (P1, P2).", DIMS).parse_args()
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    dims = [32, 128] if options.quick and options.dims == list(DIMS) else options.dims
    run = Run("Device lookups, all hits (P1, P2): medians, ratios within one run", options)
    run.section("ceilings", lambda: ceilings(run, sizes))
    for dim in dims:
        measure_dim(run, dim, sizes)
    run.section("server", lambda: server_times(run, 32 if 32 in dims else dims[0], sizes))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
