"""Lookups at the sizes that users have: a table of 8 or 16 GiB, a tenth of it cached, skewed keys (``misses.py --at-size``).

Keys are log-uniform, or Zipf with exponent 1.05; a cache of a tenth of the rows begins with the hottest of them, evicts by LRU.
Each batch is new, and its time includes the insertion of what it missed. In the same run: the same cache with its missed rows
read by the device alone (``direct``) or all gathered by threads of the host (``gathered``); what a user would do without a
cache: gather on the CPU with Torch and copy, and reads of host memory by row number from a kernel (UVA); and two limits: the
bytes of the missed rows over a plain copy from pinned memory, and the missed rows over the rates of both ways added.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gather import PlainGather
from measure import WARMUPS
from run import Run, compact, median, print_table, verdict
from table import add_rows, check, keys_of, new_cache, new_store, skewed_numbers

from hps_numba.cache.shares import Shares

__all__ = ["AtSize", "measure_at_size"]

P3 = 1.5  # at most this ratio to the larger of both limits
AUTO, DIRECT, GATHERED = "auto", "direct", "gathered"
SHARES = {AUTO: None, DIRECT: 0.0, GATHERED: 1.0}
KEYS = {"log-uniform": 1.0, "zipf 1.05": 1.05}


@dataclass(frozen=True)
class AtSize:
    """How much is measured."""

    tables: tuple[tuple[int, int], ...] = ((32, 8 << 30), (128, 16 << 30))  # width, bytes
    batches: tuple[int, ...] = (1024, 16_384, 131_072, 1_048_576)
    repetitions: int = 15
    learning: int = 8  # batches from which ``auto`` learns its share
    of_user: int = 3  # repetitions of what a user would do


class HotTable:
    """A table, and a cache of a tenth of its rows."""

    def __init__(self, run: Run, dim: int, size: int, sizes: AtSize) -> None:
        self.machine, self.dim, self.sizes = run.machine, dim, sizes
        self.rows = size // (4 * dim)
        self.rng = np.random.default_rng(dim)
        run.say(f"D={dim}: filling a host store of {self.rows:,} rows")
        self.store = new_store(self.machine, self.rows, dim)
        add_rows(self.machine, self.store, 0, self.rows)
        self.cache = new_cache(self.machine, self.store, self.rows // 10, miss_path="auto")
        run.say(f"D={dim}: filling a cache of {self.rows // 10:,} rows; index mirror: {self.cache.mirror_index()}")
        self.out = torch.empty((max(sizes.batches), dim), device=self.machine.device)
        step = max(sizes.batches)
        for first in reversed(range(0, self.rows // 10, step)):
            keys = self.on_device(keys_of(np.arange(first, min(first + step, self.rows // 10))))
            self.cache.lookup(keys.data_ptr(), len(keys), self.out.data_ptr(), self.machine.stream())
        self.machine.wait()
        self.copied = host_rate(self)

    def on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.machine.device)

    def close(self) -> None:
        self.machine.wait()
        self.cache.close()
        self.store.close()

    def draw(self, exponent: float, n: int, count: int) -> list[np.ndarray]:
        return [skewed_numbers(self.rng, exponent, self.rows, n) for _ in range(count)]

    def time(self, path: str, exponent: float, n: int) -> dict[str, float]:
        """Median microseconds of new batches by a path, the keys that they missed, and rates of rows if they were gathered."""
        machine, out, cache, sizes = self.machine, self.out.data_ptr(), self.cache, self.sizes
        gathered = cache.parts.gathered
        assert gathered is not None
        gathered.shares = Shares(SHARES[path])
        before_them = sizes.learning if path == AUTO else 1
        numbers = self.draw(exponent, n, before_them + WARMUPS + sizes.repetitions)
        keys = [self.on_device(keys_of(some)) for some in numbers]
        for some, its in zip(keys[:before_them], numbers):
            self.out.fill_(float("nan"))
            cache.lookup(some.data_ptr(), n, out, machine.stream())
            machine.wait()
            check(f"{path}, {n:,} keys", self.out[:n], self.on_device(its), self.dim)
        addresses = [some.data_ptr() for some in keys[before_them:]]
        before, batches = cache.counters(), gathered.batches
        times = machine.times(
            lambda turn, stream: cache.lookup(addresses[turn], n, out, stream), sizes.repetitions, len(addresses)
        )
        after = cache.counters()
        missed = (after.misses - before.misses) / (after.calls - before.calls)
        found = {"us": median(times), "missed": missed, "gathered": float(gathered.batches > batches)}
        if gathered.batches > batches:
            found["share"] = gathered.shares.of(n) / 65536
            last = [w.gathering.last for w in cache.parts.workspaces.pool.workspaces if w.gathering is not None]
            found["rows"], found["ns"], found["direct rows"], found["direct ns"] = map(float, last[-1])
        return found


def host_rate(table: HotTable) -> float:
    """GB/s of a copy from pinned memory."""
    size = min(1 << 30, table.rows * 4 * table.dim)
    pinned = table.machine.ordinal is not None
    source = torch.ones(size // 4, pin_memory=pinned)
    target = torch.empty(size // 4, device=table.machine.device)
    times = table.machine.times(lambda turn, stream: target.copy_(source, non_blocking=pinned), 5)
    return size / statistics.median(times) / 1e3


def of_a_user(table: HotTable, exponent: float, n: int) -> dict[str, float]:
    """Microseconds of what a user would do who knows the row numbers, without a cache."""
    machine, repetitions = table.machine, table.sizes.of_user
    rows = torch.from_numpy(table.store.versions.current.rows_view(0, table.rows))
    numbers = [torch.from_numpy(some) for some in table.draw(exponent, n, WARMUPS + repetitions)]
    pinned = torch.empty((n, table.dim), pin_memory=machine.ordinal is not None)
    out = table.out[:n]

    def gather_and_copy(turn: int, stream: int) -> None:
        torch.index_select(rows, 0, numbers[turn], out=pinned)
        out.copy_(pinned, non_blocking=True)

    found = {"CPU gather + copy": median(machine.times(gather_and_copy, repetitions, len(numbers)))}
    if machine.ordinal is not None:
        gather = PlainGather(machine, table.dim)
        there = [some.to(machine.device) for some in numbers]
        found["UVA"] = median(
            machine.times(lambda turn, stream: gather(there[turn], rows, out, stream), repetitions, len(there))
        )
    return found


def measure_at_size(run: Run, dim: int, size: int, sizes: AtSize) -> list[dict[str, Any]]:
    """One table: all kinds of keys and batch sizes."""
    table = HotTable(run, dim, size, sizes)
    try:
        cases = [measure_case(run, table, name, n) for name in KEYS for n in sizes.batches]
    finally:
        table.close()
    title = f"D={dim}, {size / (1 << 30):.3g} GiB, a tenth cached (bus {table.copied:.1f} GB/s)"
    head = ["keys", "hits", "auto us", "direct us", "gathered us", "CPU + copy us", "UVA us", "limit us", "auto / limit"]
    print_table(title, head, [row_of(case) for case in cases])
    return cases


def measure_case(run: Run, table: HotTable, name: str, n: int) -> dict[str, Any]:
    exponent = KEYS[name]
    found: dict[str, Any] = {path: table.time(path, exponent, n) for path in (DIRECT, GATHERED, AUTO)}
    found |= {"keys": name, "n": n} | of_a_user(table, exponent, n)
    missed = found[AUTO]["missed"]
    limits = [missed * 4 * table.dim / table.copied / 1e3]
    if found[GATHERED].get("ns", 0) > 0 and found[AUTO].get("direct ns", 0) > 0:
        both = found[GATHERED]["rows"] / found[GATHERED]["ns"] + found[AUTO]["direct rows"] / found[AUTO]["direct ns"]
        limits.append(missed / both / 1e3)
    found["limits"] = limits
    auto = found[AUTO]
    parts = ", ".join(f"{key} {auto[key]:,.3g}" for key in ("share", "rows", "ns", "direct rows", "direct ns") if key in auto)
    run.say(
        f"D={table.dim} {name}, {n:,} keys, {missed:,.0f} missed: "
        + ", ".join(f"{path} {compact(found[path]['us'])} us" for path in SHARES)
        + f"; limits {', '.join(map(compact, limits))} us; {parts}"
    )
    return found


def row_of(case: dict[str, Any]) -> list[str]:
    auto, limit = case[AUTO], max(case["limits"])
    ratio = auto["us"] / limit if limit else 0.0
    large = case["n"] >= 131_072
    return [
        f"{case['keys']}, {case['n']:,}",
        f"{100 * (1 - auto['missed'] / case['n']):.1f} %",
        *(compact(case[path]["us"]) for path in (AUTO, DIRECT, GATHERED)),
        compact(case["CPU gather + copy"]),
        compact(case["UVA"]) if "UVA" in case else "",
        compact(limit),
        f"{ratio:.2f}{verdict(ratio, at_most=P3) if large else ''}",
    ]
