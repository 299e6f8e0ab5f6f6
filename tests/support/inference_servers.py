"""``hps-numba serve`` in processes of its own, and small clients of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from support.processes import environment
from support.waiting import HANG_SECONDS

__all__ = ["Serving", "infer", "infer_bytes", "request_bytes", "serving"]


#: a busy machine makes neither server nor clients late, and nobody waits for the end; options of a test come after these
_OPTIONS = [f"--{what}-seconds={HANG_SECONDS}" for what in ("request", "read", "write")] + ["--drain-seconds=0"]


class Serving:
    """A server.

    Attributes:
        url: of HTTP.   port: of it.   pid: of the process that was started.
    """

    def __init__(self, config: Path, *options: str, **env: str) -> None:
        command = [sys.executable, "-m", "hps_numba", "serve", str(config), "--port", "0", *_OPTIONS, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**env)
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None and self.process.stderr is not None
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._errors.extend, args=(self.process.stderr,))
        self._reader.start()
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[1] if self.line.startswith("ready: ") else ""
        self.port = int(self.url.rpartition(":")[2] or 0)

    @property
    def urls(self) -> dict[str, str]:
        """``host:port`` by the scheme, http or grpc."""
        return dict(url.split("://") for url in self.line.removeprefix("ready: ").split())

    @property
    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return "".join(self._errors)

    def connect(self) -> http.client.HTTPConnection:
        """A connection that stays open."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG_SECONDS)

    def socket(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=HANG_SECONDS)

    def get(self, path: str) -> tuple[int, bytes]:
        """Ask once, by a connection of its own."""
        connection = self.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """Pids of the processes that it started."""
        found = []
        for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if b"spawn_main" in command:
                found.append(int(pid))
        return found

    def resident_bytes(self) -> int:
        """Memory of its process now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def end(self, which: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(which)
        code = self.process.wait(HANG_SECONDS)
        self._reader.join(HANG_SECONDS)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code


@contextmanager
def serving(config: Path, *options: str, **env: str) -> Iterator[Serving]:
    """A server that is ready, and ends without an error."""
    server = Serving(config, *options, **env)
    try:
        assert server.url, server.end(signal.SIGKILL) and server.errors
        yield server
    finally:
        code = server.end()
    assert code == 0 and "Traceback" not in server.errors, server.errors


def infer_bytes(name: str, keys: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request for rows of one table, all of it as bytes."""
    array = np.asarray(keys, np.int64)
    tensor = {"name": name, "datatype": "INT64", "shape": list(array.shape), "parameters": {"binary_data_size": array.nbytes}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def infer(connection: http.client.HTTPConnection, name: str, keys: Any, dim: int, model: str = "m") -> np.ndarray:
    """Rows of one table. Raises AssertionError for any other status than 200, with the body."""
    body, headers = infer_bytes(name, keys)
    connection.request("POST", f"/v2/models/{model}/infer", body, headers)
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    rows = np.frombuffer(content, np.float32, offset=int(answer.headers["Inference-Header-Content-Length"]))
    return rows.reshape(*np.shape(keys), dim)


def request_bytes(body: bytes, headers: dict[str, str], path: str = "/v2/models/m/infer") -> bytes:
    """A whole HTTP request."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *(f"{k}: {v}" for k, v in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
