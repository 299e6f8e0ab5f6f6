"""Open Inference Protocol over HTTP/1.1: keep-alive connections that count the bytes of answers and do not decode them."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from hps_numba.cli._serve_load.connection import Access, Done, ModelFacts, Probe, TensorFacts
from hps_numba.cli._serve_load.outcomes import OK
from hps_numba.cli._serve_load.tensors import datatype_of
from hps_numba.errors import ConfigError, HpsError

__all__ = ["HttpTarget", "ServeError"]

_HEAD_BYTES, _BODY_BYTES = 1 << 16, 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_HEADER_LENGTH = re.compile(rb"\r\ninference-header-content-length:[ \t]*(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[ \t]*close", re.IGNORECASE)


class ServeError(HpsError):
    """The server cannot be reached, or does not speak the protocol."""


class HttpTarget:
    """A server at ``http://`` or ``https://``, with a path before ``/v2`` if it has one."""

    def __init__(self, url: str, access: Access) -> None:
        parts = urlsplit(url)
        self.url, self._access = url, access
        self._host = parts.hostname or ""
        self._ssl = _trusting(access.ca) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._path = parts.path.rstrip("/")
        lines = {"Host": parts.netloc.rpartition("@")[2], **access.headers}
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def models(self) -> Sequence[str]:
        """Names of the models in the repository index."""
        index = await self._json("POST", "/v2/repository/index", b"{}")
        return [str(entry["name"]) for entry in index]

    async def facts(self, model: str) -> ModelFacts:
        """Metadata of a model."""
        found = await self._json("GET", f"/v2/models/{quote(model, safe='')}")
        inputs = {one["name"]: TensorFacts(one["datatype"], tuple(map(int, one["shape"]))) for one in found["inputs"]}
        return ModelFacts(model, str(found.get("platform", "")), inputs)

    def wire(self, model: str, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bytes:
        """A request with binary tensors, or in JSON."""
        inputs: list[dict[str, Any]] = []
        for name, array in tensors.items():
            entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
            inputs.append(
                {**entry, "data": array.reshape(-1).tolist()}
                if self._access.json
                else {**entry, "parameters": {"binary_data_size": array.nbytes}}
            )
        more = dict(parameters) if self._access.json else {**parameters, "binary_data_output": True}
        head = json.dumps({"inputs": inputs, **({"parameters": more} if more else {})}, separators=(",", ":")).encode()
        path = f"/v2/models/{quote(model, safe='')}/infer"
        if self._access.json:
            return self._request("POST", path, head, "Content-Type: application/json\r\n")
        kind = f"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: {len(head)}\r\n"
        return self._request("POST", path, b"".join([head, *(array.tobytes() for array in tensors.values())]), kind)

    async def probe(self, wire: bytes) -> Probe:
        """Send a request on a connection of its own, and read the shapes of its answer."""
        status, head_size, body = await self._exchange(wire)
        if status != 200:
            raise ServeError(f"{self.url}: expected an answer to a request, got status {status}: {_message(body)}")
        answer = _parsed(self.url, body if head_size is None else body[:head_size])
        outputs = {one["name"]: (one["datatype"], tuple(map(int, one["shape"]))) for one in answer["outputs"]}
        return Probe(outputs, None if head_size is None else len(body) - head_size)

    async def text(self, path: str) -> str | None:
        """The body of a GET; None if the status is not 200."""
        status, _, body = await self._exchange(self._request("GET", path))
        return body.decode("utf-8", "replace") if status == 200 else None

    async def connect(self, expected: int | None) -> HttpConnection:
        """A new connection."""
        return await self._connect(HttpConnection(expected))

    async def close(self) -> None:
        """Nothing is shared."""

    async def _connect(self, connection: HttpConnection) -> HttpConnection:
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: connection, self._host, self._port, ssl=self._ssl)
        try:
            await asyncio.wait_for(opening, self._access.timeout)
        except (OSError, TimeoutError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem) or "no connection in time"
            raise ServeError(f"{self.url}: cannot connect: {reason}") from problem
        return connection

    async def _json(self, verb: str, path: str, body: bytes = b"") -> Any:
        status, _, answer = await self._exchange(self._request(verb, path, body, "Content-Type: application/json\r\n"))
        if status != 200:
            raise ServeError(f"{self.url}: {verb} {path}: expected status 200, got {status}: {_message(answer)}")
        return _parsed(self.url, answer)

    async def _exchange(self, wire: bytes) -> tuple[int, int | None, bytes]:
        """Status, bytes of the JSON part before binary tensors, body."""
        connection = await self._connect(HttpConnection(None, keep=True))
        answered: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()

        def done(_: Any, status: str, size: int) -> None:
            if not answered.done():
                answered.set_result((status, size))

        connection.send(wire, done)
        try:
            status, _ = await asyncio.wait_for(answered, self._access.timeout)
        except TimeoutError:
            raise ServeError(f"{self.url}: no answer within {self._access.timeout:g} s") from None
        finally:
            connection.abort()
        if not (status == OK or status.isdigit()):
            raise ServeError(f"{self.url}: expected an HTTP answer, got: {status}")
        return 200 if status == OK else int(status), connection.head_size, bytes(connection.body)

    def _request(self, verb: str, path: str, body: bytes = b"", more: str = "") -> bytes:
        head = f"{verb} {self._path}{path} HTTP/1.1\r\n{self._lines}{more}Content-Length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body


