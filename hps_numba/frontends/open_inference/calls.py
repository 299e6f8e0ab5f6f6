"""One HTTP request as the front end sees it: method, path, the headers that matter, its body."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.open_inference.answers import Receive, Scope
from hps_numba.frontends.open_inference.codec import JSON_SIZE_HEADER
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.frontends.open_inference.remembered import remembered
from hps_numba.metrics import ServedRequest

__all__ = ["Call", "ClientGone"]

_JSON_SIZE = JSON_SIZE_HEADER.lower().encode()
_MAX_DIGITS = 15


class ClientGone(Exception):
    """The client cut the connection before its request was here."""


class Call:
    """A request.

    Attributes:
        method: of HTTP.   path: its words, decoded.
        headers: by name in lower case; of several, the last.
        json_size: the value of ``Inference-Header-Content-Length``, or None.
        held: bytes that ``admission`` counts for it.   counted: it in the metrics, or None.
    """

    __slots__ = ("_admission", "_receive", "counted", "headers", "held", "json_size", "method", "path")

    def __init__(self, scope: Scope, receive: Receive, admission: Admission) -> None:
        self.method: str = scope["method"]
        raw: bytes = scope.get("raw_path") or scope["path"].encode()
        self.path = _words(raw)
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.json_size: int | None = None
        self.held = 0
        self.counted: ServedRequest | None = None
        self._admission, self._receive = admission, receive

    def hold(self, size: int) -> None:
        """Count bytes of this request until ``end``.

        Raises:
            InferenceError: 429, there is too much under way.
        """
        self.held += self._admission.hold(size)

    def end(self, status: int) -> None:
        """The request is answered, or given up."""
        self._admission.release(self.held)
        self.held = 0
        if self.counted is not None:
            self.counted.finish(status)

    async def body(self, limits: Limits) -> bytes:
        """The whole body, whose bytes are held.

        Raises:
            InferenceError: 411 to 415, 429: it is too large, compressed, or there is too much under way.
            ClientGone: the client cut the connection.
        """
        encoding = self.headers.get(b"content-encoding", b"identity")
        if encoding not in (b"identity", b""):
            raise InferenceError(415, f"Content-Encoding: expected identity, got {encoding[:40].decode('latin-1')!r}")
        self.json_size = _number(self.headers.get(_JSON_SIZE), JSON_SIZE_HEADER)
        size = _number(self.headers.get(b"content-length"), "Content-Length")
        if size is not None:
            limits.check_body(size, self.json_size)
            self.hold(size)
        message = await self._next()
        if not message[1]:
            first = message[0]
            if size is None:
                limits.check_body(len(first), self.json_size)
                self.hold(len(first))
            return first
        return await self._joined(message[0], size, limits)

    async def _joined(self, first: bytes, size: int | None, limits: Limits) -> bytes:
        """The body whose first chunk this is; its size is known, or counted as it comes."""
        chunks, total, more = [first], len(first), True
        while True:
            if size is None:
                limits.check_body(total, 0 if self.json_size is None else self.json_size)
                self.hold(len(chunks[-1]))
            if not more:
                break
            chunk, more = await self._next()
            chunks.append(chunk)
            total += len(chunk)
        if size is None:
            limits.check_body(total, self.json_size)
        return b"".join(chunks)

    async def _next(self) -> tuple[bytes, bool]:
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGone
        return message.get("body", b""), message.get("more_body", False)


def _split(path: bytes) -> tuple[str, ...]:
    words = path.split(b"?")[0].strip(b"/").split(b"/")
    return tuple(
        unquote_to_bytes(word).decode("utf-8", "replace") if b"%" in word else word.decode("latin-1") for word in words
    )


_words = remembered(_split, 256)


def _number(value: bytes | None, name: str) -> int | None:
    if value is None:
        return None
    if not value.isdigit() or len(value) > _MAX_DIGITS:
        raise InferenceError(400, f"{name}: expected a number of bytes, got {value[:40].decode('latin-1')!r}")
    return int(value)
