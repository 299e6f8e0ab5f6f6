"""The fastest shape of the kernel for large lookups, by the types of rows and answers.

A shape is the part of ``KernelSpec`` that concerns a GPU: lanes of a tile, keys that a warp looks up at a time, loads in flight
for each lane, maximum number of registers of a thread. All keys hit. The first shape of each pair of types is the one that
lookups use, and the others are compared with it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from lookup import Batches
from measure import BATCHES
from others import TOLERANCES
from run import Run, compact, median, parser_of, print_table
from table import check, fill_store, resident_cache

DIMS = (32, 128)
ANSWERS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 3_100_000
    ways: int = 4_194_300
    keys: int = 1_048_576
    repetitions: int = 21
    registers: tuple[int, ...] = (40, 48, 56, 64, 72)
    depths: tuple[int, ...] = (8, 16)


QUICK = Sizes(rows=1_000_000, ways=1_350_000, repetitions=11, registers=(48, 64))
TINY = replace(QUICK, rows=3000, ways=4000, keys=20_000, repetitions=3, depths=(8,))


class Shape(NamedTuple):
    """The shape of a kernel."""

    lanes: int
    group: int
    depth: int
    registers: int


def shapes_of(built: Shape, sizes: Sizes) -> Iterator[Shape]:
    """The shape that lookups use, then similar ones."""
    yield built
    groups = sorted({max(8, built.group // 2), built.group, min(32, built.group * 2)})
    for group, depth, registers in itertools.product(groups, sizes.depths, sizes.registers):
        shape = Shape(built.lanes, group, depth, registers)
        if shape != built:
            yield shape


def one_pair(run: Run, cache: Any, batches: Batches, answer: str, sizes: Sizes) -> dict[str, float]:
    """Median microseconds by shape, after a checked lookup for each."""
    machine, n = run.machine, batches.n
    keys = [some.data_ptr() for some in batches.keys]
    out = torch.empty((n, cache.dim), dtype=getattr(torch, answer), device=machine.device)
    form = ("lookup_kernel", "int64", answer, True, False)
    spec = cache.parts.kernels.spec(form)
    figures = {}

    def call(turn: int, stream: int) -> None:
        cache.lookup(keys[turn], n, out.data_ptr(), stream, out_type=answer, capturing=False)

    for shape in shapes_of(Shape(spec.lanes, spec.group, spec.depth, spec.registers), sizes):
        cache.parts.kernels.made[form] = cache.backend.kernel(replace(spec, **shape._asdict())), shape.group
        out.fill_(float("nan"))
        call(0, machine.stream())
        machine.wait()
        tolerance = max(TOLERANCES[cache.row_type], TOLERANCES[answer])
        check(f"{cache.row_type} to {answer}, {shape}", out, batches.numbers[0], cache.dim, tolerance=tolerance)
        figures[" ".join(map(str, shape))] = median(machine.times(call, sizes.repetitions))
    return figures


def all_pairs(run: Run, dim: int, sizes: Sizes, rows: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    """Measure every pair of types; returns the figures."""
    machine = run.machine
    store = fill_store(machine, sizes.rows, dim)
    batches = Batches(machine, sizes.rows, sizes.keys, dim, BATCHES)
    figures: dict[str, dict[str, float]] = {}
    for row_type in rows:
        cache = resident_cache(machine, store, sizes.ways, row_type=row_type)
        try:
            for answer in answers:
                pair = f"{row_type} to {answer}"
                figures[pair] = times = one_pair(run, cache, batches, answer, sizes)
                best = min(times, key=lambda shape: times[shape])
                built = next(iter(times))
                run.say(f"D={dim} {pair}: in use {built}: {compact(times[built])} us, best {best}: {compact(times[best])} us")
        finally:
            machine.wait()
            cache.close()
    store.close()
    for pair, times in figures.items():
        first = next(iter(times.values()))
        table = [
            [shape, compact(time), f"{time / first:.3f}"] for shape, time in sorted(times.items(), key=lambda item: item[1])
        ]
        print_table(
            f"D={dim}, {sizes.keys:,} keys: {pair}", ["lanes group depth registers", "us", "ratio to the shape in use"], table
        )
    return figures


def main() -> int:
    parser = parser_of("Shapes of the kernel of large lookups, by the types of rows and answers.", DIMS)
    parser.add_argument("--rows", nargs="+", choices=TOLERANCES, default=list(TOLERANCES), help="types of rows")
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=["float32", "float16"], help="types of answers")
    options = parser.parse_args()
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    run = Run("Device: shapes of the kernel of large lookups, all hits: medians", options)
    for dim in options.dims:
        run.section(f"D={dim}", lambda dim=dim: all_pairs(run, dim, sizes, options.rows, options.answers))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
