"""P3: lookups with misses, whose rows cross the bus from the host store, compared with the bandwidth of the bus.

A table of 1 GiB (with ``--large`` also of 4 and 16 GiB; ``--gib``) is in pinned memory; its hot set is 131,072 rows. Batches
are new: a share of the keys is from the hot set, the others are from the rest of the table. Two caches of the hot set answer
them: one with 262,144 ways that inserts missed rows (with a policy that evicts rows hit only once first, so that the hot set
stays), and a fixed one of kind ``uvm``, which never changes and shows the lookup only. The difference is the cost of insertion.
Hit rates are counted by the cache.

The bus is measured in the same run: a copy from pinned memory, the plain gather on the rows of the host store (no hash), and
the lookup with a cache of 64 rows. The bytes of a miss are those of its row; the bus time of a batch is its bytes divided by
the rate of the plain gather for that table.

Both caches have an index mirror on the device (``miss_path: auto``), as caches of a server have by default.

``--at-size`` measures what users have instead (``at_size.py``).

``--paths`` measures similar batches with each value of ``miss_path`` instead: ``direct``, ``auto`` (with the mirror) and
``staged``, with tables of 1 and (without ``--quick``) 8 GiB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from at_size import AtSize, measure_at_size
from gather import PlainGather
from measure import WARMUPS, Call, host_copy_rate
from run import Run, compact, median, parser_of, print_table, verdict
from table import add_rows, check, keys_of, new_cache, new_store

from hps_numba.kernels.policies._load import as_policy

DIMS = (32, 128)
P3, P3_AT = 1.25, 90.0  # at most this ratio to the larger of bus and hits, at this hit rate in per cent
INSERTED, LOOKUP_ONLY = "with insertion", "lookup only"
PATHS = DIRECT, AUTO, STAGED = "direct", "auto", "staged"


class EvictUntouchedFirst:
    """Rows that were not requested since their insertion are evicted first; the others in order of recency."""

    clock = "insertions"

    def first(now, count):  # type: ignore[no-untyped-def]
        return 0

    def touch(score, now, count):  # type: ignore[no-untyped-def]
        return now + 1


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    table_bytes: tuple[int, ...] = (1 << 30,)
    few: int = 64
    hot: int = 131_072
    ways: int = 262_140
    batches: tuple[int, ...] = (1024, 16_384, 131_072, 1_048_576)
    hit_rates: tuple[float, ...] = (100.0, 99.0, 95.0, 90.0, 50.0)
    repetitions: int = 21
    copy_bytes: int = 1 << 30

    @property
    def for_paths(self) -> Sizes:
        """The same for ``--paths``."""
        if self is TINY:
            return replace(self, hit_rates=(90.0, 50.0))
        tables = (1 << 30,) if self is QUICK else (1 << 30, 8 << 30)
        return replace(self, table_bytes=tables, batches=(16_384, 131_072, 1_048_576), hit_rates=(90.0, 50.0))


QUICK = Sizes(batches=(1024, 131_072, 1_048_576), hit_rates=(100.0, 90.0, 50.0), repetitions=7)
TINY = Sizes((1 << 17,), 8, 50, 200, (64, 256), (100.0, 90.0, 50.0), 3, 1 << 16)


class Table:
    """One table in host memory, and the caches that are compared: its first ``hot`` rows are the hot set.

    A fixed cache keeps the rows that the store had when it was warmed. So the store is filled in steps, and a cache is created
    after each; the keys of the hot set are spread over all sets, like those of any rows.
    """

    def __init__(self, run: Run, dim: int, size: int, sizes: Sizes) -> None:
        self.machine, self.dim, self.sizes = run.machine, dim, sizes
        self.rows = size // (4 * dim)
        self.rng = np.random.default_rng(dim)
        run.say(f"D={dim}: filling a host store of {self.rows:,} rows, and caches")
        self.store = new_store(self.machine, self.rows, dim)
        add_rows(self.machine, self.store, 0, sizes.few)
        self.few = self._fixed()
        add_rows(self.machine, self.store, sizes.few, sizes.hot)
        self.caches = self._caches()
        add_rows(self.machine, self.store, sizes.hot, self.rows)
        for cache in (self.few, *self.caches.values()):
            if cache.mirror_index():
                run.say(f"index mirror: {cache.index_mirror_bytes / (1 << 20):.0f} MiB")
            cache.check_fully_resident()
        self.out = torch.empty((max(sizes.batches), dim), device=self.machine.device)

    def _caches(self) -> dict[str, Any]:
        return {INSERTED: self._inserting(), LOOKUP_ONLY: self._fixed()}

    def _fixed(self, **options: Any) -> Any:
        """A cache of the rows that the store has now; it does not change later."""
        cache = new_cache(self.machine, self.store, len(self.store), kind="uvm", **{"miss_path": AUTO} | options)
        cache.warm()
        return cache

    def _inserting(self, **options: Any) -> Any:
        """A cache that contains the hot set; every row of it has been requested since its insertion."""
        options = {"miss_path": AUTO, "policy": as_policy(EvictUntouchedFirst)} | options
        cache = new_cache(self.machine, self.store, self.sizes.ways, **options)
        for _ in range(3):
            cache.lookup_arrays(keys_of(np.arange(self.sizes.hot)))
        return cache

    def close(self) -> None:
        self.machine.wait()
        for cache in (self.few, *self.caches.values()):
            cache.close()
        self.store.close()

    def draw(self, n: int, hit_rate: float) -> np.ndarray:
        """Row numbers of a batch, in random order: ``hit_rate`` per cent are from the hot set."""
        cold = round(n * (100.0 - hit_rate) / 100.0)
        hot = self.sizes.hot
        numbers = np.concatenate([self.rng.integers(0, hot, n - cold), self.rng.integers(hot, self.rows, cold)])
        self.rng.shuffle(numbers)
        return numbers

    def time(self, cache: Any, n: int, hit_rate: float) -> tuple[float, float]:
        """Median microseconds of new batches, and the hit rate in per cent as counted by the cache."""
        machine, out = self.machine, self.out.data_ptr()
        numbers = [self.draw(n, hit_rate) for _ in range(WARMUPS + self.sizes.repetitions)]
        keys = [torch.from_numpy(keys_of(some)).to(machine.device) for some in numbers]
        addresses = [some.data_ptr() for some in keys]
        self.check(cache, n, hit_rate)
        before = cache.counters()
        times = machine.times(
            lambda turn, stream: cache.lookup(addresses[turn], n, out, stream), self.sizes.repetitions, len(keys)
        )
        after = cache.counters()
        looked_up, missed = after.keys - before.keys, after.misses - before.misses
        return median(times), 100.0 * (1 - missed / looked_up)

    def check(self, cache: Any, n: int, hit_rate: float) -> None:
        """Check every row of one batch twice: the second time, some of the missed rows are in the cache."""
        numbers = torch.from_numpy(self.draw(n, hit_rate))
        keys = torch.from_numpy(keys_of(numbers.numpy())).to(self.machine.device)
        for _ in range(2):
            self.out.fill_(float("nan"))
            cache.lookup(keys.data_ptr(), n, self.out.data_ptr(), self.machine.stream())
            self.machine.wait()
            check(f"{n:,} keys, {hit_rate:g} % hits", self.out[:n], numbers.to(self.machine.device), self.dim)


@dataclass(frozen=True)
class Bus:
    """Bandwidth of the bus: GB/s of a copy and of the plain gather; M rows/s of the gather, of one in order, and of misses."""

    copy: float
    gather: float
    gather_rows: float
    sorted_rows: float
    miss_rows: float

    def microseconds(self, misses: float, dim: int) -> float:
        """Bus time of ``misses`` rows."""
        return misses * 4 * dim / self.gather / 1e3


def measure_bus(run: Run, table: Table) -> Bus:
    """Measure the bus with the largest batch."""
    machine, dim, n = table.machine, table.dim, max(table.sizes.batches)
    rows = torch.from_numpy(table.store.versions.current.rows_view(0, table.rows))  # filled in the order of the numbers
    numbers = [torch.from_numpy(table.rng.integers(0, table.rows, n)).to(machine.device) for _ in range(8)]
    gather, out = PlainGather(machine, dim), table.out[:n]
    out.fill_(float("nan"))
    gather(numbers[0], rows, out, machine.stream())
    machine.wait()
    check("plain gather of host memory", out, numbers[0], dim)
    in_order = [some.sort().values for some in numbers]
    calls: list[Call] = [lambda turn, stream, some=some: gather(some[turn], rows, out, stream) for some in (numbers, in_order)]
    gather_us, sorted_us = (statistics.median(machine.times(call, 7, len(numbers))) for call in calls)
    miss_us, rate = table.time(table.few, n, 0.0)
    copied = host_copy_rate(machine, table.sizes.copy_bytes)
    bus = Bus(copied, n * 4 * dim / gather_us / 1e3, n / gather_us, n / sorted_us, n / miss_us)
    run.say(
        f"bus: pinned copy {bus.copy:.1f} GB/s; plain gather of host rows {bus.gather:.1f} GB/s, {bus.gather_rows:.0f} M rows/s"
        f", in the order of addresses {bus.sorted_rows:.0f}; lookups of a cache of {table.sizes.few} rows "
        f"{bus.miss_rows:.0f} M rows/s ({rate:.1f} % hits)"
    )
    return bus


def measure(run: Run, table: Table) -> dict[str, Any]:
    """Measure both caches with all batch sizes and hit rates."""
    bus = measure_bus(run, table)
    cases: list[dict[str, Any]] = []
    for n in table.sizes.batches:
        hits: dict[str, float] = {}
        for hit_rate in table.sizes.hit_rates:
            case: dict[str, Any] = {"n": n, "target": hit_rate}
            for name, cache in table.caches.items():
                case[name], case[f"{name}: hit rate"] = table.time(cache, n, hit_rate)
                hits.setdefault(name, case[name])  # the first rate is 100 %
                case |= judged(name, case, bus, hits[name], table.dim)
            cases.append(case)
            run.say(
                f"D={table.dim} {n:,} keys, {hit_rate:g} % hits: {compact(case[INSERTED])} us with insertion, "
                f"{compact(case[LOOKUP_ONLY])} without; bus {compact(case[f'{INSERTED}: bus'])} us"
            )
    show(table, cases)
    return {"bus": vars(bus), "rows": table.rows, "cases": cases}


def judged(name: str, case: dict[str, Any], bus: Bus, hits: float, dim: int) -> dict[str, float]:
    """The lower bound of a case, and the ratio to it."""
    misses = case["n"] * (1 - case[f"{name}: hit rate"] / 100)
    time = bus.microseconds(misses, dim)
    return {
        f"{name}: bus": time,
        f"{name}: bus MB": misses * 4 * dim / 1e6,
        f"{name}: ratio": case[name] / max(time, hits),
        f"{name}: own rate": max(misses / bus.miss_rows, hits) / case[name],
    }


def show(table: Table, cases: Sequence[dict[str, Any]]) -> None:
    """A table for each cache, and one of the difference."""
    title = f"D={table.dim}, {table.rows * 4 * table.dim / (1 << 30):.3g} GiB"
    head = ["keys, target hits", "hits", "us", "MB over the bus", "bus us", "ratio to max(bus, hits)", "target (P3)"]
    for name in (INSERTED, LOOKUP_ONLY):
        print_table(f"{title}: {name}", head, [row_of(name, case) for case in cases])
    rows = [[case_name(case), compact(case[INSERTED] - case[LOOKUP_ONLY])] for case in cases]
    print_table(f"{title}: insertion (the difference)", ["keys, target hits", "us"], rows)


def case_name(case: dict[str, Any]) -> str:
    return f"{case['n']:,}, {case['target']:g} %"


def row_of(name: str, case: dict[str, Any]) -> list[str]:
    ratio = case[f"{name}: ratio"]
    return [
        case_name(case),
        f"{case[f'{name}: hit rate']:.1f} %",
        compact(case[name]),
        f"{case[f'{name}: bus MB']:.2f}",
        compact(case[f"{name}: bus"]),
        f"{ratio:.2f}",
        verdict(ratio, at_most=P3) if case["target"] == P3_AT else "",
    ]


def measure_table(run: Run, dim: int, size: int, sizes: Sizes) -> dict[str, Any]:
    """Measure one width and table size."""
    table = Table(run, dim, size, sizes)
    try:
        return measure(run, table)
    finally:
        table.close()


# -- miss paths ---------------------------------------------------------------------------


class TableByPaths(Table):
    """A table with caches that differ in ``miss_path``."""

    def _caches(self) -> dict[str, Any]:
        inserting = {path: self._inserting(miss_path=path) for path in PATHS}
        return inserting | {f"{path}, {LOOKUP_ONLY}": self._fixed(miss_path=path) for path in PATHS}


def measure_paths(run: Run, table: TableByPaths) -> list[dict[str, Any]]:
    """All batch sizes and hit rates with each path."""
    cases: list[dict[str, Any]] = []
    for n in table.sizes.batches:
        for hit_rate in table.sizes.hit_rates:
            case: dict[str, Any] = {"n": n, "target": hit_rate}
            for name, cache in table.caches.items():
                staged = cache.counters().staged
                case[name], case[f"{name}: hit rate"] = table.time(cache, n, hit_rate)
                if (cache.counters().staged > staged) != name.startswith(STAGED):
                    raise AssertionError(f"{name}: {cache.counters().staged - staged} batches were staged")
            cases.append(case)
            times = ", ".join(f"{path} {compact(case[path])} us" for path in PATHS)
            run.say(f"D={table.dim} {n:,} keys, {hit_rate:g} % hits: {times}")
    show_paths(table, cases)
    return cases


def show_paths(table: Table, cases: Sequence[dict[str, Any]]) -> None:
    """Times and missed rows by path, with and without insertion."""
    title = f"D={table.dim}, {table.rows * 4 * table.dim / (1 << 30):.3g} GiB: miss paths"
    head = ["keys, target hits", "hits", *(f"{path} us" for path in PATHS), "direct / auto", "M misses/s of each"]
    for suffix in ("", f", {LOOKUP_ONLY}"):
        rows = []
        for case in cases:
            times = [case[path + suffix] for path in PATHS]
            rate = case[f"{DIRECT + suffix}: hit rate"]
            missed = ", ".join(f"{case['n'] * (1 - rate / 100) / time:.0f}" for time in times)
            rows.append([case_name(case), f"{rate:.1f} %", *map(compact, times), f"{times[0] / times[1]:.2f}", missed])
        print_table(title + (suffix or f", {INSERTED}"), head, rows)


def measure_table_by_paths(run: Run, dim: int, size: int, sizes: Sizes) -> list[dict[str, Any]]:
    """Measure one width and table size."""
    table = TableByPaths(run, dim, size, sizes)
    try:
        return measure_paths(run, table)
    finally:
        table.close()


def at_size(options: argparse.Namespace) -> int:
    """The tables of ``--at-size``, of the widths that were asked for."""
    sizes = AtSize(repetitions=7, of_user=2, batches=(16_384, 131_072, 1_048_576)) if options.quick else AtSize()
    if options.on_cpu:
        sizes = AtSize(((32, 1 << 18), (128, 1 << 19)), (64, 512), 3, 2, 2)
    run = Run("Device lookups at the size that users have (P3): medians, ratios within one run", options)
    for dim, size in sizes.tables:
        if dim in options.dims:
            size = options.gib << 30 if options.gib else size
            run.section(f"D={dim}", lambda dim=dim, size=size: measure_at_size(run, dim, size, sizes))
    return run.end()


def main() -> int:
    parser = parser_of("Lookups with misses, whose rows cross the bus from the host store (P3).", DIMS)
    parser.add_argument("--large", action="store_true", help="also tables of 4 and 16 GiB (needs as much pinned memory)")
    parser.add_argument("--gib", type=int, metavar="N", help="one table of N GiB only")
    parser.add_argument("--paths", action="store_true", help="measure each value of miss_path instead")
    parser.add_argument("--at-size", action="store_true", help="tables of 8 and 16 GiB, a tenth of them cached, skewed keys")
    options = parser.parse_args()
    if options.at_size:
        return at_size(options)
    sizes = TINY if options.on_cpu else QUICK if options.quick else Sizes()
    measured = measure_table_by_paths if options.paths else measure_table
    if options.paths:
        sizes = sizes.for_paths
    if options.large:
        sizes = replace(sizes, table_bytes=(*sizes.table_bytes, 4 << 30, 16 << 30))
    if options.gib:
        sizes = replace(sizes, table_bytes=(options.gib << 30,))
    run = Run("Device lookups with misses (P3): medians, ratios within one run", options)
    for size in sizes.table_bytes:
        for dim in options.dims:
            name = f"D={dim}, {size / (1 << 30):.3g} GiB"
            run.section(name, lambda dim=dim, size=size: measured(run, dim, size, sizes))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
