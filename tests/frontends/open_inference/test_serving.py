"""``hps-numba serve`` as a process: rows, slow and hostile clients, many connections, TLS, tokens, and its end under load.

The long forms: ``HPS_NUMBA_FUZZED_BODIES=50000`` and ``HPS_NUMBA_CONNECTIONS=1000``.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.inference_servers import Serving, infer, infer_bytes, request_bytes, serving
from support.oracles import assert_same_bits, rows_of
from support.servers import program
from support.shared_memory import new_name
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import ConfigError
from hps_numba.frontends.open_inference.options import ServeOptions

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("httptools", reason="needs the extra serve")

BODIES = int(os.environ.get("HPS_NUMBA_FUZZED_BODIES", "500"))
CONNECTIONS = int(os.environ.get("HPS_NUMBA_CONNECTIONS", "200"))
DIM, ROWS = 32, 20_000
TOKEN = "a-token-of-some-length"
PROMPT = 0.5  # seconds in which a client sends a request on a connection that is idle, if the machine does not stop it
#: bytes that requests of the tests may leave behind: buffers that are kept, the heap of Python
KEPT = 256 << 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workshop = Workshop(tmp_path_factory.mktemp("serving"))
    model = workshop.model((range(ROWS), DIM), embedding_table_names=["user"])
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps({"supportlonglong": True, "models": [model]}))
    return path


@pytest.fixture(scope="module")
def server(config: Path) -> Iterator[Serving]:
    with serving(config, "--drain-seconds", "0") as made:
        yield made


@pytest.fixture(scope="module")
def impatient(config: Path) -> Iterator[Serving]:
    """A server with short times and small bounds; a client that a busy machine stops is late as any other, and asks again."""
    times = ("--read-seconds", "0.5", "--write-seconds", "0.5", "--max-connections", "20", "--drain-seconds", "0")
    with serving(config, *times) as made:
        yield made


def asked(server: Serving, path: str) -> tuple[int, bytes]:
    """Ask as long as it takes for an answer that is not about the client."""
    answers: list[tuple[int, bytes]] = []

    def is_answered() -> bool:
        try:
            answers.append(server.get(path))
        except (ConnectionError, http.client.HTTPException):
            return False
        return answers[-1][0] != 408

    wait_until(is_answered)
    return answers[-1]


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    data = b""
    try:
        while chunk := connection.recv(1 << 20):
            data += chunk
    except ConnectionError:
        return data
    return data


def test_rows_over_the_network(server: Serving) -> None:
    connection = server.connect()
    for n in (1, 32, 20_000):
        keys = np.arange(n) * 7 % ROWS
        assert_same_bits(infer(connection, "user", keys, DIM), rows_of(keys, DIM))
    connection.close()
    assert server.get("/v2/health/ready")[0] == 200
    assert b"hps_keys_total" in server.get("/metrics")[1]


def test_requests_in_one_go_are_answered_in_order(server: Serving) -> None:
    body, headers = infer_bytes("user", [1])
    with server.socket() as connection:
        connection.sendall(request_bytes(body, headers) * 20 + b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        data = read_all(connection)
    assert data.count(b"HTTP/1.1 200 OK") == 21 and data.rstrip().endswith(b"}")


# -- slow and hostile clients ---------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"POST /v2/models/m/infer HT", b"408"),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\n", b"408"),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"408"),
        (b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", b"408"),
        (b"POST /v2/models/none/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", b"404"),
    ],
)
def test_clients_that_stop_sending(impatient: Serving, sent: bytes, answered: bytes) -> None:
    def is_answered() -> bool:
        with impatient.socket() as connection:
            with suppress(ConnectionError):
                connection.sendall(sent)
            data = read_all(connection)
        status = data.split(b" ")[1] if data else b""
        assert status in (answered, b"", b"408") and b"Traceback" not in data
        return status == answered  # another one if it was late before that

    wait_until(is_answered)


def test_a_client_that_sends_a_byte_now_and_then(impatient: Serving) -> None:
    """Slow loris: what counts is when the request began, not when the last byte came."""
    with impatient.socket() as connection:
        began = time.monotonic()
        connection.sendall(b"GET /v2 HTTP/1.1\r\n")
        connection.settimeout(0.05)
        data = b""
        while not data:
            assert time.monotonic() - began < HANG_SECONDS
            try:
                connection.sendall(b"a")
                data = connection.recv(1000)
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert not data or b" 408 " in data


def test_a_client_that_does_not_read(impatient: Serving) -> None:
    body, headers = infer_bytes("user", np.zeros(100_000, np.int64))
    in_flight = b'hps_requests_in_flight{frontend="open_inference",protocol="http"} 0'

    def is_cut() -> bool:
        with impatient.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            try:
                connection.sendall(request_bytes(body, headers))
            except ConnectionError:
                return False  # it was late already
            wait_until(lambda: in_flight in asked(impatient, "/metrics")[1])
            wait_until(lambda: len(open_sockets(impatient)) == 0)
            data = read_all(connection)
        assert len(data) < 100_000 * DIM * 4
        return b" 408 " not in data[:100]

    wait_until(is_cut)
    assert asked(impatient, "/v2/health/live")[0] == 200


def open_sockets(server: Serving) -> list[str]:
    """Connections of the server that are established."""
    suffix = f":{server.port:04X}"
    lines = Path(f"/proc/{server.pid}/net/tcp").read_text().splitlines()[1:]
    return [line for line in lines if line.split()[1].endswith(suffix) and line.split()[3] == "01"]


@pytest.mark.parametrize("piece", [b"a", b"a: b\r\n"])
def test_headers_without_end(server: Serving, piece: bytes) -> None:
    with server.socket() as connection:
        try:
            connection.sendall(b"GET /v2 HTTP/1.1\r\n" + piece * 100_000)
        except ConnectionError:
            return
        data = read_all(connection)
    assert data == b"" or b" 431 " in data.split(b"\r\n")[0]


def test_more_connections_than_allowed(impatient: Serving) -> None:
    def is_refused() -> bool:
        wait_until(lambda: not open_sockets(impatient))
        open_ = [impatient.socket() for _ in range(21)]
        last = read_all(open_[-1])
        for connection in open_:
            connection.close()
        assert not last or (b"503 Service Unavailable" in last and b"20 connections are open already" in last)
        return bool(last)  # else the first ones were late before the last was there

    wait_until(is_refused)
    wait_until(lambda: asked(impatient, "/v2/health/live")[0] == 200)


def test_a_length_that_is_too_large_is_refused_before_the_body(server: Serving) -> None:
    with server.socket() as connection:
        connection.sendall(b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in connection.recv(1000)


def mutated(rng: random.Random, request: bytes) -> bytes:
    """A request with some bytes changed, cut out, doubled, or replaced by what is dangerous somewhere."""
    data = bytearray(request)
    dangerous = [
        b"-1",
        b"99999999999999999999",
        b"null",
        b"[" * 50,
        b"\x00",
        b"\xff\xfe",
        b"NaN",
        b'"',
        b"}",
        b"\r\n\r\n",
        b"1e999",
    ]
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(data) + 1)
        what = rng.randrange(4)
        if what == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif what == 1:
            del data[at : at + rng.randrange(1, 30)]
        elif what == 2:
            data[at:at] = data[at : at + rng.randrange(1, 30)]
        else:
            data[at:at] = rng.choice(dangerous)
    return bytes(data)


def fuzzed(rng: random.Random) -> bytes:
    keys = [rng.randrange(ROWS) for _ in range(rng.randrange(4))]
    if rng.random() < 0.5:
        body, headers = infer_bytes("user", keys)
    else:
        tensors = [{"name": "user", "datatype": "INT64", "shape": [len(keys)], "data": keys}]
        tensors.append({"name": "user.offsets", "datatype": "INT64", "shape": [2], "data": [0, len(keys)]})
        body, headers = json.dumps({"id": "1", "inputs": tensors, "outputs": [{"name": "user"}]}).encode(), {}
    if rng.random() < 0.8:  # the body alone: HTTP stays right
        return request_bytes(mutated(rng, body), headers)
    return mutated(rng, request_bytes(body, headers))


def test_fuzzed_requests(server: Serving) -> None:
    """Every answer has a status and no traceback; the server lives, and does not grow."""
    rng = random.Random(7)
    server.get("/metrics")
    before = server.resident_bytes()
    statuses: dict[bytes, int] = {}
    for _ in range(BODIES):
        with server.socket() as connection:
            connection.sendall(fuzzed(rng))
            with suppress(OSError):  # the server has closed it already
                connection.shutdown(socket.SHUT_WR)
            data = read_all(connection)
        status = data.split(b" ")[1] if data else b"none"
        statuses[status] = statuses.get(status, 0) + 1
        assert b"Traceback" not in data and status not in (b"500", b"503"), data
    assert statuses.get(b"400", 0) > BODIES // 4, statuses
    assert server.resident_bytes() - before < KEPT
    assert "Traceback" not in server.errors
    connection = server.connect()
    assert_same_bits(infer(connection, "user", [5], DIM), rows_of([5], DIM))
    connection.close()


def test_many_connections(server: Serving) -> None:
    connections = [server.connect() for _ in range(CONNECTIONS)]
    before = server.resident_bytes()
    for round_ in range(2):
        for number, connection in enumerate(connections):
            keys = np.arange(number, number + 100) * (round_ + 1) % ROWS
            assert_same_bits(infer(connection, "user", keys, DIM), rows_of(keys, DIM))
    assert len(open_sockets(server)) >= CONNECTIONS
    assert server.resident_bytes() - before < KEPT
    for connection in connections:
        connection.close()


def test_connections_that_are_cut(server: Serving) -> None:
    body, headers = infer_bytes("user", np.zeros(50_000, np.int64))
    request = request_bytes(body, headers)
    for at in np.linspace(1, len(request), 40, dtype=int):
        connection = server.socket()
        connection.sendall(request[:at])
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
        connection.close()
    wait_until(lambda: b'hps_requests_in_flight{frontend="open_inference",protocol="http"} 0' in server.get("/metrics")[1])
    assert "Traceback" not in server.errors


# -- security -------------------------------------------------------------------------


def certificate(folder: Path, name: str, ca: str | None = None) -> tuple[Path, Path]:
    """A certificate for loopback, signed by itself or by another."""
    openssl = program("openssl", "openssl")
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    signed = [] if ca is None else ["-CA", folder / f"{ca}.pem", "-CAkey", folder / f"{ca}.key"]
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *signed]
    command += ["-keyout", key, "-out", cert, "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_tls_asks_for_certificates_of_clients(config: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "server")
    ca, _ = certificate(tmp_path, "clients")
    mine, my_key = certificate(tmp_path, "client", "clients")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--client-ca", str(ca), "--drain-seconds", "0")
    with serving(config, *options, HPS_NUMBA_TOKEN=TOKEN) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
            tls_get(server, context)
        context.load_cert_chain(mine, my_key)
        assert tls_get(server, context) == 401
        assert tls_get(server, context, Authorization=f"Bearer {TOKEN}") == 200
        assert "warning" not in server.errors


def tls_get(server: Serving, context: ssl.SSLContext, **headers: str) -> int:
    connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=HANG_SECONDS)
    try:
        connection.request("GET", "/v2", headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


# -- the end --------------------------------------------------------------------------


class Load:
    """Clients that ask one request after the other by connections that stay open, as long as the server wants them.

    A server that ends closes a connection on which nothing comes for a second: a request is lost if it is cut although it was
    sent sooner than that.
    """

    def __init__(self, server: Serving, clients: int, keys: int = 200) -> None:
        self._server, self._keys = server, keys
        self.answered = 0
        self.lost: list[str] = []
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        rng = np.random.default_rng(number)
        connection = self._server.connect()
        idle_since = 0.0
        while not self.stop.is_set():
            try:
                if connection.sock is None:
                    idle_since = time.monotonic()
                    connection.connect()
            except ConnectionError:  # the server accepts no more
                break
            self._ask(connection, rng.integers(0, ROWS, self._keys), idle_since)
            idle_since = time.monotonic()
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, keys: np.ndarray, idle_since: float) -> None:
        body, headers = infer_bytes("user", keys)
        sent = float("inf")
        try:
            connection.request("POST", "/v2/models/m/infer", body, headers)
            sent = time.monotonic()
            answer = connection.getresponse()
            content = answer.read()
        except (ConnectionError, http.client.HTTPException) as problem:
            connection.close()
            if min(sent, time.monotonic()) - idle_since < PROMPT:
                self._lose(f"{type(problem).__name__}: {problem}")
            return
        if answer.will_close:
            connection.close()
        rows = np.frombuffer(content, np.float32, offset=int(answer.headers["Inference-Header-Content-Length"] or 0))
        if answer.status != 200 or not np.array_equal(rows.reshape(-1, DIM), rows_of(keys, DIM)):
            self._lose(f"{answer.status} {content[:100]!r}")
        with self._lock:
            self.answered += 1

    def _lose(self, what: str) -> None:
        with self._lock:
            self.lost.append(what)

    def join(self) -> None:
        self.stop.set()
        join_all(*self._threads)


def test_sigterm_under_load_loses_no_request(config: Path) -> None:
    with serving(config, "--drain-seconds", "0.5") as server:
        load = Load(server, clients=4)
        wait_until(lambda: load.answered > 100)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(HANG_SECONDS) == 0
        load.join()
        assert load.lost == []


def test_ctrl_c_ends_it(config: Path) -> None:
    with serving(config, "--drain-seconds", "0.1") as server:
        assert server.get("/v2/health/ready")[0] == 200
        assert server.end(signal.SIGINT) == 0


@pytest.fixture
def shared(config: Path, tmp_path: Path) -> Iterator[Path]:
    name = new_name()
    section = {
        "type": "multi_process_hash_map",
        "shared_memory_name": name,
        "shared_memory_size": 64 << 20,
        "shared_memory_auto_remove": True,
    }
    path = tmp_path / "shared.json"
    path.write_text(json.dumps({**json.loads(config.read_text()), "volatile_db": section}))
    yield path
    Path("/dev/shm", name).unlink(missing_ok=True)


def test_a_worker_that_is_killed_under_load(shared: Path) -> None:
    """Requests of other workers are not affected; another worker takes its place; all end on SIGTERM."""
    clients = 6
    with serving(shared, "--workers", "2", "--allow-control", "--drain-seconds", "0.5") as server:
        assert "memory" not in server.errors
        before = server.workers()
        assert len(before) == 2
        load = Load(server, clients)
        wait_until(lambda: load.answered > 100)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(server.workers()) == 2 and before[0] not in server.workers())
        seen = load.answered
        wait_until(lambda: load.answered > seen + 100)
        assert len(load.lost) <= clients and not [one for one in load.lost if one[0].isdigit()]
        load.join()
        wait_until(lambda: workers_in_metrics(server) == {"0", "1"})
        assert server.get("/v2/health/ready")[0] == 200
        wait_until(lambda: "ended with exit code -9, another starts" in server.errors)
        assert server.errors.count("ended with exit code") == 1
        check_control(server)


def test_workers_end_if_their_parent_is_killed(shared: Path) -> None:
    server = Serving(shared, "--workers", "2", "--drain-seconds", "0")
    workers = server.workers()
    assert len(workers) == 2
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not any(map(is_running, workers)))


def is_running(pid: int) -> bool:
    """Whether a process is there that has not ended; nobody may ever ask for the exit code of one that has."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


