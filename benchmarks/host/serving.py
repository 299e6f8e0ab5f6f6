"""S1: ``hps-numba serve`` on one core, compared with FastAPI and with the Python backend of a real Triton.

All of them serve the same tables from host memory, at the same time, on the first core; the load generator of ``hps-numba
benchmark serve`` runs on the second. Rounds go through all servers in turn, and the medians of the rounds are compared. Loops
are closed: a connection sends when its last request was answered, so that requests a second show what a server can do. CPU
time is that of the server and its child processes, from /proc; "of a whole core" is what it would answer if nothing else ran
there, which is the figure to look at where other programs are busy.

FastAPI (``pip install fastapi uvicorn``), grpcio, and Triton (see ``tests/support/triton.py``) are left out where they are
missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from others import Watch
from report import ROOT, add_options, child_environment, finish, print_machine, print_table, verdict

import hps_numba
from hps_numba.cli._profile_keys import Distribution
from hps_numba.cli._serve_load.benchmark import Benchmark
from hps_numba.cli._serve_load.connection import Access
from hps_numba.cli._serve_load.load import Case, Settings

ROWS, QUICK_ROWS = 500_000, 5_000
NARROW, WIDE = ("narrow", 32), ("wide", 128)
OURS, OURS_GRPC, FASTAPI, TRITON, TRITON_GRPC = "ours, HTTP", "ours, gRPC", "FastAPI", "Triton, HTTP", "Triton, gRPC"
#: S1: at least so many times the requests a second of the others, and a p99 below so many seconds
OVER_TRITON, OVER_FASTAPI, P99, LARGE_OVER_TRITON = 1.2, 2.0, 0.002, 0.9


Summary = dict[str, float]


@dataclass(frozen=True)
class Size:
    """Requests of ``keys`` keys of a table."""

    name: str
    table: str
    keys: int

    @property
    def is_small(self) -> bool:
        return self.keys <= 32


SIZES = (
    Size("32 keys, 4 KB", "narrow", 32),
    Size("8,192 keys, 1 MB", "narrow", 8192),
    Size("2,048 keys, 1 MB", "wide", 2048),
)


@dataclass(frozen=True)
class Served:
    """A server that answers at ``url``; ``pid`` is its process."""

    name: str
    url: str
    pid: int


def write_tables(folder: Path, rows: int) -> Path:
    """Two tables with keys 0 .. rows - 1; the path of the config."""
    rng = np.random.default_rng(1)
    for name, dim in (NARROW, WIDE):
        values = rng.random((rows, dim), np.float32)
        hps_numba.write_model(folder / f"{name}.model", dim, [(np.arange(rows), values)])
    entry = {
        "model": "m",
        "sparse_files": [str(folder / f"{name}.model") for name, _ in (NARROW, WIDE)],
        "embedding_table_names": [name for name, _ in (NARROW, WIDE)],
        "embedding_vecsize_per_table": [dim for _, dim in (NARROW, WIDE)],
        "maxnum_catfeature_query_per_table_per_sample": [1, 1],
        "default_value_for_each_table": [0.0, 0.0],
        "deployed_device_list": [],
        "max_batch_size": 8192,
    }
    path = folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": [entry]}))
    return path


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Processes that are started in the block run on one core."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[dict[str, str], int]]:
    """A process that prints ``ready: URL ...``: URL by scheme, and its number."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=child_environment())
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if not line.startswith("ready: "):
                log.seek(0)
                raise SystemExit(f"{command[-2:]}: expected a server, got {line!r} {log.read()[-2000:]}")
            urls = line.removeprefix("ready: ").split()
            yield {url.partition(":")[0]: url for url in urls}, process.pid
        finally:
            process.terminate()
            process.wait()


@contextmanager
def triton(config: Path, folder: Path) -> Iterator[list[Served]]:
    """A real Triton with our model for its Python backend; nothing where it cannot run, with the reason."""
    sys.path.append(str(ROOT / "tests"))
    try:
        from _pytest.outcomes import Failed, Skipped
        from support.triton import TritonServer
    except ImportError as problem:
        print(f"Triton: left out: {problem}\n")
        yield []
        return
    command = [sys.executable, "-m", "hps_numba", "triton-repository", str(config), str(folder / "models")]
    subprocess.run(command, check=True, env=child_environment(), stdout=subprocess.DEVNULL)
    (folder / "triton").mkdir()
    try:
        server = TritonServer(folder / "models", folder / "triton", "--load-model=*")
    except (Skipped, Failed) as problem:
        print(f"Triton: left out: {problem}\n")
        yield []
        return
    try:
        assert server.process is not None
        pid = server.process.pid
        yield [Served(TRITON, f"http://{server.http}", pid), Served(TRITON_GRPC, f"grpc://{server.grpc}", pid)]
    finally:
        server.stop()


