"""gRPC: who may ask, streams, control, shared memory, and clients that send nonsense, are slow, or are many."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.inference_endpoints import PlainGrpc, Refused, TritonGrpc
from support.redis_servers import authority, signed
from support.shared_memory import new_name
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba import HPS
from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.grpc_schema import SERVICE, schema
from hps_numba.frontends.open_inference.grpc_server import RunningGrpc, start_grpc
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.frontends.open_inference.options import Tls

grpc = pytest.importorskip("grpc")
pytest.importorskip("tritonclient.grpc")

TOKEN = "a-token-of-some-length"
KEYS = np.array([3, 1, 4])
Start = Callable[..., RunningGrpc]


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(workshop.model((range(20), 4), (range(20), 8), embedding_table_names=["user", "item"]))


@pytest.fixture
def start(server: HPS) -> Iterator[Start]:
    running: list[RunningGrpc] = []

    def begin(
        limits: Limits | None = None, access: Access | None = None, *, may_change: bool = False, **more: Any
    ) -> RunningGrpc:
        running.append(start_grpc(Repository(server, may_change=may_change), limits, access, **more))
        return running[-1]

    yield begin
    for one in running:
        one.stop(0.0)


@pytest.fixture
def call() -> Iterator[Callable[..., Any]]:
    """Calls a method with bytes; returns bytes."""
    channels: list[Any] = []

    def ask(running: RunningGrpc, method: str, data: bytes = b"", **more: Any) -> Any:
        channels.append(grpc.insecure_channel(f"127.0.0.1:{running.port}"))
        return channels[-1].unary_unary(f"/{SERVICE}/{method}")(data, timeout=HANG_SECONDS, **more)

    yield ask
    for channel in channels:
        channel.close()


def right(running: RunningGrpc, server: HPS, **more: Any) -> None:
    """The server answers a right request."""
    endpoint = TritonGrpc(f"127.0.0.1:{running.port}", **more)
    got = endpoint.ask({"user": KEYS}, model="m").outputs["user"]
    endpoint.close()
    np.testing.assert_array_equal(got, server.lookup(KEYS, "m", "user"), strict=True)


def right_at_last(running: RunningGrpc, server: HPS) -> None:
    """As ``right``, of a server with times so short that a busy machine may miss them."""

    def is_right() -> bool:
        try:
            right(running, server)
        except Refused as problem:
            assert problem.statuses & {408, 503}, problem
            return False
        return True

    wait_until(is_right)


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What this package logged as an error."""
    return [one for one in caplog.records if one.levelno >= logging.ERROR and one.name.startswith("hps_numba")]


# -- who may ask ---------------------------------------------------------------------


def test_a_token(start: Start, server: HPS) -> None:
    running = start(access=Access([TOKEN]))
    right(running, server, token=TOKEN)
    for token in ("", "another-token-of-some-length"):
        stranger = TritonGrpc(f"127.0.0.1:{running.port}", token=token)
        assert stranger.get("live") and stranger.get("ready")
        with pytest.raises(Refused) as problem:
            stranger.ask({"user": KEYS}, model="m")
        assert problem.value.statuses == {401}
        with pytest.raises(Refused) as problem:
            stranger.get("index")
        assert problem.value.statuses == {401}
        stranger.close()


