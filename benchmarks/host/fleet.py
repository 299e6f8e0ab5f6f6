"""A fleet under load while its parts are killed: three replicas on Ray Serve, a Redis cluster of three nodes, and one bus.

Requests come at a fixed rate; a trainer publishes rows all the time; a replica and later a node of Redis are killed, and the
node starts again. Every row says which key and which update it is of, so each answer is checked. The age of what is served is
told apart for keys of that node, whose updates wait until it is back, and for all others.

    pip install "hps-numba[ray,redis,serve]"      # and redis-server
    python benchmarks/host/fleet.py --seconds 60
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fleet_servers import RedisNode, free_port, kill, ray_nodes, redis_cluster, replicas, slots_of
from report import TABLES, add_options, finish, print_machine, print_table

from hps_numba.client import Client
from hps_numba.errors import HpsError
from hps_numba.frontends import ray_serve
from hps_numba.storage.redis.bulk import Batch
from hps_numba.storage.redis.layout import partitions_of
from hps_numba.updates import open_producer

MODEL, TABLE, DIM = "m", "items", 32
_TICK = 0.05  # seconds between two updates
_A_TICK = 500  # rows
_PROBES = 16
_PARTITIONS = 12
_VICTIM = 1  # the node of Redis that is killed
_STALE = 1.0  # seconds after which every replica must serve an update


@dataclass(frozen=True)
class Spec:
    """How much is measured."""

    rows: int = 200_000
    keys: int = 256
    rate: float = 100.0
    seconds: float = 60.0
    clients: int = 8


@dataclass
class Answers:
    """What the clients saw; one thread at a time adds."""

    latencies: list[float] = field(default_factory=list)
    ages: list[float] = field(default_factory=list)
    ages_of_victim: list[float] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)
    wrong: int = 0
    unanswered: int = 0
    turn: threading.Lock = field(default_factory=threading.Lock)


def rows_of(keys: np.ndarray, ticks: np.ndarray | int) -> np.ndarray:
    """What rows must be: key, number of the update, and both together; one update for all keys, or one for each."""
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2:] = keys, ticks, (keys + 3.0 * ticks)[:, None]
    return rows


def save(folder: Path, rows: int) -> None:
    keys = np.arange(rows, dtype=np.int64)
    folder.mkdir()
    keys.tofile(folder / "key")
    rows_of(keys, 0).tofile(folder / "emb_vector")


def config_of(folder: Path, spec: Spec, nodes: list[RedisNode], bus: dict[str, Any]) -> dict[str, Any]:
    """Half of the rows in the memory of each replica, all of them in Redis."""
    model = {
        "model": MODEL,
        "sparse_files": [str(folder)],
        "embedding_table_names": [TABLE],
        "embedding_vecsize_per_table": [DIM],
        "default_value_for_each_table": [-1.0],
        "maxnum_catfeature_query_per_table_per_sample": [spec.keys],
        "deployed_device_list": [],
        "max_batch_size": 16,
    }
    host = {
        "type": "hash_map",
        "cache_missed_embeddings": True,
        "overflow_margin": spec.rows // 2,
        "overflow_policy": "evict_least_used",
    }
    redis = {"type": "redis_cluster", "address": f"127.0.0.1:{nodes[0].port}", "num_partitions": _PARTITIONS}
    return {"supportlonglong": True, "models": [model], "tiers": [host, redis], "update_source": bus}


class Trainer(threading.Thread):
    """Publishes rows, the probes among them, until it is stopped."""

    def __init__(self, spec: Spec, bus: dict[str, Any]) -> None:
        super().__init__()
        self._producer = open_producer(bus)
        self._rng, self._spec = np.random.default_rng(1), spec
        self.published: list[float] = [0.0]  # of each tick: when it was handed to the bus
        self.last = np.zeros(spec.rows, np.int64)
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.wait(_TICK):
            tick = len(self.published)
            keys = np.unique(np.concatenate([np.arange(_PROBES), self._rng.integers(0, self._spec.rows, _A_TICK)]))
            self.published.append(time.monotonic())
            self._producer.update(MODEL, TABLE, keys, rows_of(keys, tick))
            self._producer.flush()
            self.last[keys] = tick

    def stop(self) -> None:
        self._stop_now.set()
        self.join()
        self._producer.close()


def of_victim(keys: np.ndarray) -> np.ndarray:
    """bool ``[n]``: which keys the node that is killed has."""
    from redis.crc import key_slot

    batch = Batch(keys, partitions_of(f"hps_et.{MODEL}.{TABLE}", _PARTITIONS, key_slot), wide=True)
    found = np.zeros(len(keys), bool)
    for share in batch.shares:
        found[batch.positions(share)] = share.partition.slot in slots_of(_VICTIM)
    return found


def check(keys: np.ndarray, rows: np.ndarray, trainer: Trainer, answers: Answers, now: float) -> None:
    """Count rows that are of no update, and tell how old the probes are."""
    ticks = rows[:, 1].astype(np.int64)
    absent = rows[:, 0] == -1
    known = (ticks >= 0) & (ticks < len(trainer.published)) & ~absent
    right = known & (rows == rows_of(keys, ticks)).all(axis=1)
    own = of_victim(keys[:_PROBES])
    with answers.turn:
        answers.unanswered += int(absent.sum())
        answers.wrong += int((~right & ~absent).sum())
        for ages, probes in ((answers.ages, ~own), (answers.ages_of_victim, own)):
            if (some := ticks[:_PROBES][probes & ~absent[:_PROBES]]).size:
                seen = int(some.min()) + 1
                age = now - trainer.published[seen] if seen < len(trainer.published) else 0.0
                ages.append(max(age, 0.0))


def load(url: str, spec: Spec, trainer: Trainer, answers: Answers, start: float, number: int) -> None:
    """One client of an open loop: each request has its time, and its latency counts from that."""
    rng = np.random.default_rng(number)
    probes = np.arange(_PROBES)
    with Client(url, retries=0, timeout=30) as client:
        for step in range(number, int(spec.seconds * spec.rate), spec.clients):
            due = start + step / spec.rate
            time.sleep(max(0.0, due - time.monotonic()))
            keys = np.concatenate([probes, rng.integers(0, spec.rows, spec.keys - _PROBES)])
            asked = time.monotonic()
            try:
                rows = client.lookup(MODEL, {TABLE: keys})[TABLE]
            except (HpsError, OSError) as problem:
                with answers.turn:
                    answers.failed.append((asked - start, f"{type(problem).__name__}: {str(problem)[:80]}"))
                continue
            with answers.turn:
                answers.latencies.append(time.monotonic() - due)
            check(keys, rows, trainer, answers, asked)


def measure(spec: Spec) -> None:
    with tempfile.TemporaryDirectory() as folder, redis_cluster(Path(folder)) as nodes:
        save(Path(folder) / "rows", spec.rows)
        queue = RedisNode(Path(folder) / "bus")
        bus = {"type": "redis_streams", "address": f"127.0.0.1:{queue.port}", "stream": "updates"}
        try:
            with ray_nodes(3, cpus=2):
                _measure(spec, config_of(Path(folder) / "rows", spec, nodes, bus), bus, nodes)
        finally:
            queue.kill()


def _measure(spec: Spec, config: dict[str, Any], bus: dict[str, Any], nodes: list[RedisNode]) -> None:
    port, started = free_port(), time.monotonic()
    ray_serve.run(config, port=port, replicas=3, cpus=0.5)
    print(f"three replicas ready after {time.monotonic() - started:.0f} s: processes {replicas()}")
    url = f"http://127.0.0.1:{port}"
    trainer, answers, start = Trainer(spec, bus), Answers(), time.monotonic() + 1
    trainer.start()
    clients = [
        threading.Thread(target=load, args=(url, spec, trainer, answers, start, number)) for number in range(spec.clients)
    ]
    for client in clients:
        client.start()
    events = [
        (spec.seconds * 0.25, "a replica is killed", lambda: kill(replicas()[0])),
        (spec.seconds * 0.5, "a node of Redis is killed", nodes[_VICTIM].kill),
        (spec.seconds * 0.7, "the node of Redis starts again", nodes[_VICTIM].start),
    ]
    for at, what, act in events:
        time.sleep(max(0.0, start + at - time.monotonic()))
        act()
        print(f"{at:5.1f} s: {what}")
    for client in clients:
        client.join()
    trainer.stop()
    settled = _settle(url, spec, trainer)
    _report(spec, answers, settled)


def _settle(url: str, spec: Spec, trainer: Trainer) -> str:
    """Whether every answer has the last update of every key in the end, whichever replica gives it."""
    keys, end = np.arange(spec.rows), time.monotonic() + 60
    with Client(url, retries=3, timeout=30) as client:
        while True:
            wrong = 0
            for _ in range(6):  # the ingress chooses a replica for each
                for some in np.array_split(keys, max(1, spec.rows // 20_000)):
                    rows = client.lookup(MODEL, {TABLE: some})[TABLE]
                    wrong += int((rows != rows_of(some, trainer.last[some])).any(axis=1).sum())
            if not wrong:
                return "all rows of all replicas"
            if time.monotonic() > end:
                return f"NOT: {wrong} of {6 * spec.rows} answers differ"
            time.sleep(0.5)


def _report(spec: Spec, answers: Answers, settled: str) -> None:
    due = int(spec.seconds * spec.rate)
    latency = np.array(answers.latencies) * 1e3
    ages = [np.percentile(np.array(some) * 1e3, (50, 99, 100)) for some in (answers.ages, answers.ages_of_victim)]
    rows = [
        ("requests due", f"{due:,}"),
        ("answered", f"{len(latency):,}"),
        ("failed", f"{len(answers.failed):,}"),
        ("latency p50 / p99 / max, ms", " / ".join(f"{v:.1f}" for v in np.percentile(latency, (50, 99, 100)))),
        ("age of what is served p50 / p99 / max, ms", " / ".join(f"{v:.0f}" for v in ages[0])),
        ("... keys of the node that is killed", " / ".join(f"{v:.0f}" for v in ages[1])),
        ("rows of no update", f"{answers.wrong:,}"),
        ("rows not found while a tier was down", f"{answers.unanswered:,}"),
        ("the last update of every key is served by", settled),
    ]
    print_table(f"{spec.rate:.0f} requests/s of {spec.keys} keys for {spec.seconds:.0f} s", ["", ""], rows)
    for problem, count in Counter(problem for _, problem in answers.failed).most_common(5):
        times = [at for at, what in answers.failed if what == problem]
        print(f"{count} x {problem} ({min(times):.1f} to {max(times):.1f} s)")


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second")
    options = parser.parse_args()
    spec = Spec(seconds=options.seconds, rate=options.rate)
    if options.quick:
        spec = Spec(rows=5_000, seconds=8.0, rate=20.0)
    print_machine("A fleet of three replicas", quick=options.quick)
    measure(spec)
    finish(options.json, quick=options.quick, tables=TABLES)


if __name__ == "__main__":
    main()
