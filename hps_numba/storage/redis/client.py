"""redis-py with hiredis, in one place: how a connection is made, encrypted and authenticated.

*Why not its ``RedisCluster``.* It looks for the nodes again whenever one fails, by asking dead ones too: a hundred reads took
36 s with one node of three killed. Here the slots are read by ``topology``, which asks only nodes that answer.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.errors import TierUnavailable
from hps_numba.storage.redis.limits import Limits

__all__ = ["RedisClient", "error_line", "tls_context"]


class RedisClient:
    """Makes connections as a section of the config says.

    Args:
        section: with its address, login and encryption.   limits: how long a node may take.   who: speaks in messages.

    Attributes:
        who: as given.   problems: what a connection that fails raises.
        refusal: what it raises for an error line of the server.

    Raises:
        TierUnavailable: redis-py or hiredis is not installed, or a file of the encryption cannot be used.
    """

    def __init__(self, section: VolatileDatabaseConfig, limits: Limits, *, who: str = "redis_cluster") -> None:
        try:
            import hiredis  # noqa: F401  # redis-py parses with it if it is there
            import redis
            from redis.backoff import NoBackoff
            from redis.crc import key_slot
            from redis.retry import Retry
        except ImportError as problem:
            raise TierUnavailable(f"{who}: needs hps-numba[redis]: {problem}") from None
        self.who = who
        self.problems: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        self.refusal: type[Exception] = redis.ResponseError
        self.slot_of = key_slot
        self._redis, self._limits = redis, limits
        self._kind: Any = redis.Connection
        if section.enable_tls:
            name = section.tls_server_name_identification
            self._kind = _encrypted(redis.Connection, tls_context(section, who=who), name)
        self._options: dict[str, Any] = {
            "username": section.user_name if section.password or section.user_name != "default" else None,
            "password": section.password or None,
            "socket_connect_timeout": limits.connect,
            "socket_keepalive": True,
            "retry": Retry(NoBackoff(), 0),
            "protocol": limits.protocol,
        }

    def pool(self, host: str, port: int, connections: int) -> Any:
        """At most so many connections to a node, a redis-py ``ConnectionPool``: its own bound is 100."""
        options = {**self._options, "socket_timeout": self._limits.reply, "max_connections": connections + 1}
        return self._redis.ConnectionPool(connection_class=self._kind, host=host, port=port, **options)

    def probe(self, host: str, port: int) -> bool:
        """Whether a node answers on a new connection, within a short time."""
        limit = {"socket_timeout": self._limits.probe, "socket_connect_timeout": self._limits.probe}
        connection = self._kind(host=host, port=port, **{**self._options, **limit})
        try:
            connection.connect()
            connection.send_command("PING")
            connection.read_response()
        except self.problems:
            return False
        finally:
            connection.disconnect()
        return True


#: redis-py cuts the first word off the lines of these errors
_FIRST_WORDS = {
    "AskError": "ASK",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TryAgainError": "TRYAGAIN",
}


def error_line(refusal: Exception) -> str:
    """An error as the server wrote it."""
    word, text = _FIRST_WORDS.get(type(refusal).__name__, ""), str(refusal)
    return text if text.startswith(word) else f"{word} {text}"


def tls_context(section: VolatileDatabaseConfig, *, who: str = "redis_cluster") -> ssl.SSLContext:
    """The trusted certificates and the client's own. Files that are not named in the config may be missing.

    The chain of a node's certificate is always checked; its name if ``tls_server_name_identification`` is given.
    """
    given = section.model_fields_set
    authority = Path(section.tls_ca_certificate)
    try:
        if authority.exists() or "tls_ca_certificate" in given:
            place = {"capath" if authority.is_dir() else "cafile": str(authority)}
            context = ssl.create_default_context(**place)  # type: ignore[arg-type]
        else:
            context = ssl.create_default_context()
    except (OSError, ssl.SSLError) as problem:
        raise _unusable(
            f"{who}: tls_ca_certificate", section.tls_ca_certificate, "certificates of authorities", problem
        ) from problem
    context.check_hostname = "tls_server_name_identification" in given
    certificate, key = section.tls_client_certificate, section.tls_client_key
    if Path(certificate).exists() or {"tls_client_certificate", "tls_client_key"} & given:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as problem:
            both = f"{certificate!r}, tls_client_key {key!r}"
            raise _unusable(f"{who}: tls_client_certificate", both, "a certificate and its key", problem) from problem
    return context


def _unusable(key: str, value: str, expected: str, problem: Exception) -> TierUnavailable:
    return TierUnavailable(f"{key}: expected {expected}, got {value}: {problem}")


def _encrypted(plain: type, context: ssl.SSLContext, name: str) -> type:
    """A connection that encrypts with ``context``.

    redis-py's own asks for the host it connects to: one name cannot be asked for from all nodes.
    """

    class EncryptedConnection(plain):
        def _connect(self) -> Any:
            sock = super()._connect()
            try:
                return context.wrap_socket(sock, server_hostname=name)
            except BaseException:
                sock.close()
                raise

    return EncryptedConnection