def _trusting(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as problem:  # SSLError is one
        raise ConfigError(f"--ca: expected a file with certificates, got {ca}: {problem.strerror or problem}") from problem


def _parsed(url: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise ServeError(f"{url}: expected JSON, got {text[:80]!r}") from problem


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace") or "no message"


class HttpConnection(asyncio.BufferedProtocol):
    """One keep-alive connection with at most one request under way.

    The head of an answer is read into a buffer, and the body behind it over and over into the same memory.

    Args:
        expected: bytes of tensors in a good answer; None: any.
        keep: keep the body of the answer in ``body``.
    """

    def __init__(self, expected: int | None, *, keep: bool = False) -> None:
        self.alive, self.slot = False, None
        self.body = bytearray()
        self.head_size: int | None = None
        self._expected, self._keep = expected, keep
        self._buffer = bytearray(_HEAD_BYTES)
        self._sink = memoryview(bytearray(_BODY_BYTES))
        self._view = memoryview(self._buffer)
        self._transport: Any = None
        self._done: Done | None = None
        self._filled = 0
        self._length, self._got, self._status = -1, 0, ""

    def connection_made(self, transport: Any) -> None:
        """The connection is open."""
        self._transport, self.alive = transport, True

    def connection_lost(self, problem: Exception | None) -> None:
        """It is closed: a request under way fails."""
        self.alive = False
        self._finish("connection lost", 0)

    def send(self, wire: bytes, done: Done) -> None:
        """Send a prepared request."""
        self._done, self._filled, self._length, self._got = done, 0, -1, 0
        if not self.alive:
            self._finish("connection lost", 0)
            return
        self._transport.write(wire)

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._sink if self._length >= 0 else self._view[self._filled :]

    def buffer_updated(self, count: int) -> None:
        """Bytes have come."""
        if self._length >= 0:
            if self._keep:
                self.body += self._sink[:count]
            self._got += count
        else:
            self._filled += count
            end = self._buffer.find(b"\r\n\r\n", max(0, self._filled - count - 3), self._filled)
            if end < 0:
                if self._filled == _HEAD_BYTES:
                    self._broken("the head of the answer is too long")
                return
            if not self._read_head(end):
                return
        if self._got > self._length:
            self._broken("more bytes than Content-Length says")
        elif self._got == self._length:
            self._finish(self._status, self._length)

    def _read_head(self, end: int) -> bool:
        head = bytes(self._buffer[: end + 2])
        length = _LENGTH.search(head)
        if self._done is None or not head.startswith(b"HTTP/1.") or not head[9:12].isdigit() or length is None:
            self._broken("an answer that is not HTTP/1.1 with Content-Length")
            return False
        self._length = int(length[1])
        self._got = self._filled - end - 4
        if self._keep:
            self.body = bytearray(self._buffer[end + 4 : self._filled])
        before = _HEADER_LENGTH.search(head)
        self.head_size = None if before is None else int(before[1])
        self._status = OK if head[9:12] == b"200" else head[9:12].decode()
        if self._status == OK and self._expected is not None and self._length - (self.head_size or 0) != self._expected:
            self._status = "answer of another size"
        if head.startswith(b"HTTP/1.0") or _CLOSE.search(head):
            self.alive = False
        return True

    def _broken(self, why: str) -> None:
        self.alive = False
        self._transport.abort()
        self._finish(why, 0)

    def _finish(self, status: str, size: int) -> None:
        done, self._done = self._done, None
        if done is not None:
            self._filled, self._length = 0, -1
            if not self.alive:
                self._transport.abort()
            done(self, status, size)
