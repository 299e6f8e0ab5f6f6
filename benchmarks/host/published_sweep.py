"""O13 and O14 on the CPU: HugeCTR's published sweep of batches, with hits of 100, 95 and 80 %, with and without updates.

A table is served from host memory, which holds half of its rows; a *hit* is a key whose row is there, the other rows come from
a ``row_log`` on disk. Beside it stand ``F.embedding`` and, if TensorFlow is installed, ``tf.nn.embedding_lookup``, which hold
all rows in memory and are measured where all keys hit. ``--dlrm`` runs the whole model behind the rows. Updates write rows that
are there already, 100,000 a second, by ``HPS.insert`` of another thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model import ODD
from others import Watch
from report import add_options, finish, print_machine
from sweep_figures import DENSE, Call, Dlrm, Figure, Sweep, plot, quick_of, show, timed, updating

import hps_numba
from hps_numba.frontends import torch as hps
from hps_numba.runtime import threads as hps_threads
from hps_numba.server.registry import SERVERS, server_of

OURS, LAYER, TORCH = "HPS.lookup(out=)", "Torch layer", "F.embedding"
TF_LAYER, TENSORFLOW = "TensorFlow layer", "tf.nn.embedding_lookup"
PAIRS = {OURS: TORCH, LAYER: TORCH, TF_LAYER: TENSORFLOW}
_DLRM_BATCHES = (32, 64, 256, 1024, 2048, 4096)
_CHUNK = 1 << 16


def config_of(folder: Path, sweep: Sweep, rate: float) -> dict[str, Any]:
    """A config whose host memory holds the share ``rate`` of the rows, and a log on disk all of them."""
    entry = {
        "model": "m",
        "sparse_files": [str(folder / "table.model")],
        "embedding_vecsize_per_table": [sweep.dim],
        "maxnum_catfeature_query_per_table_per_sample": [sweep.slots],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [],
        "max_batch_size": max(sweep.batches),
    }
    tiers = {
        "volatile_db": {"type": "hash_map", "initial_cache_rate": rate},
        "persistent_db": {"type": "row_log", "path": str(folder / "log")},
    }
    return {"supportlonglong": True, "models": [entry], **(tiers if rate < 1 else {})}


class Bench:
    """The rows, as a model file and as a tensor."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep
        rng = np.random.default_rng(1)
        self.rows = np.empty((sweep.rows, sweep.dim), np.float32)
        for start in range(0, sweep.rows, _CHUNK):
            rng.random(dtype=np.float32, out=self.rows[start : start + _CHUNK])
        self.keys = np.arange(sweep.rows) * ODD
        hps_numba.write_model(folder / "table.model", sweep.dim, [(self.keys, self.rows)])
        self.weight = torch.from_numpy(self.rows)

    def batches(self, batch: int, hit_rate: float) -> list[np.ndarray]:
        """Row numbers of different batches."""
        rng = np.random.default_rng([batch, int(hit_rate)])
        return [self.sweep.numbers(rng, batch, hit_rate) for _ in range(self.sweep.different)]

    @contextmanager
    def served(self, rate: float) -> Iterator[tuple[hps_numba.HPS, dict[str, Any]]]:
        """A server, and its config."""
        config = config_of(self.folder, self.sweep, rate)
        hps.Init(config)
        try:
            yield server_of(config), config
        finally:
            SERVERS.close()


def candidates(
    bench: Bench, server: hps_numba.HPS, config: dict[str, Any], numbers: list[np.ndarray], *, peers: bool
) -> dict[str, Call]:
    """Calls by name, each checked: all give the same rows."""
    keys = [bench.keys[some] for some in numbers]
    out = np.empty((len(keys[0]), bench.sweep.dim), np.float32)
    layer = hps.LookupLayer(config, "m", 0, bench.sweep.dim)
    tensors = [torch.from_numpy(some) for some in keys]
    calls: dict[str, Call] = {
        OURS: lambda turn: server.lookup(keys[turn % len(keys)], "m", 0, out=out),
        LAYER: lambda turn: layer(tensors[turn % len(tensors)]),
    }
    if peers:
        ids = [torch.from_numpy(some) for some in numbers]
        calls[TORCH] = lambda turn: torch.nn.functional.embedding(ids[turn % len(ids)], bench.weight)
        if importlib.util.find_spec("tensorflow"):
            calls |= tensorflow_calls(bench, config, keys, numbers)
    for name, call in calls.items():
        if not np.array_equal(np.asarray(call(0)).reshape(out.shape), bench.rows[numbers[0]]):
            raise SystemExit(f"{name}: wrong rows")
    return calls


