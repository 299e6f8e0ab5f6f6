"""What a connection writes: the head of an answer and its body in one piece, and nothing is kept back for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from hps_numba.frontends.open_inference.answers import Answer  # noqa: E402
from hps_numba.frontends.open_inference.connections import JoiningTransport, bounded_connections  # noqa: E402
from hps_numba.frontends.open_inference.limits import Limits  # noqa: E402

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Nothing comes by itself."""

    resume_reading = pause_reading


@pytest.mark.parametrize(("pieces", "written"), [
    ([HEAD, b"rows"], [HEAD + b"rows"]),
    ([HEAD, memoryview(b"rows"), b"more"], [HEAD + b"rows", b"more"]),
    ([HEAD, bytes(1 << 20)], [HEAD, bytes(1 << 20)]),  # is not copied
    ([HEAD, b"", b"rows"], [HEAD, b"rows"]),
    ([HEAD], []),
    ([b"HTTP/1.1 100 Continue\r\n\r\n"], [b"HTTP/1.1 100 Continue\r\n\r\n"]),  # which the client waits for
    ([b"rows"], [b"rows"]),
    ([HEAD, b"rows", HEAD, b"other rows"], [HEAD + b"rows", HEAD + b"other rows"]),
    ([HEAD, HEAD], [HEAD + HEAD]),  # rows may look like a head
])  # fmt: skip
def test_a_head_is_sent_with_what_follows(pieces: Sequence[Any], written: Sequence[bytes]) -> None:
    transport = Transport()
    joining = JoiningTransport(transport)
    for piece in pieces:
        joining.write(piece)
    assert transport.written == written
    joining.flush()
    joining.flush()
    assert b"".join(transport.written) == b"".join(map(bytes, pieces))


def test_closing_sends_a_head_that_waits() -> None:
    transport = Transport()
    joining = JoiningTransport(transport)
    joining.write(HEAD)
    joining.close()
    assert transport.written == [HEAD] and transport.closed and joining.is_closing()


def answers_to(requests: bytes, parts: Sequence[bytes], fails: bool = False) -> list[bytes]:
    """What is written for the bytes of requests by an application that answers each with these parts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        if fails:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError("after the head")
        await Answer(200, parts).send(send)

    async def run() -> list[bytes]:
        config = uvicorn.Config(
            app,
            http=bounded_connections(Limits()),
            lifespan="off",
            log_level="critical",
            server_header=False,
            date_header=False,
        )
        config.load()
        state = uvicorn.Server(config).server_state
        connection = config.http_protocol_class(config=config, server_state=state, app_state={})
        transport = Transport()
        connection.connection_made(transport)
        connection.data_received(requests)
        while state.tasks:
            await asyncio.gather(*state.tasks)
            await asyncio.sleep(0)
        return transport.written

    return asyncio.run(run())


POST = b"POST /v2 HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n"


def test_a_small_answer_is_one_write() -> None:
    (answer,) = answers_to(POST + b"\r\nab", [b"{}", b"rows"])
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\n{}rows")


def test_answers_to_pipelined_requests_come_in_order() -> None:
    answers = answers_to(2 * (POST + b"\r\nab"), [b"rows"])
    assert len(answers) == 2 and all(answer.endswith(b"\r\n\r\nrows") for answer in answers)


def test_a_large_answer_is_not_copied() -> None:
    head, first, *_ = answers_to(POST + b"\r\nab", [bytes(1 << 20), b"rows"])
    assert head.endswith(b"\r\n\r\n") and first == bytes(1 << 20)


def test_an_answer_without_a_body_is_sent() -> None:
    (head,) = answers_to(b"HEAD /v2 HTTP/1.1\r\nhost: here\r\n\r\n", [b"not sent"])
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and head.endswith(b"\r\n\r\n")


def test_a_client_that_waits_for_100_is_told_at_once() -> None:
    first, answer = answers_to(POST + b"expect: 100-continue\r\n\r\nab", [b"rows"])
    assert first == b"HTTP/1.1 100 Continue\r\n\r\n" and answer.endswith(b"\r\n\r\nrows")


def test_a_head_whose_application_fails_is_sent() -> None:
    (head,) = answers_to(POST + b"\r\nab", [], fails=True)
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
