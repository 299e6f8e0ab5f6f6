"""The application asked in process: every endpoint, both forms of tensors, what is refused, and what is held and freed."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.asgi import Reply, ask, ask_all
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, wait_until

from hps_numba import HPS
from hps_numba.errors import TierUnavailable
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, TensorSpec
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.app import InferenceApp
from hps_numba.frontends.open_inference.codec import decode_response, encode_request
from hps_numba.frontends.open_inference.heads import AnswerForm
from hps_numba.frontends.open_inference.limits import Limits

KEYS = np.array([3, 1, 4, 99])
TOKEN = "a-token-of-some-length"


class Slow(InferenceModel):
    """Answers when it is told to."""

    name, platform = "slow", "test"
    inputs = outputs = (TensorSpec("x", "INT64", (-1,)),)

    def __init__(self) -> None:
        self.go = threading.Event()
        self.at_work = 0
        self.problem: Exception | None = None

    def versions(self) -> tuple[str, ...]:
        return ("7",)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        self.at_work += 1
        assert self.go.wait(HANG_SECONDS)
        if self.problem is not None:
            raise self.problem
        return InferenceResponse(self.name, "7", request.inputs, request.id)


class Rig:
    """An application of a server with two tables, and a slow model."""

    def __init__(
        self, server: HPS, limits: Limits | None = None, tokens: tuple[str, ...] = (), may_change: bool = False
    ) -> None:
        self.server, self.slow = server, Slow()
        self.repository = Repository(server, may_change=may_change)
        self.repository.add(self.slow)
        self.app = InferenceApp(self.repository, limits or Limits(request_seconds=HANG_SECONDS), Access(tokens))

    def __call__(self, method: str, path: str, body: Any = b"", **more: Any) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        (reply,) = ask_all(self.app, {"method": method, "path": path, "body": data, **more})
        assert reply is not None
        assert self.app.admission.held_bytes == 0, "what was held is freed"
        return reply

    def infer(self, inputs: dict[str, Any], *, binary: bool = True, path: str = "/v2/models/m/infer", **more: Any) -> Reply:
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        body = encode_request(InferenceRequest("m", arrays, **more), AnswerForm(binary), binary=binary)
        headers = {} if body.json_size is None else {"Inference-Header-Content-Length": str(body.json_size)}
        return self("POST", path, b"".join(body.parts), headers=headers)

    def close(self) -> None:
        self.slow.go.set()
        self.app.close()


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(workshop.model((range(20), 4), (range(20), 8), embedding_table_names=["user", "item"]))


@pytest.fixture
def rig(server: HPS) -> Iterator[Rig]:
    made = Rig(server)
    yield made
    made.close()


@pytest.fixture
def rigs(server: HPS) -> Iterator[Any]:
    """Makes rigs with limits and tokens."""
    made: list[Rig] = []

    def make(limits: Limits | None = None, **more: Any) -> Rig:
        made.append(Rig(server, limits, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


def decoded(reply: Reply) -> InferenceResponse:
    assert reply.status == 200, reply.body
    size = reply.headers.get("inference-header-content-length")
    return decode_response(reply.body, None if size is None else int(size))


# -- inference ------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
def test_rows_are_exact(rig: Rig, server: HPS, binary: bool) -> None:
    reply = rig.infer({"user": KEYS, "item": KEYS.reshape(2, 2)}, binary=binary, id="5")
    answer = decoded(reply)
    assert (answer.model, answer.version, answer.id) == ("m", "1", "5")
    assert_same_bits(answer.outputs["user"], server.lookup(KEYS, "m", "user"))
    assert_same_bits(answer.outputs["item"], server.lookup(KEYS.reshape(2, 2), "m", "item"))
    assert reply.headers["content-type"] == ("application/octet-stream" if binary else "application/json")


def test_flat_requests(rig: Rig) -> None:
    answer = decoded(rig.infer({"KEYS": [[1, 2]], "NUMKEYS": np.array([[1, 1]], np.int32)}))
    assert_same_bits(answer.outputs["OUTPUT0"], np.concatenate([rows_of([1], 4).ravel(), rows_of([2], 8).ravel()])[None])
    assert answer.parameters == {"NumSample": 2, "DeviceID": -1}


def test_large_answers_go_in_parts(rig: Rig, server: HPS) -> None:
    keys = np.arange(20_000) % 25
    assert_same_bits(decoded(rig.infer({"item": keys})).outputs["item"], server.lookup(keys, "m", "item"))


def test_a_version_is_asked_for(rig: Rig) -> None:
    assert decoded(rig.infer({"user": KEYS}, path="/v2/models/m/versions/1/infer")).version == "1"
    reply = rig.infer({"user": KEYS}, path="/v2/models/m/versions/2/infer")
    assert (reply.status, reply.error) == (404, "version: expected 1, which model 'm' has, got 2")


def test_bodies_in_chunks(rig: Rig) -> None:
    text = b'{"inputs":[{"name":"user","datatype":"INT64","shape":[1],"data":[3]}]}'
    reply = rig("POST", "/v2/models/m/infer", chunks=[text[:5], text[5:20], b"", text[20:]])
    assert_same_bits(decoded(reply).outputs["user"], rows_of([3], 4))


def test_names_in_paths_may_be_encoded(rig: Rig) -> None:
    other = Slow()
    other.name = "ä b/c"
    rig.repository.add(other)
    assert rig("GET", "/v2/models/%C3%A4%20b%2Fc").json()["name"] == "ä b/c"


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "match"),
    [
        ("/v2/models/none/infer", b"{}", {}, 404, "'none' is not served, served are slow, m"),
        ("/v2/models/m/infer", b"{", {}, 400, "body: expected JSON"),
        ("/v2/models/m/infer", b'{"inputs":[]}', {}, 400, "inputs: expected KEYS and NUMKEYS, or tables"),
        ("/v2/models/m/infer", b"{}", {"Content-Encoding": "gzip"}, 415, "expected identity, got 'gzip'"),
        ("/v2/models/m/infer", b"{}", {"Content-Length": "x"}, 400, "Content-Length: expected a number"),
        ("/v2/models/m/infer", b"{}", {"Inference-Header-Content-Length": "-1"}, 400, "expected a number of bytes, got '-1'"),
        ("/v2/models/m/infer", b"{}", {"Inference-Header-Content-Length": "9"}, 400, "expected 1 to 2, the bytes of the body"),
        ("/v2/models/m/versions/x/infer", b'{"inputs":[]}', {}, 404, "version: expected the number of a version, got 'x'"),
    ],
)
def test_wrong_requests(rig: Rig, path: str, body: bytes, headers: dict[str, str], status: int, match: str) -> None:
    reply = rig("POST", path, body, headers=headers)
    assert reply.status == status and match in reply.error


def test_a_client_that_is_gone_gets_nothing(rig: Rig) -> None:
    assert ask_all(rig.app, {"method": "POST", "path": "/v2/models/m/infer", "chunks": [b"{"], "cut": True}) == [None]
    assert rig.app.admission.held_bytes == 0
    assert 'model="m",status="499"' in rig.server.metrics_text()


# -- threads, time-outs, failures -----------------------------------------------------

SLOW = {"method": "POST", "path": "/v2/models/slow/infer"}
ONE = b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[3]}]}'


def test_small_requests_are_answered_while_threads_are_busy(rig: Rig) -> None:
    async def both() -> tuple[Reply | None, Reply | None]:
        slow = asyncio.create_task(ask(rig.app, **SLOW, body=ONE))
        while not rig.slow.at_work:
            await asyncio.sleep(0.001)
        quick = await ask(rig.app, "GET", "/v2/models/m/ready")
        rig.slow.go.set()
        return quick, await slow

    quick, slow = asyncio.run(both())
    assert quick is not None and quick.status == 200
    assert slow is not None and decoded(slow).outputs["x"].tolist() == [3]


@pytest.mark.parametrize(
    "form", [AnswerForm(True), AnswerForm(False, {"user": True}), AnswerForm(True, {"user": True}), AnswerForm(False)]
)
def test_small_requests_need_no_thread(rig: Rig, form: AnswerForm, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []
    monkeypatch.setattr(rig.app._threads._threads, "submit", used.append)
    n = 32 if form == AnswerForm(False) else 2000
    body = encode_request(InferenceRequest("m", {"user": np.zeros(n, np.int64)}), form)
    headers = {"Inference-Header-Content-Length": str(body.json_size)}
    assert decoded(rig("POST", "/v2/models/m/infer", b"".join(body.parts), headers=headers)).outputs["user"].shape == (n, 4)
    assert used == []


def test_more_requests_than_may_wait_are_refused(rigs: Any) -> None:
    rig = rigs(Limits(max_concurrent=1, max_queue=2))

    async def ten() -> list[Reply | None]:
        tasks = [asyncio.create_task(ask(rig.app, **SLOW, body=ONE)) for _ in range(10)]
        while sum(task.done() for task in tasks) < 7:
            await asyncio.sleep(0.001)
        rig.slow.go.set()
        return list(await asyncio.gather(*tasks))

    replies = [reply for reply in asyncio.run(ten()) if reply is not None]
    assert sorted(reply.status for reply in replies) == [200] * 3 + [429] * 7
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.error == "server: 2 requests wait already, try again in a while" and refused.headers["retry-after"] == "1"
    wait_until(lambda: rig.app.admission.requests == 0)
    assert 'hps_queued_requests{frontend="open_inference",protocol="http"} 0' in rig.server.metrics_text()


def test_a_request_that_takes_too_long(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs(Limits(request_seconds=0.05, max_concurrent=1))
    submit = rig.app._threads._threads.submit

    def submit_and_begin(work: Any) -> Any:
        """However slow threads start: the first request is at work before its time begins."""
        future = submit(work)
        wait_until(lambda: rig.slow.at_work)
        return future

    monkeypatch.setattr(rig.app._threads._threads, "submit", submit_and_begin)
    replies = ask_all(rig.app, {**SLOW, "body": ONE}, {**SLOW, "body": ONE})
    assert [reply is not None and (reply.status, reply.error) for reply in replies] == [
        (503, "server: expected an answer within 0.05 s, there is none yet")
    ] * 2
    assert rig.app.admission.requests == 1, "the one that has a thread keeps its place"
    rig.slow.go.set()
    wait_until(lambda: rig.app.admission.requests == 0)
    assert rig.slow.at_work == 1, "the other one never began"
    assert 'hps_queued_requests{frontend="open_inference",protocol="http"} 0' in rig.server.metrics_text()


@pytest.mark.parametrize(
    ("problem", "status", "match"),
    [(TierUnavailable("redis: down"), 503, "redis: down"), (RuntimeError("secret"), 500, "internal error: RuntimeError")],
)
def test_failures_are_told_without_a_traceback(
    rig: Rig, problem: Exception, status: int, match: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.slow.problem = problem
    rig.slow.go.set()
    with caplog.at_level(logging.ERROR):
        reply = rig(**SLOW, body=ONE)
    assert reply.status == status and match in reply.error
    assert b"secret" not in reply.body and b"Traceback" not in reply.body
    assert str(problem) in caplog.text


def test_bounds_of_bodies_keys_and_answers(rigs: Any) -> None:
    rig = rigs(Limits(max_body_bytes=400, max_json_bytes=300, max_keys=20, max_answer_bytes=600))
    assert rig.infer({"item": np.zeros(10, np.int64)}).status == 200
    for keys, binary, match in [
        (19, True, "whose answer"),
        (21, True, "21"),
        (6, False, "in JSON"),
        (40, True, "at most 400 bytes"),
    ]:
        reply = rig.infer({"item": np.zeros(keys, np.int64)}, binary=binary)
        assert reply.status == 413 and match in reply.error, reply.error
    assert "300 bytes of JSON" in rig("POST", "/v2/models/m/infer", b" " * 301).error
    for chunks in ([b" " * 200] * 2, [b" " * 200] * 3):
        assert rig("POST", "/v2/models/m/infer", chunks=chunks).status == 413
    assert rig("POST", "/v2/models/m/infer", chunks=[b" " * 301]).status == 413


def test_the_bound_of_what_is_under_way(rigs: Any) -> None:
    rig = rigs(Limits(max_held_bytes=300))
    assert rig.infer({"user": [1]}).status == 200
    assert rig.infer({"user": np.zeros(30, np.int64)}).status == 429
    assert rig("POST", "/v2/models/m/infer", b" " * 301).status == 429
    assert rig("POST", "/v2/models/m/infer", chunks=[b" " * 200] * 2).status == 429


# -- endpoints ------------------------------------------------------------------------


def test_health_and_readiness(rig: Rig) -> None:
    assert rig("GET", "/v2/health/live").json() == {"live": True}
    assert rig("GET", "/v2/health/ready").json() == {"ready": True}
    assert rig("HEAD", "/v2/health/ready").status == 200
    rig.app.drain()
    ready = rig("GET", "/v2/health/ready")
    assert (ready.status, ready.json(), ready.headers["connection"]) == (503, {"ready": False}, "close")
    assert rig("GET", "/v2/health/live").status == 200
    assert rig.infer({"user": KEYS}).status == 200, "what comes while it drains is answered"


def test_metadata(rig: Rig) -> None:
    server = rig("GET", "/v2").json()
    assert server["name"] == "hps_numba" and "binary_tensor_data" in server["extensions"]
    for path in ("/v2/models/m", "/v2/models/m/versions/1"):
        model = rig("GET", path).json()
        assert (model["name"], model["versions"], model["platform"]) == ("m", ["1"], "hps_numba_tables")
        assert {"name": "item", "datatype": "FP32", "shape": [-1, 8]} in model["outputs"]
    config = rig("GET", "/v2/models/m/config").json()
    assert {"name": "KEYS", "data_type": "TYPE_INT64", "dims": [-1], "optional": True} in config["input"]
    assert config["max_batch_size"] == 0
    assert rig("GET", "/v2/models/m/ready").json() == {"name": "m", "ready": True}


def test_statistics_and_metrics(rig: Rig) -> None:
    rig.infer({"user": KEYS})
    rig.infer({"user": [1.5]})
    (stats,) = rig("GET", "/v2/models/m/stats").json()["model_stats"]
    counts = {stats["inference_stats"][f"compute_{part}"]["count"] for part in ("input", "infer", "output")}
    assert counts == {stats["inference_count"]}, "Perf Analyzer ends if they differ"
    assert (stats["name"], stats["version"], stats["inference_count"]) == ("m", "1", 1)
    assert stats["inference_stats"]["success"]["count"] == 1 and stats["inference_stats"]["success"]["ns"] > 0
    assert stats["inference_stats"]["fail"]["count"] == 1
    assert [one["name"] for one in rig("GET", "/v2/models/stats").json()["model_stats"]] == ["slow", "m"]
    reply = rig("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'hps_requests_total{frontend="open_inference",protocol="http",model="m",status="200"} 1' in reply.body.decode()
    assert 'model="m",status="400"} 1' in reply.body.decode()
    reply = rig("GET", "/metrics", headers={"accept": "application/openmetrics-text"})
    assert reply.body.decode().endswith("# EOF\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/none", 404),
        ("GET", "/v2/health", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/m/none", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/m/versions/2", 404),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404),
        ("POST", "/v2/repository/none", 404),
        ("POST", "/v2/repository/models/m/none", 404),
        ("GET", "/v2/repository/index", 405),
        ("GET", "/v2/models/m/infer", 405),
        ("POST", "/v2", 405),
        ("DELETE", "/v2/models/m", 405),
        ("POST", "/metrics", 405),
    ],
)
def test_paths_and_methods_that_are_not_there(rig: Rig, method: str, path: str, status: int) -> None:
    reply = rig(method, path)
    assert reply.status == status and reply.error
    assert ("allow" in reply.headers) == (status == 405)


# -- control and access ---------------------------------------------------------------


def test_models_are_loaded_and_unloaded(rigs: Any, server: HPS) -> None:
    rig = rigs(may_change=True)
    assert rig("POST", "/v2/repository/models/m/unload", {"parameters": {"unload_dependents": True}}).status == 200
    assert rig.infer({"user": KEYS}).status == 404
    index = {one["name"]: one for one in rig("POST", "/v2/repository/index").json()}
    assert (index["m"]["state"], index["slow"]["state"]) == ("UNAVAILABLE", "READY")
    assert [one["name"] for one in rig("POST", "/v2/repository/index", {"ready": True}).json()] == ["slow"]
    assert rig("POST", "/v2/repository/models/m/load").status == 200
    assert rig.infer({"user": KEYS}).status == 200
    assert rig("POST", "/v2/repository/models/m/load").status == 200
    assert decoded(rig.infer({"user": KEYS})).version == "2"


def test_what_clients_may_not_do(rig: Rig, rigs: Any) -> None:
    refused = rig("POST", "/v2/repository/models/m/unload")
    assert refused.status == 403 and "--allow-control" in refused.error
    able = rigs(may_change=True)
    assert able("POST", "/v2/repository/models/m/unload", headers={"Origin": "http://evil.example"}).status == 403
    files = {"parameters": {"config": "{}", "file:1/model": "AAAA"}}
    assert able("POST", "/v2/repository/models/m/load", files).status == 400
    for name in ("none", "..%2Fm", "%2Fetc%2Fpasswd"):
        assert able("POST", f"/v2/repository/models/{name}/load").status == 404


def test_tokens(rigs: Any) -> None:
    rig = rigs(tokens=(TOKEN,), may_change=True)
    closed = ("GET /v2", "GET /metrics", "GET /v2/models/m", "POST /v2/models/m/infer", "POST /v2/repository/models/m/unload")
    for one in closed:
        reply = rig(*one.split())
        assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert rig(*one.split(), headers={"Authorization": "Bearer wrong"}).status == 401
    assert rig("GET", "/v2", headers={"Authorization": f"Bearer {TOKEN}"}).status == 200
    assert rig("GET", "/v2/health/ready").status == 200, "probes have no token"


def test_lifespan_and_other_scopes(rig: Rig) -> None:
    async def live() -> list[str]:
        messages, sent = ["lifespan.startup", "lifespan.shutdown"], []

        async def receive() -> dict[str, str]:
            return {"type": messages.pop(0)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message["type"])

        await rig.app({"type": "lifespan"}, receive, send)
        await rig.app({"type": "websocket"}, receive, send)
        return sent

    assert asyncio.run(live()) == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]