def tensorflow_calls(
    bench: Bench, config: dict[str, Any], keys: list[np.ndarray], numbers: list[np.ndarray]
) -> dict[str, Call]:
    """In graphs, as they are served."""
    import tensorflow as tf

    from hps_numba.frontends import tensorflow as hps_tf

    layer = hps_tf.LookupLayer("m", 0, bench.sweep.dim, ps_config_file=config)
    variable = tf.Variable(bench.rows, trainable=False)
    spec = tf.TensorSpec([len(keys[0])], tf.int64)
    ours = tf.function(layer).get_concrete_function(spec)
    theirs = tf.function(lambda ids: tf.nn.embedding_lookup(variable, ids)).get_concrete_function(spec)
    tensors, ids = ([tf.constant(some) for some in arrays] for arrays in (keys, numbers))
    return {
        TF_LAYER: lambda turn: ours(tensors[turn % len(tensors)]).numpy(),
        TENSORFLOW: lambda turn: theirs(ids[turn % len(ids)]).numpy(),
    }


def with_model(calls: dict[str, Call], sweep: Sweep, batch: int) -> dict[str, Call]:
    """The Torch candidates with the dense part of DLRM behind their rows."""
    dense = Dlrm(sweep.slots, sweep.dim).eval()
    features = torch.rand(batch, DENSE)

    def whole(call: Call) -> Call:
        def run(turn: int) -> torch.Tensor:
            with torch.inference_mode():
                return dense(features, call(turn).view(batch, sweep.slots, sweep.dim))

        return run

    return {name: whole(calls[name]) for name in (LAYER, TORCH) if name in calls}


def hits_of(server: hps_numba.HPS) -> Callable[[], float | None]:
    """A function for the share of hits in per cent since this call."""
    (before,) = server.stats()["m"].values()

    def rate() -> float | None:
        (after,) = server.stats()["m"].values()
        keys = after.keys - before.keys
        return 100.0 * (after.host_hits - before.host_hits) / keys if keys else None

    return rate


def sweep_of(bench: Bench, *, dlrm: bool, updates: bool) -> list[Figure]:
    """All batches and hit rates."""
    sweep, figures = bench.sweep, []
    for hit_rate in sweep.hit_rates:
        with bench.served(1.0 if hit_rate == 100 else sweep.fast / sweep.rows) as (server, config):

            def update(numbers: np.ndarray, server: hps_numba.HPS = server) -> None:
                server.insert(bench.keys[numbers], bench.rows[numbers], "m", 0)

            for batch in sweep.batches:
                calls = candidates(bench, server, config, bench.batches(batch, hit_rate), peers=hit_rate == 100)
                calls = with_model(calls, sweep, batch) if dlrm else calls
                with updating(update, sweep) if updates else nullcontext():
                    rate = hits_of(server)
                    found = timed(calls, sweep.seconds, lambda: None)
                    hits = rate()
                for name, (median, p99) in found.items():
                    figures.append(
                        Figure(
                            name,
                            batch,
                            hit_rate,
                            updates,
                            median,
                            p99,
                            hits if name == OURS or (dlrm and name == LAYER) else None,
                        )
                    )
    return figures


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description="HugeCTR's published sweep on the CPU (O13, O14)."))
    parser.add_argument("--dlrm", action="store_true", help="also the whole DLRM model")
    parser.add_argument("--no-updates", action="store_true", help="leave out the runs beside updates")
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="samples; by default 32 to 131072")
    parser.add_argument("--rows", type=int, default=Sweep.rows, help="of the table, half of which are in host memory")
    parser.add_argument("--seconds", type=float, default=Sweep.seconds, help="for each candidate and batch")
    parser.add_argument("--threads", type=int, metavar="N", help="of a call, ours and Torch's; by default all cores")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw a plot, PNG or SVG (needs matplotlib)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        hps_threads._pool.threads = options.threads
    batches = tuple(options.batches or Sweep.batches)
    sweep = Sweep(rows=options.rows, fast=options.rows // 2, batches=batches, seconds=options.seconds)
    sweep = quick_of(sweep) if options.quick else sweep
    print_machine("The published sweep on the CPU (O13, O14)", quick=options.quick)
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="hps_sweep_") as folder:
        bench = Bench(Path(folder), sweep)
        figures = [
            one
            for updates in (False, True)[: 1 if options.no_updates else 2]
            for one in sweep_of(bench, dlrm=False, updates=updates)
        ]
        verdicts = show(f"Rows of {sweep.slots} slots, D={sweep.dim}", figures, PAIRS)
        model: list[Figure] = []
        if options.dlrm:
            bench.sweep = replace(sweep, batches=tuple(batch for batch in sweep.batches if batch <= max(_DLRM_BATCHES)))
            model = sweep_of(bench, dlrm=True, updates=False)
            show("DLRM", model, {LAYER: TORCH})
    if watch.disturbed:
        print(f"note: other programs kept {watch.cores():.1f} cores busy\n")
    if options.plot:
        plot(options.plot, f"{sweep.rows:,} rows x {sweep.dim}, {sweep.slots} keys a sample, CPU", figures, published=False)
    finish(
        options.json, quick=options.quick, sweep=asdict(sweep), figures=[asdict(one) for one in figures],
        dlrm=[asdict(one) for one in model], verdicts=verdicts, cores_of_others=watch.cores(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
