"""A small server of the Open Inference Protocol over HTTP, in a thread: answers with rows that are a function of their keys.

What it can do wrong is on purpose: wait, refuse, cut connections, answer with other bytes.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from support.oracles import rows_of
from support.waiting import HANG_SECONDS

__all__ = ["DIM", "Behaviour", "InferenceServer", "inference_server"]

DIM = 4


@dataclass
class Behaviour:
    """What the server does.

    Attributes:
        seconds: that each answer takes; requests are answered side by side.
        statuses: answered in turn instead of 200.
        cut_every: closes the connection instead of every n-th answer.
        close_after: answers with Connection: close.
        silent: never answers requests.
        extra: bytes more than the rows.
        good: answers before it is silent or adds those bytes.
    """

    tables: tuple[str, ...] = ("user", "item")
    models: tuple[str, ...] = ("wdl",)
    named: bool = True
    seconds: float = 0.0
    statuses: tuple[int, ...] = (200,)
    cut_every: int = 0
    close_after: bool = False
    silent: bool = False
    extra: int = 0
    good: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


class InferenceServer:
    """Answers on a port of loopback.   Thread safety: ``behaviour`` is read for each request."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.port = 0
        self.answered = 0
        self.connections = 0

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self.port}"

    def keys_asked(self) -> dict[str, np.ndarray]:
        """Input -> all values of the requests so far."""
        found: dict[str, list[np.ndarray]] = {}
        for request in list(self.behaviour.seen):
            for name, array in request.items():
                found.setdefault(name, []).append(array.reshape(-1))
        return {name: np.concatenate(arrays) for name, arrays in found.items()}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            return  # a task that is cancelled would be reported by asyncio
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines) if name}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        how, path = self.behaviour, line.split()[1]
        if not path.endswith("/infer"):
            writer.write(response(*self._page(path)))
            await writer.drain()
            return True
        how.headers.append(headers)
        if how.silent and self.answered >= how.good:
            await asyncio.sleep(HANG_SECONDS)
        if how.seconds:
            await asyncio.sleep(how.seconds)
        self.answered += 1
        if how.cut_every and self.answered % how.cut_every == 0:
            return False
        status = how.statuses[self.answered % len(how.statuses)]
        if status != 200:
            writer.write(response(status, b'{"error": "refused on purpose"}'))
        else:
            writer.write(self._infer(headers, body, "Connection: close\r\n" if how.close_after else ""))
        await writer.drain()
        return not how.close_after

    def _page(self, path: str) -> tuple[int, bytes]:
        how = self.behaviour
        if path == "/v2/repository/index":
            return 200, json.dumps([{"name": name, "state": "READY"} for name in how.models]).encode()
        if path == "/metrics":
            series = f'hps_lookup_keys_total{{table="user"}} {self.answered}\nother_total 5\nhps_age_seconds 3\n'
            return 200, series.encode()
        if path.startswith("/v2/health"):
            return 200, b""
        if path.rstrip("/") == "/v2":
            return 200, b'{"name": "test", "version": "1", "extensions": ["binary_tensor_data", "statistics"]}'
        parts = [*path.split("/"), "", ""]
        if parts[2] != "models" or parts[3] not in how.models:
            return 404, json.dumps({"error": f"no model {parts[3]!r}"}).encode()
        inputs = {"KEYS": "INT64", "NUMKEYS": "INT32"} | (dict.fromkeys(how.tables, "INT64") if how.named else {})
        if path.endswith("/config"):
            entries = [
                {"name": name, "data_type": f"TYPE_{kind}", "dims": [-1], "optional": True} for name, kind in inputs.items()
            ]
            return 200, json.dumps({"name": parts[3], "backend": "python", "max_batch_size": 0, "input": entries}).encode()
        if path.endswith("/stats"):
            return 200, json.dumps({"model_stats": [self._stats(parts[3])]}).encode()
        shown = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in inputs.items()]
        outputs = [{"name": name, "datatype": "FP32", "shape": [-1]} for name in ("OUTPUT0", *how.tables)]
        return 200, json.dumps(
            {"name": parts[3], "versions": ["1"], "platform": "test", "inputs": shown, "outputs": outputs}
        ).encode()

    def _stats(self, name: str) -> dict[str, Any]:
        spent = {"count": self.answered, "ns": self.answered * 1000}
        parts = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss")
        none = {"count": 0, "ns": 0}
        inference = {part: none if part in ("fail", "cache_hit", "cache_miss") else spent for part in parts}
        counts = {"inference_count": self.answered, "execution_count": self.answered, "last_inference": 0}
        return {"name": name, "version": "1", **counts, "inference_stats": inference, "batch_stats": []}

    def _infer(self, headers: dict[str, str], body: bytes, more: str) -> bytes:
        size = int(headers.get("inference-header-content-length", len(body)))
        request, at, arrays = json.loads(body[:size]), size, {}
        for one in request["inputs"]:
            kind = np.dtype(one["datatype"].lower())
            if "data" in one:
                values = np.array(one["data"], kind)
            else:
                count = one["parameters"]["binary_data_size"]
                values = np.frombuffer(body[at : at + count], kind)
                at += count
            arrays[one["name"]] = values.reshape(one["shape"])
        assert at == len(body)
        self.behaviour.seen.append(arrays)
        binary = size < len(body) or "inference-header-content-length" in headers
        return answer(
            arrays,
            request.get("parameters", {}),
            binary=binary,
            extra=self.behaviour.extra * (self.answered > self.behaviour.good),
            more=more,
        )


def answer(arrays: dict[str, np.ndarray], parameters: dict[str, Any], *, binary: bool, extra: int, more: str) -> bytes:
    """The response to a request of these inputs."""
    kind, datatype = (np.float16, "FP16") if parameters.get("output_dtype") == "FP16" else (np.float32, "FP32")
    rows = {"OUTPUT0": arrays["KEYS"]} if "KEYS" in arrays else arrays
    outputs, parts = [], []
    for name, keys in rows.items():
        values = rows_of(keys.reshape(-1), DIM).astype(kind)
        shape = [values.size] if name == "OUTPUT0" else [*keys.shape, DIM]
        entry = {"name": name, "datatype": datatype, "shape": shape}
        outputs.append(
            {**entry, "parameters": {"binary_data_size": values.nbytes}}
            if binary
            else {**entry, "data": values.reshape(-1).tolist()}
        )
        parts.append(values.tobytes() if binary else b"")
    head = json.dumps({"model_name": "wdl", "outputs": outputs}).encode()
    more += f"Inference-Header-Content-Length: {len(head)}\r\n" if binary else ""
    return response(200, head + b"".join(parts) + b"x" * extra, more)


def response(status: int, body: bytes, more: str = "") -> bytes:
    """An HTTP response."""
    return (
        f"HTTP/1.1 {status} Text\r\nContent-Type: application/json\r\n{more}content-length: {len(body)}\r\n\r\n".encode() + body
    )


@contextmanager
def inference_server(behaviour: Behaviour | None = None, port: int = 0) -> Iterator[InferenceServer]:
    """A server in a thread, while the block runs."""
    served, started = InferenceServer(behaviour or Behaviour()), threading.Event()
    loop, stopped = asyncio.new_event_loop(), asyncio.Event()

    async def work() -> None:
        server = await asyncio.start_server(served.serve, "127.0.0.1", port, limit=1 << 20)
        served.port = server.sockets[0].getsockname()[1]
        started.set()
        await stopped.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def run() -> None:
        loop.run_until_complete(work())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(HANG_SECONDS)
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(HANG_SECONDS)
