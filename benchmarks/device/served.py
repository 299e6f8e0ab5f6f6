"""S1 and S2 on a GPU: ``hps-numba serve`` whose rows go from the GPU cache to the network, at 1 to 64 connections.

Two answers to the same requests. *Whole model*: a Torch program whose lookup layer is on the GPU (``torch.export``), so that
keys are copied to the device, looked up in the cache, and rows are copied back. *Tables*: the rows of the same tables from host
memory, which is what a server does with keys that arrive in host memory if nobody asks for a device. The load generator is that
of ``hps-numba benchmark serve``, in closed loops.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Machine
from run import Run, parser_of, print_table

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))  # both folders have modules of the same name
from serving import NARROW, SIZES, WIDE, Size, Summary, loaded, started, summary, write_tables

from hps_numba.frontends import torch as hps

DIMS = (32,)  # the widths of the tables are those of S1
CONNECTIONS = (1, 4, 16, 64)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int = 500_000
    seconds: float = 2.0
    rounds: int = 3


class Rows(torch.nn.Module):
    """Rows of one table."""

    def __init__(self, config: str, table: str, dim: int) -> None:
        super().__init__()
        self.layer = hps.LookupLayer(config, "m", table, dim)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        return self.layer(keys)


def write_program(folder: Path, config: Path, table: str, dim: int, device: torch.device) -> Path:
    """A program that answers keys ``[n]`` with the rows of a table, on the device."""
    batch = ({0: torch.export.Dim("n", max=1 << 20)},)
    args = (torch.zeros(5, dtype=torch.int64, device=device),)
    program = torch.export.export(Rows(str(config), table, dim).eval(), args, dynamic_shapes=batch)
    path = folder / f"{table}.pt2"
    torch.export.save(program, path)
    return path


def config_of(folder: Path, rows: int, machine: Machine) -> Path:
    """The tables of S1, cached whole on the device."""
    path = write_tables(folder, rows)
    config = json.loads(path.read_text())
    config["cache_on_cpu"] = machine.ordinal is None
    config["models"][0] |= {"deployed_device_list": [0], "gpucache": True, "gpucacheper": 1.0}
    path.write_text(json.dumps(config))
    return path


def measured(run: Run, sizes: Sizes) -> list[dict[str, Any]]:
    """All sizes of requests and numbers of connections."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hps_serving_") as temporary:
        folder = Path(temporary)
        config = config_of(folder, sizes.rows, run.machine)
        programs = [
            f"{name}_gpu={write_program(folder, config, name, dim, run.machine.device)}" for name, dim in (NARROW, WIDE)
        ]
        command = [sys.executable, "-m", "hps_numba", "serve", str(config), "--port", "0", "--grpc-port", "0"]
        command += [part for program in programs for part in ("--program", program)]
        with started(command) as (urls, pid):
            for size in SIZES:
                for connections in CONNECTIONS if sizes.rounds > 1 else CONNECTIONS[:2]:
                    rows = at_once(urls, pid, size, connections, sizes)
                    found += [
                        {"size": size.name, "connections": connections, "answer": name, **one} for name, one in rows.items()
                    ]
                run.say(f"{size.name}: done")
                show(size, [one for one in found if one["size"] == size.name])
    return found


def at_once(urls: dict[str, str], pid: int, size: Size, connections: int, sizes: Sizes) -> dict[str, Summary]:
    """Medians of rounds through all ways to answer."""
    ways = {
        "whole model on the GPU, HTTP": (urls["http"], f"{size.table}_gpu", "keys"),
        "whole model on the GPU, gRPC": (urls["grpc"], f"{size.table}_gpu", "keys"),
        "tables in host memory, HTTP": (urls["http"], "m", size.table),
        "tables in host memory, gRPC": (urls["grpc"], "m", size.table),
    }
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for _ in range(sizes.rounds):
        for name, (url, model, table) in ways.items():
            lines[name].append(
                loaded(
                    url,
                    pid,
                    model=model,
                    table=table,
                    keys=size.keys,
                    concurrency=connections,
                    rows=sizes.rows,
                    seconds=sizes.seconds,
                )
            )
    return {name: summary(some) for name, some in lines.items()}


def show(size: Size, found: list[dict[str, Any]]) -> None:
    """Print the table of one size."""
    head = ["answer", "connections", "requests/s", "p50 ms", "p99 ms", "server CPU us"]
    rows = [
        [
            one["answer"],
            f"{one['connections']}",
            f"{one['requests_per_second']:,.0f}",
            f"{one['p50_seconds'] * 1e3:.2f}",
            f"{one['p99_seconds'] * 1e3:.2f}",
            f"{one['server_cpu_seconds_per_request'] * 1e6:,.0f}",
        ]
        for one in sorted(found, key=lambda one: str(one["answer"]))
    ]
    print_table(size.name, head, rows)


def main() -> int:
    parser = parser_of("Serving from the GPU cache (S1, S2).", DIMS)
    options = parser.parse_args()
    sizes = Sizes(rows=5000, seconds=0.2, rounds=1) if options.on_cpu else Sizes(seconds=0.4) if options.quick else Sizes()
    run = Run("Serving from the GPU cache (S1, S2): medians of rounds, closed loops", options)
    run.section("serving", partial(measured, run, sizes))
    return run.end()


if __name__ == "__main__":
    sys.exit(main())
