"""Open Inference Protocol over gRPC: prepared bytes through grpcio, without generated classes."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from hps_numba.cli._serve_load import protobuf
from hps_numba.cli._serve_load.connection import Access, Done, ModelFacts, Probe
from hps_numba.cli._serve_load.http import ServeError
from hps_numba.cli._serve_load.outcomes import OK
from hps_numba.errors import ConfigError

__all__ = ["GrpcTarget"]

_SERVICE = "/inference.GRPCInferenceService/"
_CHANNELS = 4  # connections share them, as HTTP/2 carries many calls
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcTarget:
    """A server at ``grpc://`` or ``grpcs://``."""

    def __init__(self, url: str, access: Access) -> None:
        try:
            grpc = importlib.import_module("grpc")
            importlib.import_module("grpc.aio")
        except ImportError as problem:
            raise ConfigError(f"{url}: needs grpcio: pip install grpcio") from problem
        self._grpc, self._access, self.url = grpc, access, url
        parts = urlsplit(url)
        self._secure = parts.scheme == "grpcs"
        self._address = f"{parts.hostname}:{parts.port or (443 if self._secure else 8001)}"
        self._metadata = tuple((name.lower(), value) for name, value in access.headers.items())
        self._channels: list[Any] = []
        self._opened = 0

    async def models(self) -> Sequence[str]:
        """Names of the models in the repository index."""
        return protobuf.names_of(await self._call("RepositoryIndex", b""))

    async def facts(self, model: str) -> ModelFacts:
        """Metadata of a model."""
        found = protobuf.facts_of(await self._call("ModelMetadata", protobuf.named_message(model)))
        return ModelFacts(model, found.platform, found.inputs)

    def wire(self, model: str, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bytes:
        """A request with raw contents."""
        return protobuf.request_of(model, tensors, parameters)

    async def probe(self, wire: bytes) -> Probe:
        """Send a request, and read the shapes of its answer."""
        return protobuf.answer_of(await self._call("ModelInfer", wire))

    async def text(self, path: str) -> str | None:
        """None: there are no pages here."""
        del path
        return None

    async def connect(self, expected: int | None) -> GrpcConnection:
        """A place for one call at a time on one of a few channels."""
        return GrpcConnection(self, self._method("ModelInfer"), expected)

    async def close(self) -> None:
        """Close the channels."""
        channels, self._channels = self._channels, []
        for channel in channels:
            await channel.close()

    def call(self, method: Any, wire: bytes) -> Any:
        """Start a call."""
        return method(wire, timeout=self._access.timeout, metadata=self._metadata)

    def status_of(self, problem: BaseException) -> str:
        """The name of the status of a failed call."""
        if isinstance(problem, self._grpc.RpcError):
            return str(problem.code().name)
        return type(problem).__name__

    def _method(self, name: str) -> Any:
        if len(self._channels) < _CHANNELS:
            self._channels.append(self._channel())
        self._opened += 1
        return self._channels[self._opened % len(self._channels)].unary_unary(_SERVICE + name)

    def _channel(self) -> Any:
        if not self._secure:
            return self._grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        ca = None if self._access.ca is None else self._access.ca.read_bytes()
        return self._grpc.aio.secure_channel(self._address, self._grpc.ssl_channel_credentials(ca), options=_OPTIONS)

    async def _call(self, name: str, wire: bytes) -> bytes:
        try:
            answer: bytes = await self.call(self._method(name), wire)
        except self._grpc.RpcError as problem:
            what = f"{self.url}: {name}: {problem.code().name}: {problem.details()}"
            raise ServeError(what) from problem
        return answer


class GrpcConnection:
    """Carries one call at a time."""

    def __init__(self, target: GrpcTarget, method: Any, expected: int | None) -> None:
        self.alive, self.slot = True, None
        self._target, self._method, self._expected = target, method, expected
        self._task: asyncio.Task[tuple[str, int]] | None = None

    def send(self, wire: bytes, done: Done) -> None:
        """Send a prepared request."""

        def report(task: asyncio.Task[tuple[str, int]]) -> None:  # also of a task that is cancelled before it begins
            done(self, *(("connection lost", 0) if task.cancelled() else task.result()))

        self._task = asyncio.get_running_loop().create_task(self._exchange(wire))
        self._task.add_done_callback(report)

    def abort(self) -> None:
        """Cancel the call under way."""
        self.alive = False
        if self._task is not None:
            self._task.cancel()

    async def _exchange(self, wire: bytes) -> tuple[str, int]:
        try:
            answer = await self._target.call(self._method, wire)
        except Exception as problem:
            return self._target.status_of(problem), 0
        wrong = self._expected is not None and protobuf.tensor_bytes(answer) != self._expected
        return "answer of another size" if wrong else OK, len(answer)
