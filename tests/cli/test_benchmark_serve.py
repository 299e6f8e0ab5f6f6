"""``hps-numba benchmark serve``: requests are sent when they are due, and every one of them is accounted for."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inference_messages import grpc_server, message_class
from support.inference_server import DIM, Behaviour, inference_server
from support.inference_servers import serving
from support.oracles import rows_of
from support.servers import free_port
from support.waiting import HANG_SECONDS, wait_until
from typer.testing import CliRunner, Result

from hps_numba import write_model
from hps_numba.cli import build
from hps_numba.cli._serve_load import arrivals, clock, engine, outcomes, process_cpu, prometheus, protobuf
from hps_numba.cli._serve_load.connection import Access
from hps_numba.cli._serve_load.grpc import GrpcConnection
from hps_numba.cli._serve_load.targets import target_of
from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS

NEVER = ("--timeout", HANG_SECONDS)  # is a request given up
SHORT = ("--duration", 0.2, "--warmup", 0, *NEVER)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each measurement: it takes long in a process of many tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def run(*words: object) -> Result:
    return CliRunner().invoke(build(), ["benchmark", "serve", *map(str, words)])


def report(*words: object, code: int = 0) -> Any:
    result = run(*words, "--json", "-")
    assert result.exit_code == code, (result.output, result.stderr)
    return json.loads(result.stdout)


def refused(*words: object, code: int = 1) -> str:
    result = run(*words)
    assert result.exit_code == code and result.stdout == "", (result.output, result.stderr)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr.splitlines()[-1]


def check(line: dict[str, Any], server_bytes: int) -> None:
    """All is accounted for, and percentiles ascend.

    Rates are those of the time of the measurement, in which a machine that stops answers nothing.
    """
    assert line["requests"] == line["answered"] + sum(line["errors"].values()) > 0
    times = [line[f"{name}_seconds"] for name in ("p50", "p90", "p99", "p99.9", "max")]
    assert times[0] > 0 and times == sorted(times)
    assert line["client_cpu_seconds_per_request"] > 0
    assert line["bytes_per_second"] >= server_bytes * line["requests_per_second"]
    assert (line["bytes_per_second"] > 0) == (line["requests_per_second"] > 0)


# -- what is sent ---------------------------------------------------------------------


def test_named_requests_have_keys_of_the_distribution(tmp_path: Path) -> None:
    with inference_server() as server:
        words = ("--keys", 7, "--table-size", 500, "--distribution", "hotkey", "--distinct", 20, "--seed", 3)
        found = report(server.url, "--concurrency", 1, *SHORT, *words, "--header", "Authorization: Bearer abc")
    assert found["model"] == "wdl" and found["protocol"] == "named" and list(found["tables"]) == ["user", "item"]
    asked, headers = server.behaviour.seen, server.behaviour.headers
    assert all(one["authorization"] == "Bearer abc" for one in headers)
    for request in asked[1:21]:  # the first was the probe
        assert {name: keys.shape for name, keys in request.items()} == {"user": (4,), "item": (3,)}
    generator = np.random.default_rng([3, 0])
    first = [KEY_DISTRIBUTIONS["hotkey"](500, 4, rng=generator) for _ in range(20)]
    assert all(np.array_equal(request["user"], keys) for request, keys in zip(asked[1:21], first, strict=False))
    (line,) = found["results"]
    check(line, 7 * 4 * DIM)
    assert found["requests"][0]["answer_tensor_bytes"] == 7 * 4 * DIM
    assert line["metrics"] == {'hps_lookup_keys_total{table="user"}': line["requests"]}


def test_flat_requests_and_keys_of_a_config(tmp_path: Path) -> None:
    keys = {"user": np.array([-5, 2**40]), "item": np.array([7])}
    for name, some in keys.items():
        write_model(tmp_path / f"{name}.model", DIM, [(some, rows_of(some, DIM))])
    entry = {
        "model": "wdl",
        "sparse_files": ["user.model", "item.model"],
        "embedding_table_names": ["user", "item"],
        "embedding_vecsize_per_table": [DIM, DIM],
        "maxnum_catfeature_query_per_table_per_sample": [3, 1],
        "default_value_for_each_table": [0.0, 0.0],
        "deployed_device_list": [],
    }
    (tmp_path / "ps.json").write_text(json.dumps({"supportlonglong": True, "models": [entry]}))
    with inference_server(Behaviour(named=False)) as server:
        words = ("--keys", "5,2", "--config", tmp_path / "ps.json", "--rate", 100, "--arrivals", "constant")
        found = report(server.url, *words, *SHORT)
    assert found["protocol"] == "flat" and [line["keys"] for line in found["results"]] == [5, 2]
    for request in server.behaviour.seen:
        assert request["NUMKEYS"].dtype == np.int32 and request["NUMKEYS"].tolist() in ([3, 2], [1, 1])
        user = request["KEYS"][: request["NUMKEYS"][0]]
        assert set(user) <= {-5, 2**40} and set(request["KEYS"][len(user) :]) == {7}
    assert [line["requests"] for line in found["results"]] == [20, 20]
    with inference_server(Behaviour(named=False)) as server:
        assert "named after tables" in refused(server.url, "--protocol", "named", *SHORT)


@pytest.mark.parametrize("encoding", ["binary", "json"])
def test_tables_dtypes_and_encodings(encoding: str) -> None:
    with inference_server() as server:
        words = ("--table", "item", "--output-dtype", "fp16", "--encoding", encoding, "--concurrency", 2)
        found = report(server.url, *words, *SHORT)
        assert "one of user, item, got 'x'" in refused(server.url, "--table", "x", *SHORT)
    assert list(server.keys_asked()) == ["item"]
    (facts,) = found["requests"]
    assert facts["outputs"] == {"item": {"datatype": "FP16", "shape": [32, DIM]}}
    assert facts["answer_tensor_bytes"] == (None if encoding == "json" else 32 * DIM * 2)
    check(found["results"][0], 0)


# -- how it is sent ---------------------------------------------------------------------


def test_an_open_loop_counts_from_when_requests_were_due() -> None:
    """A server that answers one at a time in 20 ms, asked 200 times a second: the queue is in the latency."""
    with inference_server(Behaviour(seconds=0.02)) as server:
        words = (
            "--connections",
            1,
            "--rate",
            200,
            "--arrivals",
            "constant",
            "--duration",
            0.5,
            "--warmup",
            0,
            *NEVER,
        )
        (line,) = report(server.url, *words)["results"]
        assert line["requests"] == 100 == line["answered"]
        assert line["max_seconds"] > 100 * 0.02 - 0.5  # the last was due at 0.5 s and was behind all others
        assert line["requests_per_second"] <= 50.1 and line["most_busy"] == 1 and line["most_waiting"] > 50
        assert line["lag_p99_seconds"] > 1.0
        (line,) = report(server.url, "--concurrency", 1, "--duration", 0.5, "--warmup", 0, *NEVER)["results"]
        assert line["p50_seconds"] < 0.1 or line["requests"] < 10, "a closed loop does not see the queue"
    assert server.connections >= 2


def test_a_closed_loop_sends_on_each_connection_however_short_it_is() -> None:
    async def ask(url: str) -> list[str]:
        target = target_of(url, Access(timeout=HANG_SECONDS))
        connections = engine.Connections(target, None, HANG_SECONDS)
        await connections.open(2)
        wire = target.wire("wdl", {"user": np.arange(3)}, {})
        found, _, _ = await engine.closed_loop(connections, [wire], -1.0)  # as if the machine had stopped meanwhile
        connections.close()
        await target.close()
        return found.status

    with inference_server() as server:
        assert clock.run(ask(server.url)) == [outcomes.OK] * 2


def test_due_times_are_those_of_the_process() -> None:
    rng = np.random.default_rng(1)
    even = arrivals.due_times("constant", 50, 2.0, rng)
    np.testing.assert_allclose(even, np.arange(100) / 50)
    times = arrivals.due_times("poisson", 5000, 20.0, rng)
    assert np.all(np.diff(times) >= 0) and times[0] >= 0 and times[-1] < 20
    assert len(times) == pytest.approx(100_000, rel=0.02)
    gaps = np.diff(times)  # exponential: mean = standard deviation, and a share of 1/e is above the mean
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03) and (gaps > gaps.mean()).mean() == pytest.approx(
        np.exp(-1), abs=0.01
    )


def test_shares_of_what_closed_loops_reach() -> None:
    def is_half() -> bool:
        result = run(server.url, "--concurrency", "2", "--rate", "50%", *SHORT, "--json", "-")
        if result.exit_code:  # nothing was answered in 0.2 s, as the machine stopped
            assert (
                "expected answers in a closed loop" in result.stderr or not json.loads(result.stdout)["results"][1]["answered"]
            )
            return False
        closed, half = json.loads(result.stdout)["results"]
        assert closed["loop"] == "closed" and half["rate"] == pytest.approx(closed["requests_per_second"] / 2)
        return True

    with inference_server() as server:
        wait_until(is_half)
    assert "of which % takes a share" in refused(server.url, "--rate", "50%", code=2)


def test_timers_are_exact_to_less_than_a_millisecond() -> None:
    async def late() -> float:
        loop = asyncio.get_running_loop()
        due = loop.time() + 0.0003
        woke: asyncio.Future[float] = loop.create_future()
        loop.call_at(due, lambda: woke.set_result(loop.time()))
        return await woke - due

    def is_exact() -> bool:
        lateness = clock.run(late())
        assert lateness >= 0
        return lateness < 0.0005  # epoll alone would wait for a whole millisecond, each time

    wait_until(is_exact)


# -- what goes wrong ---------------------------------------------------------------------


def test_errors_are_counted_by_status() -> None:
    with inference_server(Behaviour(statuses=(200, 429, 503))) as server:
        server.answered = 2  # the next request, which asks for the shape of answers, is answered well
        (line,) = report(server.url, "--rate", 300, *SHORT)["results"]
    assert set(line["errors"]) == {"429", "503"} and line["requests"] == line["answered"] + sum(line["errors"].values())
    assert line["answered"] == pytest.approx(line["requests"] / 3, abs=1)


def test_cut_connections_are_opened_again() -> None:
    with inference_server(Behaviour(cut_every=5)) as server:
        lines = report(server.url, "--concurrency", 2, "--rate", 200, "--connections", 2, *SHORT)["results"]
    for line in lines:  # in a closed loop the number of requests is that which a machine can
        lost = line["errors"].get("connection lost", 0)
        assert line["answered"] + lost == line["requests"] and abs(lost - line["requests"] / 5) <= 1
    assert lost >= 1
    with inference_server(Behaviour(close_after=True)) as server:
        (line,) = report(server.url, "--rate", 100, "--duration", 0.3, "--warmup", 0, *NEVER)["results"]
    assert line["answered"] == line["requests"] and not line["errors"]


def test_answers_of_another_size_are_errors() -> None:
    with inference_server(Behaviour(extra=3, good=4)) as server:
        (line,) = report(server.url, "--rate", 100, *SHORT)["results"]
    assert line["answered"] == 3 and line["errors"] == {"answer of another size": line["requests"] - 3}


def test_a_server_that_stops_answering() -> None:
    words = ("--rate", 100, "--duration", 0.3, "--warmup", 0, "--timeout", 0.5, "--connections", 3, "--json", "-")

    def is_told() -> bool:
        with inference_server(Behaviour(silent=True, good=5)) as server:
            result = run(server.url, *words)
        if not result.stdout:
            return False  # the machine stopped for longer than the time-out before anything was measured
        (line,) = json.loads(result.stdout)["results"]
        assert line["answered"] <= 4 and line["errors"] == {"no answer": line["requests"] - line["answered"]}
        assert result.exit_code == (0 if line["answered"] else 1)
        return bool(line["answered"])

    wait_until(is_told)


def test_the_exit_code_says_that_nothing_was_answered() -> None:
    with inference_server(Behaviour(statuses=(200, *[429] * 10_000))) as server:
        server.answered = 10_000
        (line,) = report(server.url, "--rate", 50, *SHORT, code=1)["results"]
    assert line["answered"] == 0 and line["p50_seconds"] is None and line["errors"] == {"429": line["requests"]}


def test_what_cannot_be_measured_is_an_error(tmp_path: Path) -> None:
    with inference_server(Behaviour(models=("a", "b"))) as server:
        assert "--model: expected one of the models of the server, a, b" in refused(server.url, *SHORT)
        assert "no model 'c'" in refused(server.url, "--model", "c", *SHORT)
        assert "--concurrency: " in refused(server.url, "--concurrency", "0", code=2).replace(
            "'--concurrency'", "--concurrency"
        )
        assert "expected requests a second" in refused(server.url, "--rate", "nan", code=2)
        assert "--header" in refused(server.url, "--header", "bad", code=2)
        assert "either --config or --table-size" in refused(
            server.url, "--config", tmp_path / "ps.json", "--table-size", 5, code=2
        )
        assert "https://" in refused(server.url, "--ca", tmp_path)
    with inference_server(Behaviour(statuses=(413,))) as server:
        assert "status 413: refused on purpose" in refused(server.url, *SHORT)
    assert "cannot connect" in refused(f"http://127.0.0.1:{free_port()}", "--timeout", 1, *SHORT)
    for url in ("127.0.0.1:80", "ftp://a", "http://", "http://a:0", "http://a:99999", "http://a b", "http://me:secret@a"):
        message = refused(url)
        assert "URL: expected http://HOST:PORT" in message and "secret" not in message


def test_other_servers_are_told_apart() -> None:
    """One that speaks something else."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        found = refused(f"http://127.0.0.1:{listening.getsockname()[1]}", "--model", "m", *SHORT)
        thread.join()
    assert "expected an HTTP answer, got: an answer that is not HTTP/1.1" in found


