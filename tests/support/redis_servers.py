"""Redis servers on loopback: one, or a cluster, with TLS and ACL if wanted; they end with the test, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.servers import free_port, program
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.storage.redis.limits import Limits

__all__ = ["PATIENT", "Cluster", "Server", "authority", "cluster_of", "one_server", "signed"]

SLOTS = 16384
#: milliseconds after which a node of a cluster takes another one for dead: long enough that a busy machine fails over no node
NODE_TIMEOUT = 60_000
#: of tiers under test: a node that a busy machine does not let run is not dead
PATIENT = Limits(connect=HANG_SECONDS, reply=HANG_SECONDS, queue=HANG_SECONDS, probe=HANG_SECONDS)


class ServerEnded(Exception):
    """A server ended by itself; what it logged."""


class Server:
    """A redis-server, or a valkey-server, as the variable HPS_NUMBA_REDIS_SERVER says.

    Attributes:
        port: of loopback.   bus: port of the bus of a cluster.   client: redis-py's, with the rights of an administrator.
    """

    def __init__(self, folder: Path, *options: str, tls: dict[str, Any] | None = None, **login: str) -> None:
        self.folder, self.options, self.tls, self.login = folder, options, tls, login
        folder.mkdir(parents=True, exist_ok=True)
        self.command = program(os.environ.get("HPS_NUMBA_REDIS_SERVER", "redis-server"), "redis-server")
        self.process: subprocess.Popen[bytes] | None = None
        self.client: Any = None
        for attempt in range(10):  # a port that was free may be taken meanwhile
            self.port, self.bus = free_port(), free_port()
            try:
                self.start()
                return
            except ServerEnded:
                if attempt == 9:
                    raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers; again on the same port after it was ended."""
        redis = pytest.importorskip("redis")
        port = ("--port", "0", "--tls-port", str(self.port)) if self.tls else ("--port", str(self.port))
        every = ("--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder), "--logfile", "log", "--daemonize", "no")
        bus = ("--cluster-port", str(self.bus)) if "--cluster-enabled" in self.options else ()
        self.process = subprocess.Popen([self.command, *port, *every, *bus, *self.options])
        secure = {"ssl": True, **self.tls} if self.tls else {}
        limit = {"socket_timeout": HANG_SECONDS, "socket_connect_timeout": HANG_SECONDS}
        self.client = redis.Redis("127.0.0.1", self.port, **secure, **self.login, **limit)
        wait_until(self.answers)

    def answers(self) -> bool:
        """Whether it answers, and not another one on its port, and has read what it kept on disk."""
        assert self.process is not None
        if self.process.poll() is not None:
            raise ServerEnded((self.folder / "log").read_text())
        try:
            info = self.client.info()
            return bool(info["process_id"] == self.process.pid and not info["loading"])
        except Exception:
            return False

    def kill(self, how: int = signal.SIGKILL) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(HANG_SECONDS)
            self.process = None
            self.client.close()

    def stop(self) -> None:
        """Stop it where it is: it keeps its connections and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let a stopped one go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Cluster:
    """A cluster: primaries share the slots evenly; replica ``i`` is ``servers[primaries + i]``.

    Attributes:
        servers: its nodes, primaries first.
    """

    def __init__(self, servers: Sequence[Server], primaries: int) -> None:
        self.servers, self.primaries = list(servers), primaries
        first = servers[0]
        for other in servers[1:]:
            first.client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port, other.bus)
        for i, server in enumerate(servers[:primaries]):
            bounds = SLOTS * i // primaries, SLOTS * (i + 1) // primaries - 1
            server.client.execute_command("CLUSTER", "ADDSLOTSRANGE", *bounds)
        wait_until(self.knows_all)
        for i, server in enumerate(servers[primaries:]):
            server.client.execute_command("CLUSTER", "REPLICATE", self.id_of(servers[i]))
        wait_until(self.settled)

    @staticmethod
    def id_of(server: Server) -> str:
        """Its name in the cluster."""
        return str(server.client.execute_command("CLUSTER", "MYID").decode())

    def knows_all(self) -> bool:
        """Whether every node knows every other one by its name: those that they shake hands with have none yet."""
        names = sorted(map(self.id_of, self.servers))
        return all(names_known_by(server) == names for server in self.servers)

    def settled(self) -> bool:
        """Whether every node sees all slots served, and every replica is connected."""
        for info in map(info_of, self.servers):
            if (info["cluster_state"], info["cluster_slots_ok"]) != ("ok", str(SLOTS)):
                return False
        links = [server.client.info("replication").get("master_link_status") for server in self.servers[self.primaries :]]
        return all(link == "up" for link in links)

    def owner_of(self, slot: int) -> Server:
        """The primary that had a slot in the beginning."""
        return self.servers[next(i for i in range(self.primaries) if slot < SLOTS * (i + 1) // self.primaries)]

    @property
    def address(self) -> str:
        return ",".join(server.address for server in self.servers[: self.primaries])

    def take_for_dead_after(self, milliseconds: int) -> None:
        """When nodes that run take another one for dead."""
        for server in self.servers:
            if server.process is not None:
                server.client.config_set("cluster-node-timeout", milliseconds)

    def flush(self) -> None:
        """Remove all keys."""
        for server in self.servers[: self.primaries]:
            server.client.flushall()


def names_known_by(server: Server) -> list[str]:
    """Names of the nodes to which a node has a connection, and its own."""
    text = server.client.execute_command("CLUSTER", "NODES")
    lines = [line.split() for line in text.decode().splitlines()]
    return sorted(line[0] for line in lines if line[7] == "connected" and "handshake" not in line[2])


def info_of(server: Server) -> dict[str, str]:
    text = server.client.execute_command("CLUSTER", "INFO")
    given = text if isinstance(text, dict) else dict(line.split(":") for line in text.decode().split())
    return {str(key): str(value) for key, value in given.items()}


@contextlib.contextmanager
def one_server(folder: Path, *options: str, tls: dict[str, Any] | None = None, **login: str) -> Iterator[Server]:
    """A plain server."""
    server = Server(folder, *options, tls=tls, **login)
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def cluster_of(
    folder: Path,
    primaries: int = 3,
    replicas: int = 0,
    *,
    coverage: str = "no",
    options: Sequence[str] = (),
    tls: dict[str, Any] | None = None,
) -> Iterator[Cluster]:
    """A cluster of ``primaries`` nodes and replicas of the first ``replicas`` of them.

    Args:
        tls: what an administrator connects with, where the options make nodes talk to clients and to each other by TLS only.
    """
    servers: list[Server] = []
    try:
        for i in range(primaries + replicas):
            more = ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]
            more += ["--cluster-require-full-coverage", coverage, "--cluster-node-timeout", str(NODE_TIMEOUT)]
            more += ["--repl-diskless-sync-delay", "0", *options]  # no other replica comes
            servers.append(Server(folder / f"node{i}", *more, tls=tls))
        yield Cluster(servers, primaries)
    finally:
        for server in servers:
            server.kill()


# -- certificates ---------------------------------------------------------------------


def authority(folder: Path) -> Path:
    """A certificate authority made on the spot: the file of its certificate, in a folder of its own that OpenSSL can search."""
    home = folder / "authority"
    home.mkdir()
    key, certificate = folder / "authority.key", home / "authority.crt"
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", certificate, "-subj", "/CN=test"
    )
    hashed = openssl("x509", "-hash", "-noout", "-in", certificate).strip()
    (home / f"{hashed}.0").symlink_to(certificate.name)
    return certificate


def signed(folder: Path, name: str, authority: Path) -> tuple[Path, Path]:
    """A certificate for a name, and its key, signed by an authority."""
    key, request, certificate = folder / f"{name}.key", folder / f"{name}.csr", folder / f"{name}.crt"
    extension = folder / f"{name}.ext"
    extension.write_text(f"subjectAltName=DNS:{name}\n")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    sign = ("-CA", authority, "-CAkey", folder / "authority.key", "-CAcreateserial", "-days", "2")
    openssl("x509", "-req", "-in", request, *sign, "-extfile", extension, "-out", certificate)
    return certificate, key


def openssl(*words: Any) -> str:
    command = [program("openssl", "openssl"), *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_SECONDS).stdout
