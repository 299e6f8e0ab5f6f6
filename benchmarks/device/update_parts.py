"""Which part of online updates lookups on a GPU pay for: the same lookups beside one part at a time.

One thread looks up batches of keys in a table that is all in the GPU cache (as in ``updates.py``), alone and then beside

* ``GIL``: a thread that asks for the GIL 5,000 times a second, in 100 bursts, and does next to nothing with it;
* ``device memory``: a thread that takes 800 bytes of the device and gives them back, 100 times a second;
* ``insert``: a thread that writes 100 rows to host memory and the cache, 100 times a second: updates without a bus;
* ``producer``: a process that publishes 10,000 rows a second to a folder, which nobody reads;
* ``other table``: those rows, read and applied by this process to a table in host memory alone;
* ``all``: those rows, applied to the table that is looked up;
* ``probes``: a thread that looks up 16 keys, some thousand times a second, as ``updates.py`` does to measure freshness.
"""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from measure import Machine
from run import Run, parser_of, print_table
from updates import opened, waited

sys.path.append(str(Path(__file__).parents[1] / "host"))
from update_figures import opened_bus
from update_load import PROBES, Calls, Producer, Spec, calm, key_of, quick_of

from hps_numba.device.memory import allocate

ROWS, EVERY = 100, 0.01  # rows, and seconds between two writes of them: 10,000 a second
BURST = 50  # times that the GIL is asked for in a burst
_PAUSE, _STARTED = 0.0005, 0.5
_DATA = bytes(1 << 13)  # enough for zlib to release the GIL
Part = Callable[[], object]


@contextmanager
def repeated(part: Part, every: float) -> Iterator[None]:
    """A block beside a thread that calls ``part`` every so many seconds."""
    ended = threading.Event()

    def work() -> None:
        due = time.monotonic()
        while not ended.is_set():
            part()
            due = max(due + every, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def ask_for_the_gil() -> None:
    """Release it and take it again, a burst."""
    for _ in range(BURST):
        zlib.crc32(_DATA)


def take_memory(machine: Machine) -> None:
    """Of the device, or of the host."""
    if machine.ordinal is None:
        np.empty(800, np.uint8)
    else:
        allocate(machine.ordinal, 800, "a benchmark").release()


@contextmanager
def published(machine: Machine, spec: Spec, *, read: bool) -> Iterator[None]:
    """A block beside a producer of a folder, and perhaps a server of another table that reads it."""
    with ExitStack() as stack:
        source, section = stack.enter_context(opened_bus("files", None))
        if read:
            stack.enter_context(opened(machine, spec, source, cached=False))
        stack.enter_context(running(section, spec))
        yield


@contextmanager
def running(section: dict[str, Any], spec: Spec) -> Iterator[None]:
    """A block beside a producer of a folder."""
    producer = Producer(section, Spec(dim=spec.dim, rows=spec.rows, rate=int(ROWS / EVERY), seconds=3600), 1)
    try:
        while not list(Path(section["folder"]).glob("delta-*2.hps")):
            time.sleep(EVERY)
        time.sleep(_STARTED)
        yield
    finally:
        producer.close()


def measured(run: Run, spec: Spec) -> dict[str, Any]:
    """Figures of lookups beside each part."""
    machine, figures = run.machine, {}
    rng = np.random.default_rng(2)
    written, rows = key_of(rng.integers(PROBES, spec.rows, ROWS)), rng.random((ROWS, spec.dim), np.float32)
    with opened(machine, spec, None) as server:
        many, probe = (waited(machine, server, n, spec.dim) for n in (spec.batch, PROBES))
        calls = Calls(many, lambda keys: probe(keys).cpu().numpy())
        few = key_of(np.arange(PROBES))
        calm(calls, spec)  # kernels are loaded
        parts: dict[str, Callable[[], Any]] = {
            "none": ExitStack,
            "GIL": partial(repeated, ask_for_the_gil, EVERY),
            "device memory": partial(repeated, partial(take_memory, machine), EVERY),
            "insert": partial(repeated, lambda: server.insert(written, rows, "m", 0), EVERY),
            "producer": partial(published, machine, spec, read=False),
            "other table": partial(published, machine, spec, read=True),
            "probes": partial(repeated, lambda: calls.probe(few), _PAUSE),
            "none, again": ExitStack,
        }
        for name, part in parts.items():
            with part():
                figures[name] = calm(calls, spec)
    with opened_bus("files", None) as (source, section), opened(machine, spec, source) as server:
        many = waited(machine, server, spec.batch, spec.dim)
        calls = Calls(many, many)
        calm(calls, spec)
        with running(section, spec):
            figures["all"] = calm(calls, spec)
    show(spec, figures)
    return figures


def show(spec: Spec, figures: dict[str, Any]) -> None:
    """Print a table."""
    before = figures["none"]["lookups_per_second"]
    cells = [
        (
            name,
            f"{one['lookups_per_second']:,.0f}",
            f"{one['lookups_per_second'] / before:.2f}",
            f"{1e6 * one['p50']:.0f}",
            f"{1e6 * one['p99']:.0f}",
        )
        for name, one in figures.items()
    ]
    print_table(f"Lookups of {spec.batch:,} keys by one thread", ("beside", "lookups/s", "kept", "p50 us", "p99 us"), cells)


def main() -> int:
    parser = parser_of("Which part of online updates lookups pay for.", (32,))
    parser.add_argument("--batch", type=int, default=8192, metavar="N", help="keys of a lookup")
    options = parser.parse_args()
    run = Run("Parts of online updates, beside lookups", options)
    for dim in options.dims:
        spec = Spec(dim=dim, batch=options.batch, seconds=3.0 if options.quick else 10.0)
        run.section(f"D={dim}", partial(measured, run, quick_of(spec) if options.on_cpu else spec))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
