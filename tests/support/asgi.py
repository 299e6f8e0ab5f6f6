"""An ASGI application asked in process, without a server: one request, and all that it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Reply", "ask", "ask_all"]


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        headers: by name in lower case.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        found: str = self.json()["error"]
        return found


async def ask(
    app: Any,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    chunks: Sequence[bytes] | None = None,
    cut: bool = False,
) -> Reply | None:
    """Ask once.

    Args:
        chunks: of the body, whose length is not said.   cut: the client is gone after them.

    Returns:
        None if nothing was answered.
    """
    given = {"content-length": str(len(body))} if chunks is None else {}
    given |= headers or {}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given.items()],
    }
    parts = list(chunks if chunks is not None else [body])
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts) or cut}
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if not sent:
        return None
    first, *rest = sent
    assert first["type"] == "http.response.start" and rest
    assert [message.get("more_body", False) for message in rest] == [True] * (len(rest) - 1) + [False]
    content = b"".join(message["body"] for message in rest)
    names = {name.decode().lower(): value.decode() for name, value in first["headers"]}
    assert int(names["content-length"]) == len(content)
    return Reply(first["status"], names, content)


def ask_all(app: Any, *requests: Mapping[str, Any]) -> list[Reply | None]:
    """Ask several requests at the same time."""

    async def all_of_them() -> list[Reply | None]:
        return list(await asyncio.gather(*(ask(app, **request) for request in requests)))

    return asyncio.run(all_of_them())
