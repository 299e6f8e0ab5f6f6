"""U-A and U-B on a GPU: rows that another process publishes, served from the GPU cache, and what lookups pay for it.

A server of one table, all of whose rows are in the GPU cache, reads a folder, or Redis if a redis-server is installed. One
thread looks up batches of keys on the device as fast as it can, first without updates and then beside a producer in another
process of 10,000, 100,000 and 1,000,000 rows a second. Freshness is the time from before a row is published until it was
copied from the answer of a lookup, by a second thread, in a measurement of its own (``host/update_load``). ``update_parts.py``
tells which part of it lookups pay for.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Machine
from run import Run, parser_of

sys.path.append(str(Path(__file__).parents[1] / "host"))
from update_figures import BUSES, RATES, Figures, is_missing, measure, opened_bus, show
from update_load import PROBES, Calls, Spec, key_of, quick_of

import hps_numba

DIMS = (32,)


def opened(machine: Machine, spec: Spec, source: dict[str, Any] | None, *, cached: bool = True) -> hps_numba.HPS:
    """A server of one table, whose cache, if it is ``cached``, holds every row."""
    with tempfile.TemporaryDirectory(prefix="hps_updates_") as folder:
        model = Path(folder) / "table.model"
        hps_numba.write_model(model, spec.dim, [(key_of(np.arange(spec.rows)), np.zeros((spec.rows, spec.dim), np.float32))])
        entry = {
            "model": "m",
            "sparse_files": [str(model)],
            "embedding_vecsize_per_table": [spec.dim],
            "maxnum_catfeature_query_per_table_per_sample": [1],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [0],
            "max_batch_size": spec.batch,
            "gpucache": cached,
            "gpucacheper": 1.0,
        }
        config = {"supportlonglong": True, "cache_on_cpu": machine.ordinal is None, "models": [entry]}
        return hps_numba.HPS(config if source is None else {**config, "update_source": source})


def waited(machine: Machine, server: hps_numba.HPS, rows: int, dim: int) -> Callable[[np.ndarray], torch.Tensor]:
    """Lookups of keys that are copied to the device, on a stream of their own; each returns when its rows are there."""
    out = torch.empty((rows, dim), device=machine.device)
    if machine.ordinal is None:
        return lambda keys: server.lookup(torch.from_numpy(keys), "m", 0, out=out)
    stream = torch.cuda.Stream(machine.device)

    def call(keys: np.ndarray) -> torch.Tensor:
        with torch.cuda.stream(stream):
            server.lookup(torch.from_numpy(keys).to(machine.device), "m", 0, out=out)
        stream.synchronize()
        return out

    return call


def measured(run: Run, bus: str, spec: Spec, rates: tuple[int, ...], folder: str | None, more: dict[str, Any]) -> Figures:
    """All rates of one bus; ``more``: keys of its source."""
    with opened_bus(bus, folder) as (source, producer), opened(run.machine, spec, {**source, **more}) as server:
        many, probe = (waited(run.machine, server, rows, spec.dim) for rows in (spec.batch, PROBES))
        figures = measure(server, Calls(many, lambda keys: probe(keys).cpu().numpy()), producer, spec, rates)
        (cache,) = next(iter(server.stats()["m"].values())).caches
        run.say(f"{bus}: the cache has evicted {cache.evictions:,} rows; 0: each lookup was one kernel to the end")
    show(f"{bus}, D={spec.dim}: freshness from the cache, and lookups of {spec.batch:,} keys by one thread", figures)
    return figures


def main() -> int:
    parser = parser_of("Freshness of rows in the GPU cache, and lookups beside updates (U-A, U-B).", DIMS)
    parser.add_argument("--bus", nargs="+", choices=BUSES, default=["files", "redis_streams"], help="buses to measure")
    parser.add_argument(
        "--folder", help="where buses keep their files, such as /dev/shm; by default in that for temporary files"
    )
    parser.add_argument("--batch", type=int, default=8192, metavar="N", help="keys of a lookup")
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES), metavar="N", help="rows a second")
    parser.add_argument("--interval-ms", type=int, metavar="N", help="batch_interval_ms of the source, if not its default")
    options = parser.parse_args()
    run = Run("Online updates on a GPU (U-A, U-B)", options)
    for dim in options.dims:
        spec = Spec(dim=dim, batch=options.batch, seconds=4.0 if options.quick else 10.0)
        spec = quick_of(spec) if options.on_cpu else spec
        for bus in options.bus:
            if why := is_missing(bus):
                run.say(f"{bus}: skipped: {why}")
                continue
            rates = tuple(options.rates[:2] if options.on_cpu else options.rates)
            more = {} if options.interval_ms is None else {"batch_interval_ms": options.interval_ms}
            run.section(f"D={dim}: {bus}", partial(measured, run, bus, spec, rates, options.folder, more))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