# -- gRPC ---------------------------------------------------------------------


def test_grpc() -> None:
    pytest.importorskip("grpc")
    pytest.importorskip("google.protobuf")
    behaviour = Behaviour()
    with grpc_server(behaviour) as url:
        words = ("--keys", 6, "--output-dtype", "FP16", "--concurrency", 3, "--rate", 50, "--header", "X-Token: abc")
        closed, opened = report(url, *words, *SHORT)["results"]
        for line in (closed, opened):
            check(line, 0)
            assert not line["errors"] and line["metrics"] == {}
        behaviour.statuses = (429,)
        assert "ModelInfer: RESOURCE_EXHAUSTED: refused on purpose" in refused(url, *SHORT)
        assert "NOT_FOUND" in refused(url, "--model", "x", *SHORT)
    assert {name: keys.shape for name, keys in behaviour.seen[0].items()} == {"user": (3,), "item": (3,)}
    assert all(one["x-token"] == "abc" for one in behaviour.headers[:5])


def test_a_call_that_is_cut_before_it_begins_is_accounted_for() -> None:
    class Target:
        async def call(self, method: Any, wire: bytes) -> bytes:
            raise AssertionError("it was to be cut before")

    async def cut() -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []
        connection = GrpcConnection(Target(), None, None)  # type: ignore[arg-type]
        connection.send(b"", lambda *told: found.append(told))
        connection.abort()
        while not found:
            await asyncio.sleep(0)
        return [told[1:] for told in found]

    assert clock.run(cut()) == [("connection lost", 0)]


