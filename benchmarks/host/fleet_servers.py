"""What the benchmark of a fleet runs on: a Redis cluster of three nodes, a Redis for the bus, a Ray cluster of three nodes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["RedisNode", "free_port", "kill", "ray_nodes", "redis_cluster", "replicas", "slots_of"]

_SLOTS = 16_384
_PATIENCE = 60.0  # seconds until a server answers
_RAY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_USAGE_STATS_ENABLED": "0"}
_STORE = 80 << 20  # bytes of Ray's object store, which is not used


def free_port() -> int:
    """A port of loopback that nobody listens on, low enough for the bus of a cluster."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port + 10_000 < 65_536:
            return port


class RedisNode:
    """A redis-server that keeps what it acknowledged, and starts again after it was killed."""

    def __init__(self, folder: Path, *options: str) -> None:
        folder.mkdir(parents=True)
        self.port, self._folder, self._options = free_port(), folder, options
        self.start()

    def start(self) -> None:
        import redis

        server = shutil.which("redis-server") or "redis-server"
        keep = ("--save", "", "--appendonly", "yes", "--dir", str(self._folder))
        self._process = subprocess.Popen(
            [server, "--port", str(self.port), "--bind", "127.0.0.1", *keep, *self._options], stdout=subprocess.DEVNULL
        )
        self.client = redis.Redis("127.0.0.1", self.port)
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                self.client.ping()
                return
            except redis.RedisError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def slots_of(number: int) -> range:
    """Slots of a node of a cluster of three."""
    return range(number * _SLOTS // 3, (number + 1) * _SLOTS // 3)


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisNode]]:
    """Three nodes with a third of the slots each, and no replicas."""
    options = ("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no", "--cluster-node-timeout", "5000")
    nodes = [RedisNode(folder / f"redis{number}", *options) for number in range(3)]
    try:
        for number, node in enumerate(nodes):
            slots = slots_of(number)
            node.client.execute_command("CLUSTER", "ADDSLOTSRANGE", slots[0], slots[-1])
            node.client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
        end = time.monotonic() + _PATIENCE
        while not all(node.client.execute_command("CLUSTER INFO")["cluster_known_nodes"] == "3" for node in nodes) or not all(
            node.client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for node in nodes
        ):
            if time.monotonic() > end:
                raise TimeoutError("the Redis cluster did not form")
            time.sleep(0.1)
        yield nodes
    finally:
        for node in nodes:
            node.kill()


@contextmanager
def ray_nodes(count: int, cpus: float) -> Iterator[Any]:
    """A Ray cluster of so many nodes on this host, which this process is connected to."""
    for variable, value in _RAY.items():
        os.environ.setdefault(variable, value)
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    size = {"num_cpus": cpus, "object_store_memory": _STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(**size)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


def replicas() -> list[int]:
    """Process ids of the replicas of Ray Serve on this host."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::ServeReplica:"):
                found.append(int(folder.name))
    return sorted(found)


def kill(process: int) -> None:
    """End a process at once."""
    os.kill(process, signal.SIGKILL)
