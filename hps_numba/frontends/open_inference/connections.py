"""Connections of uvicorn with bounds: their number, the size of headers, and the time a client takes to send and to read.

Choice: one look at all connections every so often, which costs a request nothing but a time stamp. Turned down: a timer for
each request and phase.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hps_numba.frontends.open_inference.limits import Limits

__all__ = ["BoundedConnection", "bounded_connections", "close_late"]

_LOOKS = 0.5  # seconds between two looks at all connections
_LINGER = 1.0  # seconds
_JOINED = 64 << 10  # bytes; more are not copied
_NO_LINGER = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


class JoiningTransport:
    """A transport that sends the head of an answer together with its first bytes: one call of the system, one packet.

    uvicorn writes them one after the other. Whoever sends a head sends more, closes the connection, or calls ``flush``.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """As that of the transport, but a head of an answer waits for what follows."""
        head = self._head
        if head:
            self._head = b""
            if len(data) <= _JOINED:
                data = head + data
            else:
                self._transport.write(head)
        elif data[:9] == b"HTTP/1.1 " and data[9:12] != b"100":  # rows that begin like this only wait a little
            self._head = bytes(data)
            return
        self._transport.write(data)

    def flush(self) -> None:
        """Send a head to which nothing belongs."""
        head, self._head = self._head, b""
        if head:
            self._transport.write(head)

    def close(self) -> None:
        """As that of the transport."""
        self.flush()
        self._transport.close()


class BoundedConnection(HttpToolsProtocol):
    """A connection whose client must not be slow, nor send endless headers. ``bounded_connections`` gives it its limits."""

    limits: ClassVar[Limits]

    _reading_since: float | None = None  # while a request is not here as a whole
    _writing_since: float | None = None  # while the client does not read fast enough
    _closing_since: float | None = None  # as seen by ``close_if_late``
    _in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(JoiningTransport(transport))  # type: ignore[arg-type]  # it has all that a transport has
        self._reading_since = self.loop.time()
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"server: {self.limits.max_connections} connections are open already, try again in a while")

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._header_bytes += len(data)
        if self._reading_since is None:
            self._reading_since = self.loop.time()
        super().data_received(data)
        if self._in_headers and self._header_bytes > self.limits.max_header_bytes:
            self._refuse(431, f"headers: expected at most {self.limits.max_header_bytes} bytes")

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._reading_since = None
        self._in_headers, self._header_bytes = True, 0

    def on_response_complete(self) -> None:
        self.transport.flush()  # type: ignore[attr-defined]  # an answer without a body
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing_since = None

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, in JSON."""
        self._refuse(400, f"request: {msg}")

    def _refuse(self, status: int, message: str) -> None:
        text = json.dumps({"error": message}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(text)}\r\n\r\n".encode() + text)
        self.transport.close()

    def close_if_late(self, now: float) -> None:
        """Close it if its client takes too long to send or to read."""
        if self.transport.is_closing():
            self._closing_since = now if self._closing_since is None else self._closing_since
        since = self._closing_since if self._writing_since is None else self._writing_since
        if since is not None and now - since > self.limits.write_seconds:
            self._reset()
        elif self._reading_since is not None and now - self._reading_since > self.limits.read_seconds:
            self._end_reading()

    def shutdown(self) -> None:
        """As uvicorn's, but a client that is about to send a request on an idle connection may do so for a moment."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LINGER, self._close_if_idle)
        else:
            super().shutdown()

    def _close_if_idle(self) -> None:
        if self._reading_since is None or (self._in_headers and self._header_bytes == 0):
            super().shutdown()

    def _reset(self) -> None:
        """Close it, and drop what the client did not read, in the system's buffers too."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def _end_reading(self) -> None:
        if self._in_headers and self._header_bytes == 0:
            self.transport.close()
        elif self._in_headers or not (self.cycle.response_started or self.transport.is_closing()):
            self._refuse(408, f"request: expected all of it within {self.limits.read_seconds:g} s")
        else:  # refused long ago, and still sending
            self.transport.close()


def bounded_connections(limits: Limits) -> type[BoundedConnection]:
    """The class of connections with these limits, for uvicorn's ``http``."""
    return type("BoundedConnection", (BoundedConnection,), {"limits": limits})


async def close_late(connections: set[Any]) -> None:
    """Look after connections, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_LOOKS)
        now = loop.time()
        for connection in list(connections):
            connection.close_if_late(now)