def test_messages_are_those_of_protobuf() -> None:
    pytest.importorskip("google.protobuf")
    tensors = {"a": np.arange(-300, 300), "b": np.zeros((1, 3), np.int32), "c": np.empty(0, np.int64)}
    parameters = {"yes": True, "no": False, "number": -7, "share": 0.25, "text": "mean"}
    wire = protobuf.request_of("wdl", tensors, parameters)
    request = message_class("ModelInferRequest").FromString(wire)
    assert request.model_name == "wdl" and [one.key for one in request.parameters] == list(parameters)
    values = [getattr(one.value, one.value.WhichOneof("choice")) for one in request.parameters]
    assert values == list(parameters.values()) and [type(value) for value in values] == [bool, bool, int, float, str]
    for tensor, raw, (name, array) in zip(request.inputs, request.raw_input_contents, tensors.items(), strict=True):
        assert (tensor.name, tuple(tensor.shape), tensor.datatype) == (name, array.shape, array.dtype.name.upper())
        np.testing.assert_array_equal(np.frombuffer(raw, array.dtype).reshape(array.shape), array)
    answer = message_class("ModelInferResponse")(model_name="wdl", raw_output_contents=[b"abc", b"", b"x" * 300])
    answer.outputs.add(name="out", datatype="FP32", shape=[2, -1, 2**40])
    probe = protobuf.answer_of(answer.SerializeToString())
    assert probe.outputs == {"out": ("FP32", (2, -1, 2**40))} and probe.tensor_bytes == 303
    facts = message_class("ModelMetadataResponse")(name="wdl", platform="p")
    facts.inputs.add(name="KEYS", datatype="INT64", shape=[-1, -1])
    assert protobuf.facts_of(facts.SerializeToString()).inputs["KEYS"].shape == (-1, -1)
    for end in range(1, len(wire)):
        cut = wire[:end]
        try:
            protobuf.tensor_bytes(cut)
        except ValueError as problem:
            assert "cut off" in str(problem)


