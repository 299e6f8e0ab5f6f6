"""The client: what it asks, what comes back, what it tries again and what it must not."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.servers import free_port
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba import HPS
from hps_numba.client import Client
from hps_numba.errors import (
    ArrayError,
    CapacityError,
    ClosedError,
    ConfigError,
    HpsError,
    KeyDtypeError,
    TierError,
    TierUnavailable,
    UnknownModelError,
    VersionError,
)
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.open_inference.codec import JSON_SIZE_HEADER, decode_request, encode_response

Script = list[Any]


class PlayedServer:
    """An HTTP server that plays a script: each request takes the next step, and without one it answers by a repository.

    Attributes:
        script: steps: (status, headers, body), ``cut`` (the connection, without an answer), or a function that waits.
        asked: method and path of each request.   connections: how many were accepted.
    """

    def __init__(self, server: HPS) -> None:
        self.repository = Repository(server, may_change=True)
        self.script: Script = []
        self.asked: list[str] = []
        self.connections = 0
        self.headers: list[dict[str, str]] = []
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()

    def handler(self) -> Any:
        played = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                played.connections += 1

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

            def do_GET(self) -> None:
                self.answer(b"")

            def do_POST(self) -> None:
                self.answer(self.rfile.read(int(self.headers["Content-Length"])))

            def answer(self, body: bytes) -> None:
                played.asked.append(f"{self.command} {self.path}")
                played.headers.append(dict(self.headers))
                step = played.script.pop(0) if played.script else played.answer
                if step == "cut":
                    self.close_connection = True
                    return
                status, headers, content = step(self, body) if callable(step) else step
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        return Handler

    def answer(self, handler: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What a right server says."""
        if not handler.path.endswith("/infer"):
            return 200, {}, b"{}"
        size = handler.headers.get(JSON_SIZE_HEADER)
        request, form = decode_request(body, handler.path.split("/")[3], "", None if size is None else int(size))
        told = encode_response(self.repository.model(request.model).infer(request), form)
        return 200, {JSON_SIZE_HEADER: str(told.json_size)}, b"".join(told.parts)

    def close(self) -> None:
        """End it."""
        self.http.shutdown()
        self.http.server_close()
        join_all(self.thread)


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(workshop.model((range(20), 4), (range(20), 8), embedding_table_names=["user", "item"]))


@pytest.fixture
def played(server: HPS) -> Iterator[PlayedServer]:
    made = PlayedServer(server)
    yield made
    made.close()


