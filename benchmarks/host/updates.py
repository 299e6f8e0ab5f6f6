"""U-A and U-B on the CPU: from a producer in another process to the rows that lookups return, and what lookups pay for it.

For each bus, a server of one table in host memory is looked up by one thread as fast as it can, first without updates and then
beside a producer of 10,000, 100,000 and 1,000,000 rows a second. Freshness is the time from before a row is published until a
lookup of this process returns it (``update_load``). The producer of ``in_process`` is a thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from model import config_of
from report import add_options, finish, print_machine
from update_figures import BUSES, RATES, Figures, is_missing, measure, opened_bus, show
from update_load import Calls, Spec, key_of, quick_of

import hps_numba


@contextmanager
def served(spec: Spec, source: dict[str, Any]) -> Iterator[hps_numba.HPS]:
    """A server of one table that reads a bus."""
    with tempfile.TemporaryDirectory(prefix="hps_updates_") as folder:
        model = Path(folder) / "table.model"
        hps_numba.write_model(model, spec.dim, [(key_of(np.arange(spec.rows)), np.zeros((spec.rows, spec.dim), np.float32))])
        server = hps_numba.HPS({**config_of(model, spec.dim), "update_source": source})
    with server:
        yield server


def measured(bus: str, spec: Spec, rates: tuple[int, ...], folder: str | None) -> Figures:
    """All rates of one bus."""
    with opened_bus(bus, folder) as (source, producer), served(spec, source) as server:
        out = np.empty((spec.batch, spec.dim), np.float32)
        calls = Calls(lambda keys: server.lookup(keys, "m", 0, out=out), lambda keys: server.lookup(keys, "m", 0))
        return measure(server, calls, producer, spec, rates)


def main() -> None:
    parser = add_options(
        argparse.ArgumentParser(description="Freshness of online updates, and lookups beside them (U-A, U-B).")
    )
    parser.add_argument("--bus", nargs="+", choices=BUSES, default=list(BUSES), help="buses to measure")
    parser.add_argument("--folder", help="where buses keep their files; by default in the folder for temporary files")
    parser.add_argument("--seconds", type=float, default=Spec.seconds, help="of each measurement")
    options = parser.parse_args()
    spec = quick_of(Spec()) if options.quick else Spec(seconds=options.seconds)
    print_machine("Online updates on the CPU (U-A, U-B)", quick=options.quick)
    results: dict[str, Figures] = {}
    for bus in options.bus:
        if why := is_missing(bus):
            print(f"{bus}: skipped: {why}\n")
            continue
        results[bus] = measured(bus, spec, RATES[:2] if options.quick else RATES, options.folder)
        show(f"{bus}: freshness, and lookups of {spec.batch:,} keys by one thread", results[bus])
    finish(options.json, quick=options.quick, buses=results)


if __name__ == "__main__":
    main()
