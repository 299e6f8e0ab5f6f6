"""P4, P5 and measurements without a target: pooled lookups, many tables in one call, low-precision rows, graphs with misses.

* Pooled (P4): sums of bags, compared with a kernel that reads each row once by its number and writes each sum once, and with
  ``F.embedding_bag``.
* Tables (P5): ``HPS.lookup_many`` of 26 tables, compared with ``HPS.lookup`` of one table with the same total number of keys.
* Row types: float32 and float16 answers from rows that the cache stores in each type, compared with float32 for both.
* Graphs: lookups with misses in a CUDA graph, replayed with new keys; every row of every replay is compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import misses
import numpy as np
import torch
from gather import PlainGather, PlainPool
from lookup import Batches
from measure import BATCHES, Call, Machine
from run import Run, compact, median, parser_of, print_table, ratio_cells, verdict
from table import check, fill_store, keys_of, resident_cache, rows_of

import hps_numba

DIMS = (32, 128)
SECTIONS = ("pooled", "tables", "row types", "graphs")
P4, P5 = 1.25, 1.3
TABLES = 26  # as in DLRM
CEILING, GATHER, FLOAT32 = "plain pooling", "plain gather", "float32 to float32"
#: largest error of an element, relative to the largest element of its row
TOLERANCES = {"float32": 0.0, "float16": 1e-3, "bfloat16": 6e-3, "int8": 6e-3, "float8_e4m3": 0.07}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 3_100_000
    ways: int = 4_194_300
    bags: tuple[tuple[int, int], ...] = ((1024, 8), (16_384, 8), (16_384, 64), (131_072, 8))  # bags, keys in each
    table_rows: int = 100_000
    table_keys: tuple[int, ...] = (64, 1024, 16_384)
    batches: tuple[int, ...] = (16_384, 262_144, 1_048_576)
    graph_batches: tuple[int, ...] = (1024, 16_384, 131_072)
    repetitions: int = 31
    replays: int = 12
    row_types: tuple[str, ...] = tuple(TOLERANCES)
    answers: tuple[str, ...] = ("float32", "float16")
    misses: misses.Sizes = field(default_factory=misses.Sizes)


QUICK = Sizes(
    rows=1_000_000, ways=1_350_000, bags=((1024, 8), (16_384, 64)), table_rows=10_000, table_keys=(64, 4096),
    batches=(1_048_576,), graph_batches=(1024, 131_072), repetitions=11, replays=6,
    misses=replace(misses.QUICK, table_bytes=(1 << 28,)),
)  # fmt: skip
TINY = Sizes(
    rows=3000, ways=4000, bags=((16, 4), (64, 3)), table_rows=40, table_keys=(8, 32), batches=(64, 256), graph_batches=(64,),
    repetitions=3, replays=2, row_types=("float32", "int8"), misses=misses.TINY,
)  # fmt: skip


def found_so_far(figures: Mapping[str, Mapping[Any, float]], case: Any) -> str:
    """The times of a case as one line."""
    return ", ".join(f"{name} {compact(some[case])}" for name, some in figures.items() if case in some)


# -- pooled -------------------------------------------------------------------------------------------------------------------


def pooled(run: Run, dim: int, sizes: Sizes) -> dict[str, Any]:
    """P4: medians by candidate for each number of bags and of keys in a bag."""
    machine = run.machine
    store = fill_store(machine, sizes.rows, dim)
    cache = resident_cache(machine, store, sizes.ways)
    weights = rows_of(torch.arange(sizes.rows, device=machine.device), dim)
    figures: dict[str, dict[str, float]] = {}
    try:
        for bags, hotness in sizes.bags:
            case = f"{bags:,} x {hotness}"
            for name, call in pool_calls(machine, cache, weights, bags, hotness).items():
                figures.setdefault(name, {})[case] = median(machine.times(call, sizes.repetitions))
            run.say(f"D={dim} bags x keys {case}, us: {found_so_far(figures, case)}")
    finally:
        machine.wait()
        cache.close()
        store.close()
    show_pooled(dim, figures)
    return figures


def pool_calls(machine: Machine, cache: Any, weights: torch.Tensor, bags: int, hotness: int) -> dict[str, Call]:
    """The candidates by name; checked."""
    dim = weights.shape[1]
    batches = Batches(machine, len(weights), bags * hotness, dim, BATCHES)
    offsets = torch.arange(bags + 1, device=machine.device) * hotness
    out = torch.empty((bags, dim), device=machine.device)
    plain, numbers, keys = PlainPool(machine, dim, hotness), batches.numbers, batches.keys
    bag = torch.nn.functional.embedding_bag
    calls: dict[str, Call] = {CEILING: lambda turn, stream: plain(numbers[turn], weights, out, stream)}
    for combiner in ("sum", "mean", "sqrtn"):
        calls[f"hps {combiner}"] = pool_call(cache, combiner, keys, offsets, out)
    calls["F.embedding_bag"] = lambda turn, stream: bag(numbers[turn], weights, offsets, mode="sum", include_last_offset=True)
    for name, call in calls.items():
        out.fill_(float("nan"))
        answer = call(0, machine.stream())
        machine.wait()
        check_pooled(name, out if answer is None else answer, weights[numbers[0]].view(bags, hotness, dim))
    return calls


def pool_call(cache: Any, combiner: str, keys: Sequence[torch.Tensor], offsets: torch.Tensor, out: torch.Tensor) -> Call:
    """``EmbeddingCache.pool`` with addresses."""
    at, n, bags = [some.data_ptr() for some in keys], len(keys[0]), len(out)
    offsets_at, out_at = offsets.data_ptr(), out.data_ptr()

    def call(turn: int, stream: int, kept: Any = (keys, offsets, out)) -> None:  # addresses do not keep memory alive
        cache.pool(at[turn], n, offsets_at, bags, out_at, stream, combiner=combiner)

    return call


def check_pooled(name: str, got: torch.Tensor, rows: torch.Tensor) -> None:
    """Raise unless all sums are right up to float32 rounding of their terms."""
    hotness = rows.shape[1]
    divisor = {"hps mean": hotness, "hps sqrtn": hotness**0.5}.get(name, 1.0)
    wide = rows.to(torch.float64)
    error = (got.to(torch.float64) - wide.sum(1) / divisor).abs().nan_to_num(nan=torch.inf)
    if not bool((error <= wide.abs().sum(1) / divisor * (hotness * 2.0**-23)).all()):
        raise AssertionError(f"{name}: pooled rows are off by up to {error.max().item():g}")


def show_pooled(dim: int, figures: dict[str, dict[str, float]]) -> None:
    """Print microseconds and the ratio to the ceiling."""
    cases = list(figures[CEILING])
    rows = []
    for name, some in figures.items():
        ratios = {case: some[case] / figures[CEILING][case] for case in cases}
        judged = (f" {verdict(ratio, at_most=P4)}" if name.startswith("hps") else "" for ratio in ratios.values())
        rows.append(
            [name, *(f"{compact(some[case])} ({ratios[case]:.2f}){mark}" for case, mark in zip(cases, judged, strict=True))]
        )
    print_table(f"D={dim}: pooled lookups, us (ratio to {CEILING}) (P4)", ["bags x keys", *cases], rows)


# -- many tables --------------------------------------------------------------------------------------------------------------


def tables(run: Run, dim: int, sizes: Sizes) -> dict[str, Any]:
    """P5: one call for many tables compared with one table and as many keys, by events and by the clock of the host."""
    machine = run.machine
    with tempfile.TemporaryDirectory(prefix="hps_tables_") as folder:
        run.say(f"writing {TABLES} tables of {sizes.table_rows:,} rows, and one with the rows of all")
        server = hps_numba.HPS(tables_config(Path(folder), dim, sizes, on_cpu=machine.ordinal is None))
    figures: dict[str, dict[int, float]] = {}
    with server:
        for n in sizes.table_keys:
            for name, call in table_calls(server, machine, dim, sizes, n).items():
                figures.setdefault(f"{name}: device", {})[n * TABLES] = median(machine.times(call, sizes.repetitions))
                figures.setdefault(f"{name}: host", {})[n * TABLES] = median(machine.wall_times(call, 3))
            run.say(f"D={dim} {n * TABLES:,} keys, us: {found_so_far(figures, n * TABLES)}")

    def note(name: str, n: int, ratio: float) -> str:
        return f" {verdict(ratio, at_most=P5)}" if name == f"{TABLES} tables: device" else ""

    ratio_cells(f"D={dim}: keys in all tables (P5)", figures, "one table: device", note=note)
    return figures


def tables_config(folder: Path, dim: int, sizes: Sizes, *, on_cpu: bool) -> dict[str, Any]:
    """Write the tables; a config of the model ``many`` with all tables and the model ``one`` with their rows in one table."""
    files = [write_table(folder / f"table{number}.model", dim, number, 1, sizes) for number in range(TABLES)]
    whole = write_table(folder / "whole.model", dim, 0, TABLES, sizes)
    models = [model_entry("many", files, dim), model_entry("one", [whole], dim)]
    return {"supportlonglong": True, "cache_on_cpu": on_cpu, "models": models}


def write_table(path: Path, dim: int, number: int, count: int, sizes: Sizes) -> str:
    """Write a model with the rows of ``count`` tables, starting with table ``number``; rows are numbered across tables."""
    numbers = np.arange(number * sizes.table_rows, (number + count) * sizes.table_rows)
    hps_numba.write_model(path, dim, [(keys_of(numbers), rows_of(torch.from_numpy(numbers), dim).numpy())])
    return str(path)


def model_entry(name: str, files: Sequence[str], dim: int) -> dict[str, Any]:
    """The config of a model whose caches hold every row."""
    return {
        "model": name,
        "sparse_files": list(files),
        "embedding_vecsize_per_table": [dim] * len(files),
        "maxnum_catfeature_query_per_table_per_sample": [1] * len(files),
        "default_value_for_each_table": [0.0] * len(files),
        "deployed_device_list": [0],
        "max_batch_size": 16_384,
        "gpucache": True,
        "gpucacheper": 1.0,
    }


def table_calls(server: Any, machine: Machine, dim: int, sizes: Sizes, n: int) -> dict[str, Call]:
    """``n`` keys of each table: in one call for all tables, in one call for each, and from one table; checked."""
    rng, rows = np.random.default_rng(n), sizes.table_rows
    numbers = [[rng.integers(0, rows, n) + number * rows for number in range(TABLES)] for _ in range(BATCHES)]
    keys = [[torch.from_numpy(keys_of(some)).to(machine.device) for some in batch] for batch in numbers]
    flat = [torch.cat(batch) for batch in keys]
    calls: dict[str, Call] = {
        "one table": lambda turn, stream: [server.lookup(flat[turn], "one", 0)],
        f"{TABLES} tables": lambda turn, stream: server.lookup_many(keys[turn], "many"),
        f"{TABLES} calls": lambda turn, stream: [server.lookup(some, "many", i) for i, some in enumerate(keys[turn])],
    }
    expected = torch.from_numpy(np.concatenate(numbers[0])).to(machine.device)
    for name, call in calls.items():
        answer = torch.cat(call(0, machine.stream()))
        check(name, answer, expected, dim)
    return calls


# -- row types ----------------------------------------------------------------------------------------------------------------


def row_types(run: Run, dim: int, sizes: Sizes) -> dict[str, Any]:
    """Hits only, by the type of stored rows and of answers, compared with float32 for both."""
    machine = run.machine
    store = fill_store(machine, sizes.rows, dim)
    weights = rows_of(torch.arange(sizes.rows, device=machine.device), dim)
    gather = PlainGather(machine, dim)
    figures: dict[str, dict[int, float]] = {}
    batches = {n: Batches(machine, sizes.rows, n, dim, BATCHES) for n in sizes.batches}
    for row_type in sizes.row_types:
        cache = resident_cache(machine, store, sizes.ways, row_type=row_type)
        try:
            for answer in sizes.answers:
                name = f"{row_type} to {answer}"
                figures[name] = {n: one_type(machine, cache, some, answer, sizes) for n, some in batches.items()}
                run.say(f"D={dim} {name}, us: {', '.join(f'{n:,} keys {compact(time)}' for n, time in figures[name].items())}")
        finally:
            machine.wait()
            cache.close()
    for n, some in batches.items():
        call: Call = lambda turn, stream, some=some: gather(some.numbers[turn], weights, some.out, stream)  # noqa: E731
        figures.setdefault(GATHER, {})[n] = median(machine.times(call, sizes.repetitions))
    store.close()
    ratio_cells(f"D={dim}: rows stored as one type, answered in another", figures, FLOAT32)
    return figures


def one_type(machine: Machine, cache: Any, batches: Batches, answer: str, sizes: Sizes) -> float:
    """Median microseconds of a lookup, after a checked one."""
    keys, n = [some.data_ptr() for some in batches.keys], batches.n
    out = torch.full((n, cache.dim), float("nan"), dtype=getattr(torch, answer), device=machine.device)

    def call(turn: int, stream: int) -> None:
        cache.lookup(keys[turn], n, out.data_ptr(), stream, out_type=answer)

    call(0, machine.stream())
    machine.wait()
    tolerance = max(TOLERANCES[cache.row_type], TOLERANCES[answer])
    check(f"{cache.row_type} to {answer}", out, batches.numbers[0], cache.dim, tolerance=tolerance)
    return median(machine.times(call, sizes.repetitions))


# -- graphs -------------------------------------------------------------------------------------------------------------------


def graphs(run: Run, dim: int, sizes: Sizes) -> dict[str, Any]:
    """Lookups with 90 % hits in a graph, compared with eager ones; each replay has new keys, and every row is compared."""
    machine = run.machine
    if machine.ordinal is None:
        run.say("CUDA graphs are not available")
        return {}
    table = misses.Table(run, dim, sizes.misses.table_bytes[0], sizes.misses)
    figures: dict[str, dict[int, float]] = {}
    try:
        for n in sizes.graph_batches:
            figures.setdefault("eager", {})[n] = table.time(table.caches[misses.INSERTED], n, 90.0)[0]
            figures.setdefault("in a graph", {})[n] = replayed(table, n, sizes.replays)
            run.say(f"D={dim} {n:,} keys, 90 % hits, us: {found_so_far(figures, n)}")
    finally:
        table.close()
    ratio_cells(f"D={dim}: 90 % hits, one of {IN_ONE} lookups in a CUDA graph", figures, "eager")
    return figures


IN_ONE = 4  # lookups in a graph


def replayed(table: misses.Table, n: int, replays: int) -> float:
    """Median microseconds of one lookup in a graph, replayed with new keys."""
    machine, dim = table.machine, table.dim
    cache, device = table.caches[misses.INSERTED], machine.device
    keys = torch.zeros((IN_ONE, n), dtype=torch.int64, device=device)
    out = torch.empty((IN_ONE, n, dim), device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(IN_ONE):
            cache.lookup(keys[i].data_ptr(), n, out[i].data_ptr(), machine.stream(), capturing=True)
    times = []
    for _ in range(replays):
        numbers = np.stack([table.draw(n, 90.0) for _ in range(IN_ONE)])
        keys.copy_(torch.from_numpy(keys_of(numbers)))
        out.fill_(float("nan"))
        times.append(machine.between(graph.replay) / IN_ONE)
        for i in range(IN_ONE):
            check("replay", out[i], torch.from_numpy(numbers[i]).to(device), dim)
    return median(times)


# -- all ----------------------------------------------------------------------------------------------------------------------

WORK: dict[str, Callable[[Run, int, Sizes], dict[str, Any]]] = dict(
    zip(SECTIONS, (pooled, tables, row_types, graphs), strict=True)
)


def sections_option(text: str) -> list[str]:
    """Parse ``pooled,tables`` into names of sections."""
    names = text.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(SECTIONS)}, got {unknown[0]!r}")
    return names


def main() -> int:
    parser = parser_of("Pooled lookups (P4), many tables (P5), row types, graphs with misses.", DIMS)
    parser.add_argument("--only", type=sections_option, default=list(SECTIONS), metavar="NAME,NAME", help=", ".join(SECTIONS))
    options = parser.parse_args()
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    run = Run("Device: pooled (P4), many tables (P5), row types, graphs: medians, ratios within one run", options)
    for dim in [32] if options.quick and options.dims == list(DIMS) else options.dims:
        for name in options.only:
            run.section(f"D={dim}: {name}", lambda name=name, dim=dim: WORK[name](run, dim, sizes))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