@pytest.fixture
def client(played: PlayedServer) -> Iterator[Client]:
    with Client(played.url, timeout=HANG_SECONDS) as made:
        yield made


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client paused between tries; it does not really."""
    found: list[float] = []
    monkeypatch.setattr("hps_numba.client.client.time.sleep", found.append)
    return found


def refused(status: int, message: str = "no", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, headers, json.dumps({"error": message}).encode()


# -- what it asks --------------------------------------------------------------------


def test_rows_of_tables(server: HPS, client: Client) -> None:
    got = client.lookup("m", {"user": [3, 1, 99], "item": [[1, 5], [9, 2]]})
    assert list(got) == ["user", "item"]
    np.testing.assert_array_equal(got["user"], server.lookup([3, 1, 99], "m", "user"), strict=True)
    np.testing.assert_array_equal(got["item"], server.lookup([[1, 5], [9, 2]], "m", "item"), strict=True)
    assert client.lookup("m", {"user": []})["user"].shape == (0, 4)
    half = client.lookup("m", {"user": np.arange(3, dtype=">i4")}, dtype=np.float16)["user"]
    np.testing.assert_array_equal(half, server.lookup(np.arange(3), "m", "user").astype(np.float16), strict=True)


def test_pooled_rows(server: HPS, client: Client) -> None:
    keys, offsets, weights = np.arange(6), np.array([0, 2, 2, 6]), np.linspace(0.5, 2, 6, dtype=np.float32)
    for mode in ("sum", "mean", "sqrtn", "max"):
        got = client.lookup("m", {"user": keys, "item": [7]}, offsets={"user": offsets}, weights={"user": weights}, mode=mode)
        expected = server.lookup_pooled(keys, offsets, "m", "user", weights=weights, combiner=mode)
        np.testing.assert_array_equal(got["user"], expected, strict=True)
        assert got["item"].shape == (1, 8)
    both = {"user": keys, "item": keys}
    got = client.lookup("m", both, offsets=dict.fromkeys(both, offsets), mode={"user": "max", "item": "mean"})
    for table, mode in (("user", "max"), ("item", "mean")):
        expected = server.lookup_pooled(keys, offsets, "m", table, combiner=mode)
        np.testing.assert_array_equal(got[table], expected, strict=True)


def test_the_flat_protocol(server: HPS, client: Client) -> None:
    got = client.lookup_flat("m", [3, 1, 4], [2, 1])
    expected = np.concatenate([server.lookup([3, 1], "m", 0).ravel(), server.lookup([4], "m", 1).ravel()])
    np.testing.assert_array_equal(got, expected, strict=True)


def test_a_raw_request(client: Client, played: PlayedServer) -> None:
    answer = client.infer("m", {"user": [1]}, id="7", outputs=["user"])
    assert (answer.model, answer.version, answer.id, list(answer.outputs)) == ("m", "1", "7", ["user"])
    assert played.asked == ["POST /v2/models/m/infer"]


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda client: client.lookup("m", {"user": [1.5]}), KeyDtypeError, "user: expected integers"),
        (lambda client: client.lookup("m", {"user": [1]}, offsets={"user": [0.5]}), KeyDtypeError, "user.offsets"),
        (lambda client: client.lookup("m", {"user": [1]}, offsets={"item": [0, 1]}), ArrayError, "'item'"),
        (lambda client: client.lookup("m", {"user": [1]}, dtype=np.int8), ArrayError, "float32 or float16"),
        (lambda client: client.infer("m", {"user": ["a"]}), ArrayError, "user: expected a dtype"),
        (lambda client: client.lookup_flat("m", [1], [1.0]), KeyDtypeError, "num_keys"),
    ],
)
def test_what_is_wrong_is_not_sent(
    client: Client, played: PlayedServer, ask: Callable[[Client], Any], error: type[HpsError], match: str
) -> None:
    with pytest.raises(error, match=match):
        ask(client)
    assert played.asked == []


def test_the_server_and_its_models(client: Client, played: PlayedServer) -> None:
    played.script = [(200, {}, b'{"name": "x"}'), (200, {}, b"{}"), (200, {}, b'[{"name": "m", "state": "READY"}]')]
    assert client.metadata() == {"name": "x"} and client.metadata("a/b", version=2) == {}
    assert client.models() == [{"name": "m", "state": "READY"}]
    assert client.ready() and client.ready("m")
    client.load("m")
    client.unload("m")
    assert played.asked == [
        "GET /v2",
        "GET /v2/models/a%2Fb/versions/2",
        "POST /v2/repository/index",
        "GET /v2/health/ready",
        "GET /v2/models/m/ready",
        "POST /v2/repository/models/m/load",
        "POST /v2/repository/models/m/unload",
    ]
    played.script = [refused(503), refused(404)]
    assert not client.ready() and not client.ready("nobody")


def test_a_token_and_a_path_in_front(played: PlayedServer) -> None:
    with Client(f"{played.url}/hps/", token="secret-token", timeout=HANG_SECONDS) as client:
        client.metadata()
    assert played.asked == ["GET /hps/v2"] and played.headers[0]["Authorization"] == "Bearer secret-token"


# -- connections ---------------------------------------------------------------------


def test_connections_are_used_again(client: Client, played: PlayedServer) -> None:
    for _ in range(5):
        client.lookup("m", {"user": [1]})
    assert played.connections == 1


def test_threads_have_connections_of_their_own(client: Client, played: PlayedServer, server: HPS) -> None:
    wrong: list[Any] = []

    def work(seed: int) -> None:
        for _ in range(20):
            keys = np.random.default_rng(seed).integers(0, 20, 50)
            if not np.array_equal(client.lookup("m", {"user": keys})["user"], server.lookup(keys, "m", 0)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong and 1 <= played.connections <= 6 and len(played.asked) == 120


def test_a_closed_client_asks_nothing(played: PlayedServer) -> None:
    client = Client(played.url, timeout=HANG_SECONDS)
    client.lookup("m", {"user": [1]})
    client.close()
    client.close()
    with pytest.raises(ClosedError):
        client.lookup("m", {"user": [1]})
    assert len(played.asked) == 1


# -- errors and retries --------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "keys", ArrayError),
        (413, "too large", ArrayError),
        (401, "token", ConfigError),
        (403, "not allowed", ConfigError),
        (404, "model: none", UnknownModelError),
        (404, "version: expected 1", VersionError),
        (500, "internal", TierError),
    ],
)
def test_errors_have_types(client: Client, played: PlayedServer, status: int, message: str, error: type[HpsError]) -> None:
    played.script = [refused(status, message)]
    with pytest.raises(error, match=f"{message}.*HTTP {status}") as problem:
        client.lookup("m", {"user": [1]})
    assert type(problem.value) is error and len(played.asked) == 1


def test_an_error_of_a_proxy(client: Client, played: PlayedServer) -> None:
    played.script = [(502, {}, b"<html>bad\n gateway</html>")]
    with pytest.raises(TierUnavailable, match="<html>bad gateway</html>"):
        client.metadata()


def test_what_was_not_accepted_is_tried_again(client: Client, played: PlayedServer, server: HPS, pauses: list[float]) -> None:
    played.script = ["cut", refused(503), refused(429, **{"Retry-After": "2"})]
    got = client.lookup("m", {"user": [1]})["user"]
    np.testing.assert_array_equal(got, server.lookup([1], "m", 0), strict=True)
    assert len(played.asked) == 4 and len(pauses) == 3
    assert 0.025 <= pauses[0] <= 0.05 and 0.05 <= pauses[1] <= 0.1 and pauses[2] == 2.0


def test_tries_end(client: Client, played: PlayedServer, pauses: list[float]) -> None:
    for step, error in (("cut", TierUnavailable), (refused(429), CapacityError), (refused(503), TierUnavailable)):
        played.asked.clear()
        played.script = [step] * 4
        with pytest.raises(error):
            client.lookup("m", {"user": [1]})
        assert len(played.asked) == 4


def test_a_change_is_not_made_twice(client: Client, played: PlayedServer, pauses: list[float]) -> None:
    for step in ("cut", refused(503), refused(500)):
        played.asked.clear()
        played.script = [step]
        with pytest.raises(TierError):
            client.load("m")
        assert len(played.asked) == 1
    played.script = [refused(429)]
    client.load("m")
    assert pauses and played.asked[-2:] == ["POST /v2/repository/models/m/load"] * 2


def test_a_server_that_asks_for_more_time_than_there_is(played: PlayedServer) -> None:
    played.script = [refused(503, "later", **{"Retry-After": "100000"})]
    with Client(played.url, timeout=HANG_SECONDS) as client, pytest.raises(TierUnavailable, match="later"):
        client.metadata()


def test_a_server_that_cannot_be_reached(pauses: list[float]) -> None:
    with Client(f"http://127.0.0.1:{free_port()}", retries=2, timeout=HANG_SECONDS) as client:
        with pytest.raises(TierUnavailable, match="cannot be reached"):
            client.load("m")
        assert len(pauses) == 2 and not client.ready()


def test_an_answer_that_does_not_come(played: PlayedServer) -> None:
    done = threading.Event()

    def wait(handler: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        wait_until(done.is_set)
        return 200, {}, b"{}"

    played.script = [wait]
    began = time.monotonic()
    with Client(played.url, timeout=0.2) as client, pytest.raises(TierUnavailable, match=r"within 0.2 s"):
        client.metadata()
    assert time.monotonic() - began >= 0.2 and len(played.asked) <= 1  # none: a busy machine took so long to send it
    done.set()


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"no JSON"),
        (200, {}, b'{"outputs": 3}'),
        (200, {JSON_SIZE_HEADER: "x"}, b"{}"),
        (200, {JSON_SIZE_HEADER: "99"}, b"{}"),
    ],
)
def test_an_answer_of_something_else(client: Client, played: PlayedServer, answer: Any) -> None:
    played.script = [answer]
    with pytest.raises(TierError, match="expected an answer of the Open Inference Protocol"):
        client.lookup("m", {"user": [1]})


def test_an_answer_that_ends_early_is_tried_again(client: Client, played: PlayedServer, pauses: list[float]) -> None:
    def short(handler: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        handler.close_connection = True
        return 200, {"Content-Length": "1000"}, b"{"

    played.script = [short]
    assert client.lookup("m", {"user": [1]})["user"].shape == (1, 4)
    assert len(played.asked) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"url": "ftp://x"},
        {"url": "http://"},
        {"url": "http://x:port"},
        {"url": "http://x?y"},
        {"url": "http://user:word@x"},
        {"timeout": 0},
        {"retries": -1},
        {"token": "two words"},
        {"token": ""},
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Client(**{"url": "http://127.0.0.1:1", **options})