def test_a_token_for_streams(start: Start) -> None:
    running = start(access=Access([TOKEN]))
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        with pytest.raises(grpc.RpcError) as problem:
            list(channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([b""]), timeout=HANG_SECONDS))
        assert problem.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_tls_and_certificates_of_clients(start: Start, server: HPS, tmp_path: Path) -> None:
    ca = authority(tmp_path)
    certificate, key = signed(tmp_path, "localhost", ca)
    mine = [path.read_bytes() for path in signed(tmp_path, "client", ca)]
    plain = start(tls=Tls(certificate, key))
    mutual = start(tls=Tls(certificate, key, client_ca=ca))

    def live(running: RunningGrpc, *pair: bytes) -> bool:
        told = grpc.ssl_channel_credentials(ca.read_bytes(), *pair)
        with grpc.secure_channel(f"localhost:{running.port}", told) as channel:
            data = channel.unary_unary(f"/{SERVICE}/ServerLive")(b"", timeout=HANG_SECONDS)
        return bool(schema().ServerLiveResponse.FromString(data).live)

    assert live(plain) and live(mutual, mine[1], mine[0])
    with pytest.raises(grpc.RpcError) as problem:
        live(mutual)
    assert problem.value.code() is grpc.StatusCode.UNAVAILABLE
    (tmp_path / "empty").write_bytes(b"")
    for tls in (Tls(tmp_path / "empty", key), Tls(tmp_path / "missing", key)):
        with pytest.raises(ConfigError):
            start(tls=tls)


def test_an_address_that_is_taken(start: Start) -> None:
    running = start()
    with pytest.raises(ConfigError, match=str(running.port)):
        start(port=running.port)


def test_several_servers_of_a_port(start: Start, server: HPS) -> None:
    first = start(shared_port=True)
    second = start(shared_port=True, port=first.port)
    assert first.port == second.port
    first.stop(0.0)
    right(second, server)


# -- models --------------------------------------------------------------------------


def test_models_are_loaded_only_where_that_is_allowed(start: Start, server: HPS) -> None:
    endpoint = TritonGrpc(f"127.0.0.1:{start().port}")
    for method in ("load_model", "unload_model"):
        with pytest.raises(Refused, match="--allow-control") as problem:
            endpoint._call(method, "m")
        assert problem.value.statuses == {403}
    endpoint.close()
    endpoint = TritonGrpc(f"127.0.0.1:{start(may_change=True).port}")
    endpoint._call("load_model", "m")
    assert server.model_version("m") == 2
    endpoint._call("unload_model", "m")
    assert [one.get("state") for one in endpoint.get("index")] == ["UNAVAILABLE"] and server.models == ()
    endpoint._call("load_model", "m")
    assert endpoint.get("model_ready", "m")
    for name in ("../m", "nobody"):
        with pytest.raises(Refused) as problem:
            endpoint._call("load_model", name)
        assert problem.value.statuses == {404}
    with pytest.raises(Refused, match="parameters: expected none"):
        endpoint._call("load_model", "m", config='{"backend": "python"}')
    endpoint.close()


# -- streams -------------------------------------------------------------------------


def test_a_stream_answers_each_request(start: Start, server: HPS) -> None:
    running = start()
    good = schema().ModelInferRequest(model_name="m", id="1", raw_input_contents=[KEYS.tobytes()])
    good.inputs.add(name="item", datatype="INT64", shape=[3])
    bad = schema().ModelInferRequest(model_name="nobody")
    data = [one.SerializeToString() for one in (good, bad, good)]
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        told = list(channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([*data, b"\xff"]), timeout=HANG_SECONDS))
    first, refused, second, broken = map(schema().ModelStreamInferResponse.FromString, told)
    assert first == second and first.infer_response.id == "1" and not first.error_message
    rows = np.frombuffer(first.infer_response.raw_output_contents[0], np.float32).reshape(3, 8)
    np.testing.assert_array_equal(rows, server.lookup(KEYS, "m", "item"), strict=True)
    assert "nobody" in refused.error_message and not refused.HasField("infer_response")
    assert "message" in broken.error_message


# -- nonsense ------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\x7f", b"\x3a", b"\x0a\x01\xff", b"\x0b", b"\x3a" + b"\xff" * 11, b"\x0a\x80"])
def test_bytes_that_are_no_message(start: Start, server: HPS, call: Callable[..., Any], data: bytes) -> None:
    running = start()
    with pytest.raises(grpc.RpcError, match="message") as problem:
        call(running, "ModelInfer", data)
    assert problem.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    right(running, server)