# -- hps-numba serve ---------------------------------------------------------------------


def test_our_own_server(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    keys = np.arange(50)
    write_model(tmp_path / "t.model", DIM, [(keys, rows_of(keys, DIM))])
    entry = {
        "model": "wdl",
        "sparse_files": ["t.model", "t.model"],
        "embedding_table_names": ["user", "item"],
        "embedding_vecsize_per_table": [DIM, DIM],
        "maxnum_catfeature_query_per_table_per_sample": [1, 1],
        "default_value_for_each_table": [0.0, 0.0],
        "deployed_device_list": [],
    }
    config = tmp_path / "ps.json"
    config.write_text(json.dumps({"supportlonglong": True, "models": [entry]}))
    with serving(config, *(["--grpc-port", "0"] if find_spec("grpc") else [])) as server:
        for scheme, address in server.urls.items():
            url = f"{scheme}://{address}"
            for form in ("flat", "named"):
                words = (
                    "--protocol",
                    form,
                    "--keys",
                    9,
                    "--table-size",
                    100,
                    "--distribution",
                    "uniform",
                    "--pid",
                    server.process.pid,
                )
                closed, opened = report(url, *words, "--concurrency", 2, "--rate", 40, *SHORT)["results"]
                for line in (closed, opened):
                    check(line, 9 * 4 * DIM)
                    assert not line["errors"] and line["server_cpu_seconds_per_request"] is not None
                if scheme == "http":
                    shares = prometheus.answered_from([closed["metrics"], opened["metrics"]])
                    assert set(shares) == {"wdl/user", "wdl/item"}
                    for table in shares.values():  # half of the keys exist
                        assert table["host_memory"] + table["no tier"] == pytest.approx(1) and 0.2 < table["host_memory"] < 0.8
        assert set(server.urls) == ({"http", "grpc"} if find_spec("grpc") else {"http"})


# -- the report ---------------------------------------------------------------------


def test_percentiles_are_measured_latencies() -> None:
    found = outcomes.Outcomes()
    for number in range(1000):
        found.add(float(number), number + 0.5, number + 1.0 + number / 1000, "ok", 10)
    found.add(5.0, 5.0, 6.0, "503", 0)
    summary = found.summary(0.0, 500.0)
    assert summary["requests"] == 1001 and summary["answered"] == 1000 and summary["errors"] == {"503": 1}
    assert (summary["p50_seconds"], summary["p99_seconds"]) == (pytest.approx(1.499), pytest.approx(1.989))
    assert summary["max_seconds"] == pytest.approx(1.999) and summary["lag_p99_seconds"] == 0.5
    assert summary["requests_per_second"] == pytest.approx(499 / 500) and summary["bytes_per_second"] == pytest.approx(
        4990 / 500
    )


def test_series_that_have_grown() -> None:
    before = 'hps_a_total{x="1 2"} 3\nhps_gauge 5\n# TYPE hps_a_total counter\nother_total 1\nhps_bad_total x\n'
    after = 'hps_a_total{x="1 2"} 10 1700000000\nhps_gauge 9\nhps_b_seconds_count 4\nother_total 2\n'
    assert prometheus.gained(before, after) == {'hps_a_total{x="1 2"}': 7.0, "hps_b_seconds_count": 4.0}
    assert prometheus.gained(None, after) == {}


def test_people_read_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with inference_server() as server:
        words = ("--concurrency", 1, "--rate", 100, *SHORT, "--plot", tmp_path / "p.svg", "--json", tmp_path / "r.json")
        result = run(server.url, *words, "--pid", os.getpid())
    assert result.exit_code == 0, result.output
    assert "1 conn" in result.stdout and "100/s" in result.stdout and "p99.9" in result.stdout
    found = json.loads((tmp_path / "r.json").read_text())
    assert [line["loop"] for line in found["results"]] == ["closed", "open"] and b"<svg" in (tmp_path / "p.svg").read_bytes()[
        :500
    ]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_cpu_time_of_a_process_and_its_children() -> None:
    spin = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(flush=True); input()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        spent = process_cpu.tree_cpu_seconds(process.pid)
        process.stdin.write(b"\n")
        process.stdin.close()
    assert spent is not None and spent >= 0.28
    assert process_cpu.tree_cpu_seconds(2**30) is None
