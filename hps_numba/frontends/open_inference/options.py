"""What ``hps-numba serve`` is told, and what is wrong with it."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hps_numba.config import read_config
from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.open_inference.limits import Limits

__all__ = ["SHARED", "ServeOptions", "Tls", "rows_are_shared"]

SHARED = "multi_process_hash_map"


@dataclass(frozen=True)
class Tls:
    """Files in PEM form.

    Attributes:
        certificate, key: of the server.   client_ca: who signs certificates of clients, which then need one.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a config.

    Attributes:
        config: a ps_config JSON file.   host, port: of HTTP; port 0: any that is free.
        grpc_port: also serve gRPC there; port 0: any that is free, with one worker.   workers: processes.
        programs: whole models, files by the names that clients call them.
        batch_delay: seconds that a small request to one of them may be held up so that others can join it; None: requests are
            not joined.   max_batch: most samples of requests that are joined; 0: as many as the model takes.
        limits: of each process.   tokens: of which a client needs one; empty: none.   tls: None: plain HTTP.
        allow_control: clients may load and unload models of the config.   allow_code: the config may name Python code.
        drain_seconds: for which a server that is told to end goes on accepting requests, while it says that it is not ready.
        stop_seconds: most that requests under way then get.   seconds: end by itself so long after it was ready.
        verbose: workers show log messages at level INFO too.
        shared_memory: clients may have tensors in segments of /dev/shm whose names begin with one of these.

    Raises:
        ConfigError: one is out of range.
    """

    config: Path
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    workers: int = 1
    programs: Mapping[str, Path] = field(default_factory=dict)
    batch_delay: float | None = None
    max_batch: int = 0
    limits: Limits = field(default_factory=Limits)
    tokens: tuple[str, ...] = field(default=(), repr=False)
    tls: Tls | None = None
    allow_control: bool = False
    allow_code: bool = False
    drain_seconds: float = 1.0
    stop_seconds: float = 30.0
    seconds: float | None = None
    verbose: bool = False
    shared_memory: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers: expected at least 1, got {self.workers}")
        if self.grpc_port == 0 and self.workers > 1:
            raise ConfigError("grpc_port: expected the number of a port, which all workers share, got 0")
        if self.shared_memory and self.workers > 1:
            raise ConfigError("shared memory: expected one worker, as each knows only its own regions")
        SharedRegions(self.shared_memory)
        for name in ("drain_seconds", "stop_seconds", "batch_delay", "seconds"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name}: expected 0 or more, got {value}")
        for path in () if self.tls is None else (self.tls.certificate, self.tls.key, self.tls.client_ca):
            if path is not None and not path.is_file():
                raise ConfigError(f"tls: expected a file, got {path}")

    def warnings(self) -> Iterator[str]:
        """What whoever starts this should know."""
        mutual = self.tls is not None and self.tls.client_ca is not None
        if not (_is_loopback(self.host) or self.tokens or mutual):
            yield f"everybody who reaches {self.host} may ask: set a token (--token-file) or ask for certificates (--client-ca)"
        if self.tokens and self.tls is None and not _is_loopback(self.host):
            yield f"the token goes to {self.host} in clear text: add --tls-cert and --tls-key, or a proxy that does TLS"
        if self.workers > 1 and not rows_are_shared(self.config):
            yield (
                f"{self.workers} workers load the rows {self.workers} times:"
                f" with volatile_db.type {SHARED} they share one copy in memory"
            )


def rows_are_shared(config: Path) -> bool:
    """Whether processes that serve a config have one copy of its rows in host memory.

    Raises:
        ConfigError: something is wrong with the config.
    """
    read = read_config(config)
    first = read.tiers[0] if read.tiers else read.volatile_db
    return str(first.type) == SHARED


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