def test_random_bytes(start: Start, server: HPS, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged requests are answered or refused, never with a fault of the server."""
    running = start()
    request = schema().ModelInferRequest(model_name="m", raw_input_contents=[KEYS.tobytes()])
    request.inputs.add(name="user", datatype="INT64", shape=[3])
    data, random = request.SerializeToString(), np.random.default_rng(5)
    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(400):
            damaged = bytearray(data)
            for at in random.integers(0, len(data), random.integers(1, 4)):
                damaged[at] = random.integers(256)
            try:
                infer(bytes(damaged[: random.integers(1, len(data) + 1)]), timeout=HANG_SECONDS)
            except grpc.RpcError as problem:
                codes.add(problem.code().name)
                assert "Traceback" not in problem.details()
    assert "INVALID_ARGUMENT" in codes and codes <= {"INVALID_ARGUMENT", "NOT_FOUND"}
    assert not errors(caplog)
    right(running, server)


def test_a_method_that_is_not_there(start: Start, call: Callable[..., Any]) -> None:
    with pytest.raises(grpc.RpcError) as problem:
        call(start(), "CudaSharedMemoryStatus")
    assert problem.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_fault_tells_nothing_of_itself(
    start: Start, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    running = start()
    monkeypatch.setattr(TableSetModel, "infer", fail)
    request = schema().ModelInferRequest(model_name="m", raw_input_contents=[b""])
    request.inputs.add(name="user", datatype="INT64", shape=[0])
    with pytest.raises(grpc.RpcError) as problem:
        call(running, "ModelInfer", request.SerializeToString())
    assert problem.value.code() is grpc.StatusCode.INTERNAL and "secret" not in problem.value.details()
    (logged,) = errors(caplog)
    assert logged.exc_info and logged.exc_info[0] is ZeroDivisionError


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({"max_keys": 10}, "at most 10 elements"),
        ({"max_answer_bytes": 100}, "at most 100 bytes"),
        ({"max_held_bytes": 100}, "at most 100 bytes under way"),
        ({"max_json_bytes": 16}, "send tensors as bytes"),
        ({"max_body_bytes": 64}, "larger than max"),
    ],
)
def test_limits(start: Start, limits: dict[str, int], match: str) -> None:
    running = start(Limits(**limits))
    endpoint = TritonGrpc(f"127.0.0.1:{running.port}")
    for _ in range(3):  # nothing stays held
        with pytest.raises(Refused, match=match) as problem:
            endpoint.ask({"user": np.arange(20)}, model="m")
        assert 413 in problem.value.statuses
    endpoint.close()


def test_a_request_of_too_many_fields(start: Start, call: Callable[..., Any]) -> None:
    with pytest.raises(grpc.RpcError, match="at most 65536") as problem:
        call(start(), "ModelInfer", b"\x32\x00" * 70_000)
    assert problem.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# -- time ----------------------------------------------------------------------------


def test_a_request_that_does_not_arrive(start: Start, server: HPS) -> None:
    running = start(Limits(read_seconds=0.2, keep_alive_seconds=0.2))
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield b""

    def is_late(call: Any) -> bool:
        with pytest.raises(grpc.RpcError) as problem:
            list(call(nothing(), timeout=HANG_SECONDS))
        if problem.value.code() is grpc.StatusCode.UNAVAILABLE:
            return False  # the connection itself was not made in time
        assert problem.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "within 0.2 s" in problem.value.details()
        return True

    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        for method in ("ModelInfer", "ModelStreamInfer"):
            call = channel.stream_stream(f"/{SERVICE}/{method}")
            wait_until(partial(is_late, call))
        never.set()
    right_at_last(running, server)


def test_an_answer_that_is_not_read(start: Start, server: HPS, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as held, and its connection ends some time, which frees it."""
    monkeypatch.setattr("hps_numba.frontends.open_inference.grpc_server._AGE", 0.2)
    request = schema().ModelInferRequest(model_name="m", raw_input_contents=[bytes(8 * 400_000)])
    request.inputs.add(name="item", datatype="INT64", shape=[400_000])
    options = [("grpc.http2.lookahead_bytes", 65_535), ("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
    seconds = (0.1 * 2**number for number in itertools.count())  # a busy machine needs more to take and answer the request

    def is_freed() -> bool:
        admission, short = Admission(Limits()), next(seconds)
        running = start(Limits(write_seconds=0.3, read_seconds=short, request_seconds=short), admission=admission)
        with grpc.insecure_channel(f"127.0.0.1:{running.port}", options) as channel:
            asked = channel.stream_stream(f"/{SERVICE}/ModelInfer")(iter([request.SerializeToString()]), timeout=HANG_SECONDS)
            wait_until(lambda: admission.held_bytes >= 400_000 * 8 * 4 or asked.done())
            was_held = admission.held_bytes > 0
            wait_until(lambda: not admission.held_bytes)
            with pytest.raises(grpc.RpcError) as problem:
                next(asked)
        code = problem.value.code()
        assert code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.DEADLINE_EXCEEDED and not was_held)
        right_at_last(running, server)
        return was_held and "expected" not in problem.value.details()  # else it was late itself

    wait_until(is_freed)


def test_a_request_that_takes_too_long(start: Start, server: HPS, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start(Limits(request_seconds=0.2))
    go_on, infer = threading.Event(), TableSetModel.infer

    def slow(model: TableSetModel, request: Any) -> Any:
        go_on.wait()
        return infer(model, request)

    monkeypatch.setattr(TableSetModel, "infer", slow)
    monkeypatch.setattr(TableSetModel, "may_wait", lambda *_: True)
    endpoint = TritonGrpc(f"127.0.0.1:{running.port}")
    with pytest.raises(Refused, match=r"within 0.2 s") as problem:
        endpoint.ask({"user": KEYS}, model="m")
    assert problem.value.statuses == {503}
    go_on.set()
    endpoint.close()
    right_at_last(running, server)


def test_a_call_that_its_client_ends_holds_nothing(start: Start, server: HPS, monkeypatch: pytest.MonkeyPatch) -> None:
    admission, begun, go_on, infer = Admission(Limits()), threading.Event(), threading.Event(), TableSetModel.infer
    running = start(admission=admission)

    def slow(model: TableSetModel, request: Any) -> Any:
        begun.set()
        go_on.wait()
        return infer(model, request)

    monkeypatch.setattr(TableSetModel, "infer", slow)
    monkeypatch.setattr(TableSetModel, "may_wait", lambda *_: True)
    request = schema().ModelInferRequest(model_name="m", raw_input_contents=[KEYS.tobytes()])
    request.inputs.add(name="item", datatype="INT64", shape=[3])
    with grpc.insecure_channel(f"127.0.0.1:{running.port}") as channel:
        asked = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(request.SerializeToString(), timeout=HANG_SECONDS)
        wait_until(begun.is_set)
        assert admission.held_bytes >= 3 * 8 * 4
        asked.cancel()
        wait_until(lambda: not admission.held_bytes)
    go_on.set()
    right(running, server)
    wait_until(lambda: not admission.held_bytes)


def test_the_end_waits_for_what_was_taken(start: Start, server: HPS, monkeypatch: pytest.MonkeyPatch) -> None:
    running = start()
    begun, go_on, infer = threading.Event(), threading.Event(), TableSetModel.infer

    def slow(model: TableSetModel, request: Any) -> Any:
        begun.set()
        go_on.wait()
        return infer(model, request)

    monkeypatch.setattr(TableSetModel, "infer", slow)
    monkeypatch.setattr(TableSetModel, "may_wait", lambda *_: True)
    endpoint = TritonGrpc(f"127.0.0.1:{running.port}")
    got: list[Any] = []
    asking = threading.Thread(target=lambda: got.append(endpoint.ask({"user": KEYS}, model="m").outputs["user"]))
    asking.start()
    wait_until(begun.is_set)
    running.drain()
    assert endpoint.get("live") and not endpoint.get("ready")
    ending = threading.Thread(target=running.stop, args=(HANG_SECONDS,))
    ending.start()
    go_on.set()
    join_all(asking, ending)
    np.testing.assert_array_equal(got[0], server.lookup(KEYS, "m", "user"), strict=True)
    with pytest.raises(Refused):
        endpoint.ask({"user": KEYS}, model="m")
    endpoint.close()


def test_many_clients_at_once(start: Start, server: HPS) -> None:
    running = start()
    wrong: list[int] = []

    def work(seed: int) -> None:
        endpoint = TritonGrpc(f"127.0.0.1:{running.port}")
        for count in range(40):
            keys = np.random.default_rng((seed, count)).integers(0, 25, 1 + count)
            if not np.array_equal(endpoint.ask({"item": keys}, model="m").outputs["item"], server.lookup(keys, "m", "item")):
                wrong.append(seed)
        endpoint.close()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert not wrong


# -- shared memory -------------------------------------------------------------------


@pytest.fixture
def segments() -> Iterator[Callable[[str, int], Any]]:
    """Makes segments, as clients of Triton do."""
    shared_memory = pytest.importorskip("tritonclient.utils.shared_memory")
    made: list[Any] = []

    def make(key: str, size: int) -> Any:
        made.append(shared_memory.create_shared_memory_region(key, key, size))
        return made[-1]

    yield make
    for one in made:
        shared_memory.destroy_shared_memory_region(one)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_tensors_in_shared_memory(start: Start, server: HPS, segments: Callable[[str, int], Any]) -> None:
    shared_memory = pytest.importorskip("tritonclient.utils.shared_memory")
    triton = pytest.importorskip("tritonclient.grpc")
    running = start(regions=SharedRegions(["hps_test_"]))
    keys_name, rows_name = new_name(), new_name()
    keys_at, rows_at = segments(keys_name, 4096), segments(rows_name, 4096)
    shared_memory.set_shared_memory_region(keys_at, [KEYS])
    with triton.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
        client.register_system_shared_memory("keys", keys_name, 4096)
        client.register_system_shared_memory("rows", rows_name, 4096)
        assert {one.name: one.byte_size for one in client.get_system_shared_memory_status().regions.values()} == {
            "keys": 4096,
            "rows": 4096,
        }
        keys = triton.InferInput("user", [3], "INT64")
        keys.set_shared_memory("keys", KEYS.nbytes)
        rows = triton.InferRequestedOutput("user")
        rows.set_shared_memory("rows", 1024, offset=64)
        also = triton.InferInput("item", [3], "INT64")
        also.set_data_from_numpy(KEYS)
        told = client.infer("m", [keys, also], outputs=[triton.InferRequestedOutput("item"), rows])
        expected = server.lookup(KEYS, "m", "user")
        got = shared_memory.get_contents_as_numpy(rows_at, np.float32, [3, 4], offset=64)
        np.testing.assert_array_equal(got, expected, strict=True)
        np.testing.assert_array_equal(told.as_numpy("item"), server.lookup(KEYS, "m", "item"), strict=True)
        rows.set_shared_memory("rows", 8)
        with pytest.raises(Exception, match="expected at least 48"):
            client.infer("m", [keys, also], outputs=[rows])
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions
        with pytest.raises(Exception, match="registered region"):
            client.infer("m", [keys])


def test_shared_memory_is_not_allowed_by_default(start: Start) -> None:
    endpoint = PlainGrpc(f"127.0.0.1:{start().port}")
    with pytest.raises(Refused, match="not allowed") as problem:
        endpoint._call("register_system_shared_memory", "keys", "/x", 8)
    assert problem.value.statuses == {403}
    assert "system_shared_memory" not in endpoint.get("metadata")["extensions"]
    endpoint.close()
