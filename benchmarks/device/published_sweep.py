"""O13 and O14 on a GPU: HugeCTR's published sweep of batches, with hits of 100, 95 and 80 %, with and without updates.

A table is in pinned host memory, and the GPU cache has room for an eighth of its rows; a *hit* is a key whose row is in the
cache. Batches take their hits from half of that, which stays in the cache as it is asked for again and again, and their misses
from the rest of the table, whose rows are inserted; the cache counts what were hits. Beside it stand ``F.embedding`` with all
rows on the device, and on the CPU with a copy of the rows to the device, as in HugeCTR's comparison. Keys are on the device.
``--dlrm`` runs the whole
model behind the rows; its figures stand beside those that HugeCTR published for another machine.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Machine
from run import Run, parser_of
from table import check, keys_of, rows_of

sys.path.append(str(Path(__file__).parents[1] / "host"))
from sweep_figures import DENSE, Dlrm, Figure, Sweep, plot, quick_of, show, timed, updating

import hps_numba
from hps_numba.frontends import torch as hps
from hps_numba.server.registry import SERVERS, server_of

DIMS = (128,)
OURS, LAYER, DEVICE, HOST = "HPS.lookup(out=)", "Torch layer", "F.embedding", "F.embedding on the CPU, copied"
PAIRS = {OURS: DEVICE, LAYER: DEVICE}
ROOM = 2.0  # of the cache, times the rows that stay in it
FULL = Sweep(rows=8 << 20, fast=1 << 19)


@contextmanager
def served(machine: Machine, sweep: Sweep, *, share: float) -> Iterator[tuple[hps_numba.HPS, dict[str, Any]]]:
    """A server whose cache holds the share of the rows, and its config."""
    with tempfile.TemporaryDirectory(prefix="hps_sweep_") as folder:
        model, numbers = Path(folder) / "table.model", np.arange(sweep.rows)
        parts = np.array_split(numbers, max(1, sweep.rows * sweep.dim >> 26))
        hps_numba.write_model(
            model, sweep.dim, [(keys_of(some), rows_of(torch.from_numpy(some), sweep.dim).numpy()) for some in parts]
        )
        entry = {
            "model": "m",
            "sparse_files": [str(model)],
            "embedding_vecsize_per_table": [sweep.dim],
            "maxnum_catfeature_query_per_table_per_sample": [sweep.slots],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0],
            "max_batch_size": max(sweep.batches),
            "gpucache": True,
            "gpucacheper": share,
            "hit_rate_threshold": 1.0,
        }
        config = {"supportlonglong": True, "cache_on_cpu": machine.ordinal is None, "models": [entry]}
        hps.Init(config)
        try:
            yield server_of(config), config
        finally:
            machine.wait()
            SERVERS.close()


class Batches:
    """Batches of keys on the device. Those with misses are new for each call, as the rows of an old one would be cached."""

    def __init__(self, machine: Machine, sweep: Sweep, batch: int, hit_rate: float) -> None:
        self._machine, self._draw = (
            machine,
            partial(sweep.numbers, np.random.default_rng([batch, int(hit_rate)]), batch, hit_rate),
        )
        self.numbers = [self._draw() for _ in range(sweep.different)]
        self.keys = [torch.from_numpy(keys_of(some)).to(machine.device) for some in self.numbers]
        self.renew = None if hit_rate == 100 else self._renew

    def at(self, turn: int) -> torch.Tensor:
        """The keys of a call."""
        return self.keys[turn % len(self.keys)]

    def _renew(self, turn: int) -> None:
        self.at(turn).copy_(torch.from_numpy(keys_of(self._draw())))


def candidates(
    machine: Machine, server: hps_numba.HPS, config: dict[str, Any], sweep: Sweep, batches: Batches, weight: torch.Tensor | None
) -> dict[str, Callable[[int], Any]]:
    """Calls by name, each checked; the framework's own only with ``weight``, which is on the host."""
    numbers = batches.numbers
    out = torch.empty((len(numbers[0]), sweep.dim), device=machine.device)
    layer = hps.LookupLayer(config, "m", 0, sweep.dim)
    calls: dict[str, Callable[[int], Any]] = {
        OURS: lambda turn: server.lookup(batches.at(turn), "m", 0, out=out),
        LAYER: lambda turn: layer(batches.at(turn)),
    }
    if weight is not None:
        own, count = weight.to(machine.device), len(numbers)
        on_host = [torch.from_numpy(some) for some in numbers]
        ids = [some.to(machine.device) for some in on_host]
        embedding = torch.nn.functional.embedding
        calls[DEVICE] = lambda turn: embedding(ids[turn % count], own)
        calls[HOST] = lambda turn: embedding(on_host[turn % count], weight).to(machine.device)
    expected = torch.from_numpy(numbers[0]).to(machine.device)
    for name, call in calls.items():
        answer = call(0)
        machine.wait()
        check(name, (out if name == OURS else answer).view(-1, sweep.dim), expected, sweep.dim)
    return calls


