"""Answers of the HTTP front end: a status, headers and a body in parts."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from hps_numba.frontends.inference.problems import InferenceError, message_of, status_of

__all__ = ["Answer", "MethodError", "Receive", "Scope", "Send", "error_answer", "json_answer", "live"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_JOINED = 64 << 10  # bytes; up to here one copy costs less than another message

_MORE_HEADERS: Mapping[int, tuple[tuple[bytes, bytes], ...]] = {
    401: ((b"www-authenticate", b"Bearer"),),
    429: ((b"retry-after", b"1"),),
    503: ((b"retry-after", b"1"),),
}


@dataclass(eq=False, slots=True)
class Answer:
    """What is sent.

    Attributes:
        parts: of the body; arrays are not copied.   headers: beside length and type.
    """

    status: int
    parts: Sequence[bytes | bytearray | memoryview] = ()
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()

    async def send(self, send: Send, *, close: bool = False) -> None:
        """Send it; a large one returns once the client has read most of it.

        Args:
            close: the connection ends with it.
        """
        size = sum(map(len, self.parts))
        headers = [(b"content-type", self.content_type), (b"content-length", b"%d" % size), *self.headers]
        if close:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        if size <= _JOINED:
            body = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
            await send({"type": "http.response.body", "body": body})
            return
        for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def json_answer(content: Any, status: int = 200) -> Answer:
    """An answer in JSON."""
    return Answer(status, (json.dumps(content, separators=(",", ":")).encode(),))


def error_answer(problem: BaseException) -> Answer:
    """What a client is told of an error: its status and one line of text."""
    status = status_of(problem)
    headers = _MORE_HEADERS.get(status, ())
    if isinstance(problem, MethodError):
        headers = ((b"allow", problem.allowed.encode()),)
    return Answer(status, (json.dumps({"error": message_of(problem)}).encode(),), headers=headers)


class MethodError(InferenceError):
    """A path that is there, with another method."""

    def __init__(self, allowed: str, got: str) -> None:
        super().__init__(405, f"method: expected {allowed}, got {got[:20]}")
        self.allowed = allowed


async def live(receive: Receive, send: Send) -> None:
    """Answer what servers ask of applications when they start and end."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