@contextmanager
def servers(config: Path, folder: Path, core: int | None, *, with_triton: bool) -> Iterator[list[Served]]:
    """All servers that can run here."""
    with ExitStack() as stack:
        found = []
        with on_core(core):
            serve = [sys.executable, "-m", "hps_numba", "serve", str(config), "--port", "0"]
            serve += ["--grpc-port", "0"] if importlib.util.find_spec("grpc") else []
            urls, pid = stack.enter_context(started(serve))
            found.append(Served(OURS, urls["http"], pid))
            if "grpc" in urls:
                found.append(Served(OURS_GRPC, urls["grpc"], pid))
            if importlib.util.find_spec("fastapi"):
                script = Path(__file__).with_name("fastapi_server.py")
                urls, pid = stack.enter_context(started([sys.executable, str(script), str(config)]))
                found.append(Served(FASTAPI, urls["http"], pid))
            else:
                print("FastAPI: left out: it is not installed\n")
            if with_triton:
                found += stack.enter_context(triton(config, folder))
        yield [one for one in found if one.url.startswith("http") or importlib.util.find_spec("grpc")]


def loaded(
    url: str, pid: int, *, model: str, table: str, keys: int, concurrency: int, rows: int, seconds: float
) -> dict[str, Any]:
    """One closed loop of requests for ``keys`` of ``rows`` keys of a table."""
    settings = Settings(seconds=seconds, warmup=seconds / 5, pid=pid, distinct=200, timeout=60.0)
    benchmark = Benchmark(
        url=url,
        access=Access(timeout=60.0),
        cases=[Case(concurrency=concurrency)],
        settings=settings,
        distribution=Distribution("uniform"),
        model=model,
        protocol="named",
        tables=[table],
        keys=[keys],
        table_size=rows,
    )
    (line,) = benchmark.run(lambda text: None)["results"]
    if line["errors"] or not line["answered"]:
        raise SystemExit(f"{url}, {model}: {keys:,} keys: {line['errors'] or 'no answers'}")
    return line


def measured(one: Served, size: Size, concurrency: int, rows: int, seconds: float) -> dict[str, Any]:
    """One closed loop with a server."""
    return loaded(
        one.url, one.pid, model="m", table=size.table, keys=size.keys, concurrency=concurrency, rows=rows, seconds=seconds
    )


def summary(lines: Sequence[dict[str, Any]]) -> Summary:
    """Medians of rounds."""
    names = (
        "requests_per_second",
        "p50_seconds",
        "p99_seconds",
        "server_cpu_seconds_per_request",
        "client_cpu_seconds_per_request",
    )
    return {name: statistics.median(line[name] or 0.0 for line in lines) for name in names}


def show(size: Size, concurrency: int, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Print the table of one size, and judge S1; returns the verdicts."""
    ours = found[OURS]["requests_per_second"]
    rows, verdicts = [], []
    for name, one in found.items():
        goal = None
        if name == FASTAPI and size.is_small:
            goal = OVER_FASTAPI
        elif name in (TRITON, TRITON_GRPC):
            goal = OVER_TRITON if size.is_small else LARGE_OVER_TRITON
        ratio = ours / one["requests_per_second"] if one["requests_per_second"] else math.inf
        judged = "" if goal is None else verdict(ratio, at_least=goal)
        if name == OURS and size.is_small and concurrency == 1:
            judged = "p99 " + verdict(one["p99_seconds"], at_most=P99)
        if judged:
            verdicts.append({"size": size.name, "concurrency": concurrency, "beside": name, "ratio": ratio, "target": judged})
        times = [f"{one[f'{part}_seconds'] * 1e3:.2f}" for part in ("p50", "p99")]
        cpu = [f"{one[f'{who}_cpu_seconds_per_request'] * 1e6:,.0f}" for who in ("server", "client")]
        spent = one["server_cpu_seconds_per_request"]
        core = f"{1 / spent:,.0f}" if spent else "-"
        rows.append([name, f"{one['requests_per_second']:,.0f}", core, *times, *cpu, f"{ratio:.2f}", judged])
    head = ["server", "requests/s", "of a whole core", "p50 ms", "p99 ms", "server us", "client us", "ours, HTTP / it", "S1"]
    print_table(f"{size.name}, {concurrency} connections", head, rows)
    return verdicts


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description="Serving on one core, compared with FastAPI and Triton (S1)."))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16], metavar="N", help="connections")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="through all servers")
    parser.add_argument("--no-triton", action="store_true", help="leave Triton out")
    options = parser.parse_args()
    rows, seconds, rounds = (QUICK_ROWS, 0.3, 1) if options.quick else (ROWS, options.seconds, options.rounds)
    cores = sorted(os.sched_getaffinity(0))
    server_core, client_core = cores[:2] if len(cores) > 1 else (None, None)
    print_machine("Serving on one core (S1): medians of rounds", quick=options.quick)
    watch, verdicts, results = Watch(), [], []
    with tempfile.TemporaryDirectory(prefix="hps_serving_") as temporary:
        folder = Path(temporary)
        config = write_tables(folder, rows)
        with servers(config, folder, server_core, with_triton=not options.no_triton) as found, on_core(client_core):
            for size in SIZES:
                for concurrency in options.concurrency:
                    lines: dict[str, list[dict[str, Any]]] = {one.name: [] for one in found}
                    for _ in range(rounds):
                        for one in found:
                            lines[one.name].append(measured(one, size, concurrency, rows, seconds))
                    figures = {name: summary(some) for name, some in lines.items()}
                    verdicts += show(size, concurrency, figures)
                    results.append({"size": size.name, "concurrency": concurrency, "servers": figures})
    if watch.disturbed:
        print(f"note: programs other than this one and what it starts kept {watch.cores():.1f} cores busy\n")
    finish(options.json, quick=options.quick, results=results, verdicts=verdicts)


if __name__ == "__main__":
    main()
