"""redis-py with hiredis, in one place: how a connection is made, encrypted and authenticated.

*Why not its ``RedisCluster``.* It looks for the nodes again whenever one fails, by asking dead ones too: a hundred reads took
36 s with one node of three killed. Here the slots are read by ``topology``, which asks only nodes that answer.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.errors import ClosedError, TierUnavailable
from hps_numba.runtime.weak import members
from hps_numba.storage.redis.limits import Limits

__all__ = ["Opening", "RedisClient", "error_line", "shut_down", "socket_of", "tls_context"]


class Opening:
    """Sockets over which a node is greeted, until it answers: they can be ended meanwhile.

    Attributes:
        closed: by ``close``.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self.closed = False
        self.forget()

    def forget(self) -> None:
        """In a forked child: they are the parent's."""
        self._sockets: WeakSet[socket.socket] = WeakSet()

    def add(self, sock: socket.socket) -> None:
        """A new one.

        Raises:
            ClosedError: after ``close``.
        """
        self._sockets.add(sock)
        if self.closed:
            raise ClosedError("the connections to this node are closed")

    def remove(self, sock: socket.socket) -> None:
        """The node has answered."""
        self._sockets.discard(sock)

    def close(self) -> None:
        """End all, also those that come later."""
        self.closed = True
        for sock in members(self._sockets):
            shut_down(sock)


def shut_down(sock: Any) -> None:
    """End what goes on over a socket; whoever uses it closes it. Anything else, such as None, is left as it is."""
    if isinstance(sock, socket.socket):
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # that of SSLSocket would let it go on in plain text


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
        self._kind: Any = _interruptible(redis.Connection)
        if section.enable_tls:
            name = section.tls_server_name_identification
            self._kind = _encrypted(self._kind, tls_context(section, who=who), name)
        self._options: dict[str, Any] = {
            "username": section.user_name if section.password or section.user_name != "default" else None,
            "password": section.password or None,
            "socket_connect_timeout": limits.connect,
            "socket_keepalive": True,
            "retry": Retry(NoBackoff(), 0),
            "protocol": limits.protocol,
        }

    def pool(self, host: str, port: int, connections: int, opening: Opening) -> Any:
        """At most so many connections to a node, a redis-py ``ConnectionPool``: its own bound is 100."""
        options = {
            **self._options,
            "socket_timeout": self._limits.reply,
            "max_connections": connections + 1,
            "opening": opening,
        }
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


def socket_of(connection: Any) -> Any:
    """The socket of a redis-py connection, which its interface does not have; None if it is not where it was."""
    return getattr(connection, "_sock", None)


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


def _interruptible(plain: type) -> type:
    """A connection that shows its sockets to an ``Opening``, if it has one."""

    class InterruptibleConnection(plain):
        def __init__(self, *given: Any, opening: Opening | None = None, **named: Any) -> None:
            self._opening = opening
            super().__init__(*given, **named)

        def _connect(self) -> Any:
            return self._shown(super()._connect())

        def _shown(self, sock: Any) -> Any:
            try:
                if self._opening is not None:
                    self._opening.add(sock)
            except BaseException:
                sock.close()
                raise
            return sock

    return InterruptibleConnection


def _encrypted(plain: type, context: ssl.SSLContext, name: str) -> type:
    """A connection that encrypts with ``context``.   ``plain``: made by ``_interruptible``.

    redis-py's own asks for the host it connects to: one name cannot be asked for from all nodes.
    """

    class EncryptedConnection(plain):
        def _connect(self) -> Any:
            sock = super()._connect()
            try:
                sock = context.wrap_socket(sock, server_hostname=name, do_handshake_on_connect=False)
                self._shown(sock).do_handshake()
            except BaseException:
                sock.close()
                raise
            return sock

    return EncryptedConnection
