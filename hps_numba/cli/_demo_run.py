"""The steps of the demo: generate a model, write a config, deploy it, send requests, check every row, report."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba import __version__
from hps_numba.cli._demo_traffic import DEFAULT_VALUE, KEYS_PER_SAMPLE, LARGEST_BATCH, MODEL, Traffic, run_traffic
from hps_numba.cli._hardware import Hardware, resident_bytes
from hps_numba.cli._latency import percentiles, seconds_of
from hps_numba.cli._output import human_rate, human_seconds
from hps_numba.device.host_memory import human_bytes
from hps_numba.errors import ConfigError
from hps_numba.runtime.replacing import file_judge, replace_file
from hps_numba.server.hps import HPS
from hps_numba.simulate.workloads import generate_model

__all__ = ["Demo", "write_config"]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One run.

    Attributes:
        folder: for the model and the config.
        rows, dim: shape of the model.
        threads: number of threads that send requests.
        seconds: duration of the requests.
        seed: of the values of the model and of the requests.
        say: called for each step, with (name, text).
        waiting: a context manager shown while requests are sent.
    """

    folder: Path
    rows: int
    dim: int
    threads: int
    seconds: float
    seed: int
    say: Callable[[str, str], None]
    waiting: Callable[[str], AbstractContextManager[Any]]

    @property
    def model_bytes(self) -> int:
        """Size of the model's files."""
        return self.rows * (8 + 4 * self.dim)

    def run(self, hardware: Hardware) -> tuple[dict[str, Any], Traffic]:
        """Run all steps; the report, ready for JSON, and the traffic.

        Raises:
            HpsError: a step failed.
        """
        model, config = self.folder / "demo.model", self.folder / "demo_ps_config.json"
        self.say("hps-numba", f"{__version__} demo")
        generated = seconds_of(lambda: generate_model(model, self.rows, self.dim, seed=self.seed, overwrite=True))
        self.say("model", f"{self.rows:,} rows x {self.dim} float32 generated in {human_seconds(generated)}: {model}")
        ready = seconds_of(self._prepare_kernels)
        self.say("kernels", f"ready in {human_seconds(ready)}; compiled once, then kept in the user's cache folder")
        write_config(config, model.name, self.dim)
        report, traffic = self._serve(config, hardware)
        times = {"generate_seconds": generated, "kernel_seconds": ready}
        return {**_machine(hardware), "threads": self.threads, **times, **report}, traffic

    def _prepare_kernels(self) -> None:
        """Compile the kernels, or load them from the cache folder, by serving a model of a few rows."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="warm_up_") as name:
            generate_model(Path(name) / "demo.model", 64, self.dim)
            write_config(Path(name) / "ps_config.json", "demo.model", self.dim)
            with HPS(Path(name) / "ps_config.json") as server:
                server.lookup(np.arange(LARGEST_BATCH * KEYS_PER_SAMPLE) % 64, MODEL, 0)

    def _serve(self, config: Path, hardware: Hardware) -> tuple[dict[str, Any], Traffic]:
        before, started = resident_bytes(), time.perf_counter()
        with HPS(config) as server:
            load, after = time.perf_counter() - started, resident_bytes()
            rate = self.model_bytes / load
            size = human_bytes(self.model_bytes)
            self.say("load", f"{size} in {human_seconds(load)}, {human_rate(rate, 'B/s')}: {config}")
            threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
            self.say("serve", f"{self.seconds:g} s with {threads} from {_served_from(hardware)}")
            with self.waiting("serving and checking"):
                traffic = run_traffic(server, self._expected(), threads=self.threads, seconds=self.seconds, seed=self.seed)
            loading = {
                "load_seconds": load,
                "load_bytes_per_second": rate,
                "planned_bytes": server.plan().host_bytes,
                "used_bytes": server.host_bytes,
                "process_grew_bytes": None if before is None or after is None else after - before,
            }
            return {**loading, **_results(server, traffic, self.rows, self.dim)}, traffic

    def _expected(self) -> np.ndarray:
        """The rows that ``generate_model`` documents for a seed, computed without it; then the default row."""
        expected = np.empty((self.rows + 1, self.dim), np.float32)
        values = expected[:-1]
        np.random.default_rng(self.seed).random(out=values, dtype=np.float32)
        values *= np.float32(2)
        values += np.float32(-1)
        expected[-1] = DEFAULT_VALUE
        return expected


def write_config(path: Path, sparse_file: str, dim: int) -> None:
    """Write a ``ps_config`` JSON with keys of HugeCTR HPS only: one model, one table, rows in host memory.

    Raises:
        ConfigError: there is something else than a config that the demo wrote, or it cannot be written.
    """
    entry = {
        "model": MODEL,
        "sparse_files": [sparse_file],
        "embedding_table_names": ["embeddings"],
        "embedding_vecsize_per_table": [dim],
        "maxnum_catfeature_query_per_table_per_sample": [KEYS_PER_SAMPLE],
        "default_value_for_each_table": [DEFAULT_VALUE],
        "deployed_device_list": [],
        "max_batch_size": LARGEST_BATCH,
    }
    config = {"supportlonglong": True, "models": [entry], "volatile_db": {"type": "parallel_hash_map"}}
    content = (json.dumps(config, indent=2) + "\n").encode()
    replace_file(path, content, file_judge("a config of the demo", content.startswith), error=ConfigError)


def _served_from(hardware: Hardware) -> str:
    unused = f" (the demo does not use the {hardware.gpus[0].name})" if hardware.gpus else ""
    return f"host memory, {hardware.cpu}, {hardware.cores} cores{unused}"


def _machine(hardware: Hardware) -> dict[str, Any]:
    gpus = [gpu.name for gpu in hardware.gpus]
    return {"served_from": "host memory", "cpu": hardware.cpu, "cores": hardware.cores, "gpus": gpus}


def _results(server: HPS, traffic: Traffic, rows: int, dim: int) -> dict[str, Any]:
    (stats,) = server.stats()[MODEL].values()
    counters_agree = stats.keys == traffic.keys and stats.defaults == traffic.absent_keys
    return {
        "ok": traffic.wrong_rows == 0 and counters_agree,
        "rows": rows,
        "dim": dim,
        "requests": traffic.requests,
        "keys": traffic.keys,
        "hits": stats.host_hits,
        "defaults": stats.defaults,
        "strangers": traffic.absent_keys,
        "wrong_rows": traffic.wrong_rows,
        "lookup_seconds": traffic.seconds,
        "keys_per_second": traffic.keys / traffic.seconds,
        "bytes_per_second": traffic.keys * dim * 4 / traffic.seconds,
        "latency": [
            {
                "samples": samples,
                "keys": samples * KEYS_PER_SAMPLE,
                "requests": len(seconds),
                **percentiles(seconds),
                "max_seconds": float(seconds.max()),
            }
            for samples, seconds in traffic.latencies.items()
        ],
    }