def workers_in_metrics(server: Serving) -> set[str]:
    """Numbers of the workers whose lookups the metrics show."""
    return set(re.findall(r'^hps_lookups_total\{.*worker="(\d+)"\}', server.get("/metrics")[1].decode(), re.MULTILINE))


def check_control(server: Serving) -> None:
    """All workers load and unload."""
    assert post(server, "/v2/repository/models/m/unload") == (200, {})
    assert {server.get("/v2/models/m")[0] for _ in range(10)} == {404}
    assert post(server, "/v2/repository/models/m/unload")[0] == 404
    assert post(server, "/v2/repository/models/m/load") == (200, {})
    assert {server.get("/v2/models/m")[0] for _ in range(10)} == {200}
    status, answer = post(server, "/v2/repository/models/none/load")
    assert status == 404 and "expected one of the config (m), got 'none'" in answer["error"]


def post(server: Serving, path: str) -> tuple[int, Any]:
    connection = server.connect()
    try:
        connection.request("POST", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def test_workers_share_one_port_of_grpc(config: Path) -> None:
    with pytest.raises(ConfigError, match="grpc_port: expected the number of a port"):
        ServeOptions(config, grpc_port=0, workers=2)


def test_workers_that_cannot_start_say_why(config: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    content = json.loads(config.read_text())
    content["models"][0]["sparse_files"] = [str(tmp_path / "none.model")]
    broken.write_text(json.dumps(content))
    for workers in ("1", "2"):
        server = Serving(broken, "--workers", workers)
        assert server.end() == 1 and server.line == ""
        last = server.errors.splitlines()[-1]
        assert last.startswith("error: ") and "none.model" in last and "Traceback" not in server.errors
