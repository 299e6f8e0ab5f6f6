"""Where the streams are: a Redis server or cluster, with the login and encryption of the tier ``redis_cluster``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.errors import ConfigError, TierUnavailable
from hps_numba.storage.redis.client import RedisClient
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.plain import PlainCommands
from hps_numba.storage.redis.topology import Topology, seeds_of

__all__ = ["WHO", "Connection", "Connector", "Stream"]

WHO = "redis_streams"
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,120}")
_MAX_STREAMS = 64
_CONNECTIONS = 2  # to a node: one thread asks at a time


class Stream(NamedTuple):
    """One stream.

    Attributes:
        name: its key.   slot: in a cluster.
    """

    name: str
    slot: int

    def __str__(self) -> str:
        return f"{WHO}: {self.name}"


@dataclass(frozen=True, kw_only=True)
class Connection:
    """Keys of sources and producers alike; login and encryption as those of ``redis_cluster``.

    Attributes:
        address: host:port of a server, or of some nodes of a cluster.
        user_name, password: of the user (ACL).
        enable_tls: encrypt.   tls_...: certificates, and the name that the server has to have.
        stream: name of the stream; of several, the beginning of their names.
        num_streams: over which keys are spread, so that a cluster shares the load; the same in the producer and in all sources.
    """

    address: str = "127.0.0.1:6379"
    user_name: str = "default"
    password: str = field(default="", repr=False)
    enable_tls: bool = False
    tls_ca_certificate: str | None = None
    tls_client_certificate: str | None = None
    tls_client_key: str | None = None
    tls_server_name_identification: str | None = None
    stream: str = "hps_updates"
    num_streams: int = 1

    def check(self) -> None:
        """
        Raises:
            ConfigError: a key is out of range.
        """
        if not _NAME.fullmatch(self.stream):
            raise ConfigError(f"stream: expected 1 to 120 of the characters A-Z a-z 0-9 _ . : -, got {self.stream!r}")
        if not 1 <= self.num_streams <= _MAX_STREAMS:
            raise ConfigError(f"num_streams: expected 1 to {_MAX_STREAMS}, got {self.num_streams}")
        try:
            if not seeds_of(self.address, who=WHO):
                raise ConfigError(f"address: expected host:port of one or more nodes, got {self.address!r}")
        except TierUnavailable as problem:
            raise ConfigError(str(problem).removeprefix(f"{WHO}: ")) from None

    def section(self) -> VolatileDatabaseConfig:
        """What a client is made of: only keys that were given, as certificates that nobody named may be missing."""
        given = {
            name: getattr(self, name)
            for name in type(self).__dataclass_fields__
            if name.startswith("tls_") and getattr(self, name)
        }
        own = {"user_name": self.user_name, "password": self.password, "enable_tls": self.enable_tls}
        return VolatileDatabaseConfig.model_validate({"type": "redis_cluster", **own, **given})

    def names(self) -> list[str]:
        """Of the streams."""
        return [self.stream] if self.num_streams == 1 else [f"{self.stream}.{number}" for number in range(self.num_streams)]


class Connector:
    """The streams of a bus, and commands to their nodes; it connects with the first command.

    Args:
        options: checked.

    Raises:
        TierUnavailable: redis-py is not installed, or a certificate cannot be used.

    Thread safety: one thread at a time.
    """

    def __init__(self, options: Connection) -> None:
        self._address = options.address
        self._limits = Limits()
        self._client = RedisClient(options.section(), self._limits, who=WHO)
        self._topology: Topology | None = None
        self._commands: PlainCommands | None = None
        self.streams = [Stream(name, self._client.slot_of(name.encode())) for name in options.names()]

    def _connected(self) -> PlainCommands:
        if self._commands is None:
            self._topology = Topology(self._client, self._address, _CONNECTIONS, self._limits)
            self._commands = PlainCommands(self._topology, self._limits)
        return self._commands

    def run(self, stream: Stream, *command: Any) -> Any:
        """The answer to a command about a stream, wherever it is.

        Raises:
            TierError: its node failed or refused it.
        """
        return self._connected().run(stream, command)

    def run_all(self, stream: Stream, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The answers to pipelined commands about a stream.

        Raises:
            TierError: as ``run``.
        """
        return self._connected().run_all(stream, commands)

    @property
    def one_node(self) -> bool:
        """All streams can be named in one command."""
        return len(self.streams) == 1 or (self._topology is not None and not self._topology.in_cluster)

    def close(self) -> None:
        """Close all connections; the next command opens new ones."""
        topology, self._topology, self._commands = self._topology, None, None
        if topology is not None:
            topology.close()
