"""The tier ``redis_cluster`` beside redis-py with hiredis: the same hashes, the same server, in one run.

Both fetch and write batches of 8,192 keys over 16 partitions. redis-py pipelines one HMGET (HSET) a partition and joins the
rows with NumPy, as a careful client would. CPU time is that of the client's process, without the server's.
"""

from __future__ import annotations

import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

# not this folder: its ``redis`` is this file
sys.path[:] = [str(Path(__file__).parents[1]), *(entry for entry in sys.path if entry != str(Path(__file__).parent))]

from report import add_options, finish, print_machine, print_table, verdict  # noqa: E402

PARTITIONS, BATCH = 16, 8192
TABLE = "hps_et.bench.items"
#: client CPU of redis-py over ours at D=32, goal T1
TARGET = 3.0


class Server:
    """A redis-server on a free port of loopback, without persistence."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def wait(self, client: Any) -> None:
        """Until it answers."""
        for _ in range(500):
            try:
                client.ping()
                return
            except Exception:
                time.sleep(0.02)
        raise SystemExit("redis-server does not answer")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class RedisPy:
    """What a client does without the tier."""

    def __init__(self, port: int, partition_of: Callable[[np.ndarray], np.ndarray]) -> None:
        import redis

        self.client = redis.Redis("127.0.0.1", port)
        self.partition_of = partition_of

    def fetch(self, keys: np.ndarray, rows: np.ndarray) -> int:
        found = 0
        for start in range(0, len(keys), BATCH):
            part = slice(start, start + BATCH)
            chosen, pipe = self._by_partition(keys[part]), self.client.pipeline(transaction=False)
            for number, positions in chosen:
                pipe.hmget(self._name(number), [key.tobytes() for key in keys[part][positions]])
            for (_, positions), values in zip(chosen, pipe.execute(), strict=True):
                here = [position for position, value in zip(positions, values, strict=True) if value is not None]
                joined = b"".join(value for value in values if value is not None)
                rows[part][here] = np.frombuffer(joined, np.float32).reshape(len(here), -1)
                found += len(here)
        return found

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        for start in range(0, len(keys), BATCH):
            part = slice(start, start + BATCH)
            pipe = self.client.pipeline(transaction=False)
            for number, positions in self._by_partition(keys[part]):
                pairs = {key.tobytes(): row.tobytes() for key, row in zip(keys[part][positions], rows[part][positions])}
                pipe.hset(self._name(number), mapping=pairs)
            pipe.execute()

    def _by_partition(self, keys: np.ndarray) -> list[tuple[int, np.ndarray]]:
        numbers = self.partition_of(keys)
        return [(number, at) for number in range(PARTITIONS) if len(at := np.flatnonzero(numbers == number))]

    @staticmethod
    def _name(number: int) -> str:
        return f"hps_et{{{TABLE}/p{number}}}v"


def partition_of(keys: np.ndarray) -> np.ndarray:
    """HugeCTR's partitions, by NumPy."""
    from hps_numba.kernels.hashing import partition_hash

    return (partition_hash(keys.astype(np.uint64)) % np.uint64(PARTITIONS)).astype(np.int64)


def measured(call: Callable[[], Any], rows: int, repeats: int) -> tuple[float, float, float]:
    """(best, median) thousand rows a second, and microseconds of this process' CPU a row, the least."""
    rates, costs = [], []
    for _ in range(repeats):
        cpu, began = time.process_time(), time.perf_counter()
        call()
        rates.append(rows / (time.perf_counter() - began) / 1000)
        costs.append((time.process_time() - cpu) * 1e6 / rows)
    return max(rates), statistics.median(rates), min(costs)


def compare(port: int, dim: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """Ours and redis-py in turns, on one table."""
    from hps_numba.storage.tiers.redis_cluster import RedisClusterTier

    random = np.random.default_rng(dim)
    keys = random.permutation(rows).astype(np.int64)
    values = random.random((rows, dim), np.float32)
    out = np.empty_like(values)
    theirs = RedisPy(port, partition_of)
    tier = RedisClusterTier.from_options(address=f"127.0.0.1:{port}", num_partitions=PARTITIONS, max_batch_size=BATCH)
    results = []
    try:
        for name, insert, fetch in (
            ("redis-py + hiredis", theirs.insert, theirs.fetch),
            ("redis_cluster", lambda k, v: tier.insert(TABLE, k, v), lambda k, v: tier.fetch(TABLE, k, v)),
        ):
            insert(keys[:BATCH], values[:BATCH])  # compiles, and connects
            for what, call, given in (("insert", insert, values), ("fetch", fetch, out)):
                best, median, cpu = measured(partial(call, keys, given), rows, repeats)
                results.append({"client": name, "what": what, "dim": dim, "best": best, "median": median, "cpu_us": cpu})
            if not np.array_equal(out, values):
                raise SystemExit(f"{name}: wrong rows")
            out[:] = 0
    finally:
        tier.erase(TABLE)
        tier.close()
    return results


def run(quick: bool) -> list[dict[str, Any]]:
    """Print the table, and return its figures; says so where redis-server is not installed."""
    if shutil.which("redis-server") is None:
        print("redis: not measured, as redis-server is not installed\n")
        return []
    import redis

    rows, repeats = (2 * BATCH, 1) if quick else (200_000, 7)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            server.wait(redis.Redis("127.0.0.1", server.port))
            results = [line for dim in (32, 128) for line in compare(server.port, dim, rows, repeats)]
        finally:
            server.close()
    table = [
        [
            f"{line['client']}, {line['what']}",
            f"{line['dim']}",
            *(f"{line[key]:.0f}" for key in ("best", "median")),
            f"{line['cpu_us']:.2f}",
        ]
        for line in results
    ]
    head = ["client", "D", "best, k rows/s", "median, k rows/s", "client CPU, us a row"]
    print_table(f"Redis: one server, {rows:,} rows, {PARTITIONS} partitions, batches of {BATCH:,}", head, table)
    cpu = {line["client"]: line["cpu_us"] for line in results if line["what"] == "fetch" and line["dim"] == 32}
    ratio = cpu["redis-py + hiredis"] / cpu["redis_cluster"]
    print(f"client CPU of redis-py over ours, fetch, D=32: {ratio:.1f}: {verdict(ratio, at_least=TARGET)}\n")
    return results


def main() -> None:
    """Run this part alone."""
    import argparse

    options = add_options(argparse.ArgumentParser(description=__doc__.partition("\n")[0])).parse_args()
    print_machine("The Redis tier", quick=options.quick)
    finish(options.json, quick=options.quick, redis=run(options.quick))


if __name__ == "__main__":
    main()