def with_model(
    machine: Machine, calls: dict[str, Callable[[int], Any]], sweep: Sweep, batch: int
) -> dict[str, Callable[[int], Any]]:
    """The candidates that return rows, with the dense part of DLRM behind them."""
    dense = Dlrm(sweep.slots, sweep.dim).eval().to(machine.device)
    features = torch.rand(batch, DENSE, device=machine.device)

    def whole(call: Callable[[int], Any], turn: int) -> torch.Tensor:
        with torch.inference_mode():
            return dense(features, call(turn).view(batch, sweep.slots, sweep.dim))

    return {name: partial(whole, call) for name, call in calls.items() if name != OURS}


def hits_of(server: hps_numba.HPS) -> Callable[[], float | None]:
    """A function for the share of hits of the cache in per cent since this call."""

    def counts() -> np.ndarray:
        (stats,) = server.stats()["m"].values()
        return np.array([[one.keys, one.misses] for one in stats.caches]).sum(0)

    before = counts()

    def rate() -> float | None:
        keys, misses = counts() - before
        return 100.0 * (1 - misses / keys) if keys else None

    return rate


def measured(run: Run, sweep: Sweep, hit_rate: float, into: list[Figure], *, updates: bool, dlrm: bool) -> list[dict[str, Any]]:
    """All batches of one hit rate; the figures also go to ``into``."""
    machine = run.machine
    weight = rows_of(torch.arange(sweep.rows), sweep.dim) if hit_rate == 100 else None
    with served(machine, sweep, share=ROOM * sweep.fast / sweep.rows) as (server, config):
        server.lookup(torch.from_numpy(keys_of(np.arange(sweep.fast))).to(machine.device), "m", 0)

        def update(numbers: np.ndarray) -> None:
            server.insert(keys_of(numbers), rows_of(torch.from_numpy(numbers), sweep.dim).numpy(), "m", 0)

        for batch in sweep.batches:
            batches = Batches(machine, sweep, batch, hit_rate)
            calls = candidates(machine, server, config, sweep, batches, weight)
            calls = with_model(machine, calls, sweep, batch) if dlrm else calls
            with updating(update, sweep) if updates else nullcontext():
                rate = hits_of(server)
                found = timed(calls, sweep.seconds, machine.wait, batches.renew)
                hits = rate()
            into += [
                Figure(who, batch, hit_rate, updates, *times, hits if who in (OURS, LAYER) else None)
                for who, times in found.items()
            ]
            run.say(
                f"{hit_rate:g} % hits, {batch:,} samples: "
                + ", ".join(f"{who} {times[0]:,.0f} us" for who, times in found.items())
            )
    return [asdict(one) for one in into if (one.hit_rate, one.updates) == (hit_rate, updates)]


def main() -> int:
    parser = parser_of("HugeCTR's published sweep with the GPU cache (O13, O14).", DIMS)
    parser.add_argument("--dlrm", action="store_true", help="also the whole DLRM model")
    parser.add_argument("--no-updates", action="store_true", help="leave out the runs beside updates")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw a plot, PNG or SVG (needs matplotlib)")
    options = parser.parse_args()
    run = Run("The published sweep on a GPU (O13, O14)", options)
    for dim in options.dims:
        sweep = replace(FULL, dim=dim, **({"seconds": 0.3, "rows": 2 << 20, "fast": 1 << 17} if options.quick else {}))
        sweep = replace(quick_of(sweep), fast=125) if options.on_cpu else sweep
        for dlrm in (False, True)[: 2 if options.dlrm else 1]:
            figures: list[Figure] = []
            for updates in (False, True)[: 1 if options.no_updates or dlrm else 2]:
                for hit_rate in sweep.hit_rates:
                    what = f"{'DLRM' if dlrm else 'rows'}, {hit_rate:g} % hits{', updates' if updates else ''}"
                    work = partial(measured, run, sweep, hit_rate, figures, updates=updates, dlrm=dlrm)
                    run.section(f"D={dim}: {what}", work)
            title = f"{'DLRM' if dlrm else 'Rows'} of {sweep.slots} slots, D={dim}"
            run.figures[f"{title}: verdicts"] = show(title, figures, PAIRS)
            if options.plot and figures:
                name = options.plot.with_stem(f"{options.plot.stem}_dlrm" if dlrm else options.plot.stem)
                plot(name, f"{title}, {run.machine.describe()}", figures, published=dlrm)
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
