"""HTTP connections to one server, kept open between requests, and requests over them with a deadline."""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from urllib.parse import urlsplit

from hps_numba.errors import ClosedError, ConfigError
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["Connections", "Response"]

_IDLE = 50.0  # seconds; servers and balancers close idle connections after 60 or more
_MAX_IDLE = 64
_JOINED = 64 << 10  # bytes; up to here one copy costs less than another call of the system
_MAX_UNSIZED = 1 << 30  # bytes of an answer that does not say how long it is


@dataclass(frozen=True)
class Response:
    """An answer.

    Attributes:
        status: of HTTP.   headers: by name in any case.   body: its bytes.
    """

    status: int
    headers: Message
    body: bytearray


class _Connection:
    """A connection and when it was used last."""

    def __init__(self, raw: http.client.HTTPConnection) -> None:
        self.raw = raw
        self.used = time.monotonic()


class Connections:
    """Connections to the server of a URL.

    Args:
        url: ``http://host:port`` or ``https://...``, perhaps with a path in front of the protocol's.
        headers: of every request.   tls: of https; None: certificates are checked against those that the system trusts.

    Raises:
        ConfigError: the URL is none of these.

    Thread safety: every method; each request has a connection of its own while it lasts.
    """

    def __init__(self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            host, port = parts.hostname, parts.port
        except ValueError as problem:
            raise ConfigError(f"url: expected http://host:port, got {url!r}: {problem}") from None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or parts.username:
            raise ConfigError(f"url: expected http://host:port or https://host:port, got {url!r}")
        self._host, self._port = host, port
        self._tls = None if parts.scheme == "http" else tls or ssl.create_default_context()
        self.prefix = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self.prefix}"
        self._headers = dict(headers)
        self._closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A forked child shares no connection with its parent."""
        self._lock = threading.Lock()
        self._idle: deque[_Connection] = deque()

    def request(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes | bytearray | memoryview] = (),
        headers: Mapping[str, str] | None = None,
        *,
        deadline: float,
        fresh: bool = False,
    ) -> Response:
        """Send a request and read its answer.

        Args:
            parts: of the body.   deadline: of ``time.monotonic``.
            fresh: take a new connection, as one that was idle may have been closed by the server without a word.

        Raises:
            OSError, http.client.HTTPException: the server cannot be reached, cut the connection, or did not answer in time
            (TimeoutError).   ClosedError: the client was closed.
        """
        connection = self._take(deadline, fresh)
        try:
            response, reusable = self._exchange(connection.raw, method, path, parts, headers or {}, deadline)
        except BaseException:
            connection.raw.close()
            raise
        self._give_back(connection, reusable)
        return response

    def _exchange(
        self,
        raw: http.client.HTTPConnection,
        method: str,
        path: str,
        parts: Sequence[bytes | bytearray | memoryview],
        headers: Mapping[str, str],
        deadline: float,
    ) -> tuple[Response, bool]:
        size = sum(memoryview(part).nbytes for part in parts)
        every = {**self._headers, **headers, **({"Content-Length": str(size)} if parts or method == "POST" else {})}
        body = b"".join(parts) if size <= _JOINED else parts
        raw.request(method, self.prefix + path, body or None, every)
        _limit(raw, deadline)
        answer = raw.getresponse()
        content = _read(raw, answer, deadline)
        return Response(answer.status, answer.headers, content), not answer.will_close

    def _take(self, deadline: float, fresh: bool) -> _Connection:
        oldest = time.monotonic() - _IDLE
        stale: list[_Connection] = []
        with self._lock:
            if self._closed:
                raise ClosedError("the client is closed")
            while self._idle and self._idle[0].used < oldest:
                stale.append(self._idle.popleft())
            found = self._idle.pop() if self._idle and not fresh else None
        for one in stale:
            one.raw.close()
        if found is not None:
            _limit(found.raw, deadline)
            return found
        seconds = _left(deadline)
        if self._tls is None:
            return _Connection(http.client.HTTPConnection(self._host, self._port, timeout=seconds))
        return _Connection(http.client.HTTPSConnection(self._host, self._port, timeout=seconds, context=self._tls))

    def _give_back(self, connection: _Connection, reusable: bool) -> None:
        connection.used = time.monotonic()
        with self._lock:
            if reusable and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        connection.raw.close()

    @property
    def idle(self) -> int:
        """Connections that are open and not in use."""
        return len(self._idle)

    def close(self) -> None:
        """Close those that are idle now, and others when their request ends; no more are opened."""
        with self._lock:
            self._closed = True
            idle, self._idle = list(self._idle), deque()
        for one in idle:
            one.raw.close()


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("no time is left")
    return seconds


def _limit(raw: http.client.HTTPConnection, deadline: float) -> None:
    if raw.sock is not None:
        raw.sock.settimeout(_left(deadline))


def _read(raw: http.client.HTTPConnection, answer: http.client.HTTPResponse, deadline: float) -> bytearray:
    """The body, without a copy of it if the answer says how long it is."""
    if answer.length is None:
        content = bytearray()
        while chunk := answer.read1(1 << 20):
            content += chunk
            if len(content) > _MAX_UNSIZED:
                raise http.client.HTTPException(f"answer: expected at most {_MAX_UNSIZED} bytes")
            _limit(raw, deadline)
        return content
    content = bytearray(answer.length)
    view = memoryview(content)
    while view:
        _limit(raw, deadline)
        count = answer.readinto(view[: 1 << 20])
        if not count:
            raise http.client.IncompleteRead(b"", len(view))
        view = view[count:]
    answer.read()  # the end, so that the connection can be used again
    return content
