"""Requests/s of a small DLRM of Torch over our tables, with and without joined requests.

    python benchmarks/host/batching.py [--seconds 3] [--tables 8] [--http]

Clients are threads that ask one request after the other. By default they call the model in this process, so the figures are of
models and batching alone; with ``--http`` they ask ``hps-numba serve`` in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import add_options, child_environment, finish, print_machine, print_table

import hps_numba
from hps_numba.frontends import torch as hps
from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.programs import open_program
from hps_numba.frontends.inference.tensors import InferenceRequest

ROWS, DIM = 100_000, 16
Ask = Callable[[np.ndarray], Any]


class Dlrm(torch.nn.Module):
    """Ids of each table and 13 numbers to a score."""

    def __init__(self, config: str, tables: int) -> None:
        super().__init__()
        self.rows = hps.LookupCollection(config, "dlrm", {f"t{number}": (number, DIM) for number in range(tables)})
        self.bottom = torch.nn.Sequential(torch.nn.Linear(13, 64), torch.nn.ReLU(), torch.nn.Linear(64, DIM), torch.nn.ReLU())
        pairs = (tables + 1) * tables // 2
        self.top = torch.nn.Sequential(torch.nn.Linear(DIM + pairs, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1))
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, 1))

    def forward(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(numbers)
        rows = self.rows({f"t{number}": some for number, some in enumerate(ids.unbind(1))})
        together = torch.stack([bottom, *rows.values()], 1)
        products = torch.bmm(together, together.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([bottom, products], 1)))


def written(folder: Path, tables: int, rows: int) -> tuple[Path, Path]:
    """Config and program."""
    for number in range(tables):
        hps_numba.generate_model(folder / f"t{number}.model", rows, DIM, seed=number)
    model = {
        "model": "dlrm",
        "sparse_files": [str(folder / f"t{number}.model") for number in range(tables)],
        "embedding_vecsize_per_table": [DIM] * tables,
        "maxnum_catfeature_query_per_table_per_sample": [1] * tables,
        "default_value_for_each_table": [0.0] * tables,
        "deployed_device_list": [],
        "max_batch_size": 1024,
    }
    config = folder / "ps.json"
    config.write_text(json.dumps({"supportlonglong": True, "models": [model]}))
    batch = {0: torch.export.Dim("batch", max=1024)}
    args = torch.zeros(5, tables, dtype=torch.int64), torch.zeros(5, 13)
    program = torch.export.export(Dlrm(str(config), tables).eval(), args, dynamic_shapes=(batch, batch))
    torch.export.save(program, folder / "dlrm.pt2")
    return config, folder / "dlrm.pt2"


def rate(client: Callable[[], Ask], clients: int, seconds: float, tables: int, rows: int) -> dict[str, float]:
    """Of so many clients with one sample each."""
    times: list[list[float]] = [[] for _ in range(clients)]
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        ask, random = client(), np.random.default_rng(number)
        ids = random.integers(0, rows, (64, 1, tables))
        while (start := time.perf_counter()) < end or not times[number]:
            ask(ids[len(times[number]) % 64])
            times[number].append(time.perf_counter() - start)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    merged = np.concatenate(times)
    p50, p99 = (float(1e3 * at) for at in np.percentile(merged, [50, 99]))
    return {"requests_per_second": len(merged) / seconds, "p50_ms": p50, "p99_ms": p99}


def in_process(config: Path, program: Path, delay_us: float | None) -> contextlib.AbstractContextManager[Callable[[], Ask]]:
    @contextlib.contextmanager
    def made() -> Iterator[Callable[[], Ask]]:
        with hps_numba.HPS(config) as server:
            model: Any = open_program("dlrm", program, server)
            if delay_us is not None:
                model = BatchedModel(model, max_delay=delay_us / 1e6)
            numbers = np.zeros((1, 13), np.float32)
            yield lambda: lambda ids: model.infer(InferenceRequest("dlrm", {"ids": ids, "numbers": numbers}))
            model.close()

    return made()


def by_http(config: Path, program: Path, delay_us: float | None) -> contextlib.AbstractContextManager[Callable[[], Ask]]:
    @contextlib.contextmanager
    def made() -> Iterator[Callable[[], Ask]]:
        command = [sys.executable, "-m", "hps_numba", "serve", str(config), "--port", "0", "--program", f"dlrm={program}"]
        command += ["--drain-seconds", "0", *([] if delay_us is None else ["--batch-delay-us", str(delay_us)])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        numbers = {"name": "numbers", "datatype": "FP32", "shape": [1, 13], "data": [0.0] * 13}

        def client() -> Ask:
            connection = http.client.HTTPConnection("127.0.0.1", port)

            def ask(ids: np.ndarray) -> None:
                tensor = {"name": "ids", "datatype": "INT64", "shape": list(ids.shape), "data": ids.ravel().tolist()}
                connection.request("POST", "/v2/models/dlrm/infer", json.dumps({"inputs": [tensor, numbers]}))
                answer = connection.getresponse()
                content = answer.read()
                assert answer.status == 200, content

            return ask

        try:
            yield client
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()

    return made()


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--tables", type=int, default=8)
    parser.add_argument("--delays", type=float, nargs="*", default=[0, 500], metavar="US", help="of batching")
    parser.add_argument("--http", action="store_true", help="ask hps-numba serve by HTTP")
    options = parser.parse_args()
    seconds, rows = (0.05, 1000) if options.quick else (options.seconds, ROWS)
    torch.set_num_threads(1)
    print_machine("Requests of one sample to a DLRM, with and without batching", quick=options.quick)
    found = []
    with tempfile.TemporaryDirectory() as name:
        config, program = written(Path(name), options.tables, rows)
        for delay in (None, *options.delays):
            with (by_http if options.http else in_process)(config, program, delay) as client:
                rate(client, 2, seconds / 3, options.tables, rows)
                for clients in (1, 8, 32):
                    figures = rate(client, clients, seconds, options.tables, rows)
                    found.append({"delay_us": delay, "clients": clients, **figures})
    head = ("batching", "clients", "requests/s", "p50 ms", "p99 ms")
    print_table(
        "by HTTP" if options.http else "in this process",
        head,
        [
            (
                "no" if one["delay_us"] is None else f"{one['delay_us']:g} us",
                str(one["clients"]),
                *(f"{one[name]:,.{digits}f}" for name, digits in (("requests_per_second", 0), ("p50_ms", 2), ("p99_ms", 2))),
            )
            for one in found
        ],
    )
    finish(options.json, quick=options.quick, http=options.http, results=found)


if __name__ == "__main__":
    main()
