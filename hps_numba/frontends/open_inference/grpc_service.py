"""The methods of the gRPC side: what each message asks, and what answers it.

Choice: every method takes a stream of messages, whatever the protocol calls it, as both are the same on the wire and only a
stream lets the server say when it reads: a request that does not arrive within ``read_seconds`` ends its call. An answer goes
out with its status in one piece (a stream of answers would cost a tenth more), and its memory is counted until the call has
ended, which is when its client has read it. All of it runs on one event loop, so that slow clients hold no thread. gRPC has no
way to reset a call whose client does not read: its connection ends by its age, see ``grpc_server``.

Turned down: the server of ``grpcio`` with threads, which takes a tenth less of a processor, but a thread for each client that
opens a call and sends nothing; servers over ``h2`` (grpclib, Hypercorn), which take twice to four times as much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from hps_numba.errors import VersionError
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError, message_of, status_of
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import RegionPart, SharedRegions
from hps_numba.frontends.inference.tensors import InferenceRequest
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.commands import LOAD, UNLOAD, Everywhere
from hps_numba.frontends.open_inference.grpc_schema import SERVICE, Method, schema
from hps_numba.frontends.open_inference.grpc_tensors import decode_request, encode_response, encode_stream_response, parse
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.frontends.open_inference.metadata import index_json, model_config, model_metadata, server_metadata
from hps_numba.frontends.open_inference.statistics import Statistics
from hps_numba.frontends.open_inference.threads import InferenceThreads
from hps_numba.metrics import RequestMetrics

__all__ = ["InferenceService", "code_of"]

log = logging.getLogger(__name__)

_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    409: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
}
_FREE = {"ServerLive", "ServerReady"}  # need no token, as /v2/health


def code_of(status: int) -> str:
    """The name of the code of gRPC that tells what a status of HTTP does."""
    return _CODES.get(status, "INTERNAL")


class InferenceService:
    """``inference.GRPCInferenceService`` of a repository of models.

    Args:
        repository: whose models are served; it stays the caller's.   limits: of this process.   access: who may ask.
        everywhere: carries out a command in all processes that serve; by default there is only this one.
        regions: shared memory that clients may name; by default none.
        admission, statistics: of another front end of the process, to count together with it.

    Attributes:
        draining: the server is about to end, and not ready.

    Thread safety: one event loop. ``draining`` may be set by any thread.
    """

    def __init__(
        self,
        repository: Repository,
        limits: Limits,
        access: Access,
        *,
        everywhere: Everywhere | None = None,
        regions: SharedRegions | None = None,
        admission: Admission | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.draining = False
        self._repository, self._limits, self._access = repository, limits, access
        self._everywhere = everywhere
        self._regions = regions or SharedRegions()
        self._admission = admission or Admission(limits)
        self._statistics = statistics or Statistics()
        self._requests = RequestMetrics("open_inference", "grpc")
        self._detach = self._requests.attach(repository.server)
        self._threads = InferenceThreads(limits, self._admission, self._requests, "hps-grpc")

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._detach()
        self._threads.close()

    def handlers(self) -> Any:
        """What answers the calls of a server of ``grpc.aio``."""
        import grpc  # type: ignore[import-untyped]

        found = {}
        for method in schema().methods:
            if method.streams:
                handler = grpc.stream_stream_rpc_method_handler(self._stream)
            else:
                answer = partial(self._call, method, getattr(self, f"_{method.name}"))
                handler = grpc.stream_unary_rpc_method_handler(answer)
            found[f"/{SERVICE}/{method.name}"] = handler

        class Handlers(grpc.GenericRpcHandler):
            def service(self, details: Any) -> Any:
                return found.get(details.method)

        return Handlers()

    # -- calls ------------------------------------------------------------------------

    async def _call(self, method: Method, answer: Callable[[Any, list[int]], Awaitable[bytes]], _: Any, context: Any) -> bytes:
        """The answer to the one request of a call."""
        held: list[int] = []
        context.add_done_callback(lambda _: self._admission.release(sum(held)))  # once the answer is sent, or never will be
        try:
            if method.name not in _FREE:
                self._check_access(context)
            data = await self._read(context, self._limits.read_seconds)
            if data is None:
                raise InferenceError(400, f"message: expected {method.request}, got none")
            return await answer(data, held)
        except Exception as one:
            problem = one
        await self._abort(context, problem, method.name)
        return b""

    async def _stream(self, _: Any, context: Any) -> None:
        """Answer requests one after the other; what is wrong with one is said in its place."""
        problem: Exception | None = None
        try:
            self._check_access(context)
            while (data := await self._read(context, self._limits.keep_alive_seconds)) is not None:
                await self._answer_in_stream(data, context)
        except Exception as one:
            problem = one
        if problem is not None:
            await self._abort(context, problem, "ModelStreamInfer")

    async def _answer_in_stream(self, data: bytes, context: Any) -> None:
        held: list[int] = []
        try:
            try:
                message = encode_stream_response(await self._ModelInfer(data, held))
            except Exception as problem:
                _log(problem, "ModelStreamInfer")
                message = encode_stream_response(None, message_of(problem))
            await context.write(message)
        finally:
            self._admission.release(sum(held))

    def _check_access(self, context: Any) -> None:
        if not self._access.restricted:
            return
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not self._access.allows(given.encode() if isinstance(given, str) else given):
            raise InferenceError(401, "authorization: expected Bearer and a token of this server")

    async def _read(self, context: Any, seconds: float) -> bytes | None:
        """The next message of the client; None: there is no more."""
        import grpc

        try:
            async with asyncio.timeout(seconds):
                data = await context.read()
        except TimeoutError:
            raise InferenceError(408, f"message: expected one within {seconds:g} s") from None
        return None if data is grpc.aio.EOF else data

    async def _abort(self, context: Any, problem: Exception, method: str) -> None:
        import grpc

        _log(problem, method)
        await context.abort(grpc.StatusCode[code_of(status_of(problem))], message_of(problem))

    # -- inference --------------------------------------------------------------------

    async def _ModelInfer(self, data: bytes, held: list[int]) -> bytes:
        began = time.perf_counter_ns()
        with self._requests.request() as counted:
            try:
                request, parts = decode_request(data, self._regions, partial(self._take, held))
                model = self._repository.model(request.model)
                counted.model, counted.keys = request.model, request.items
                answer, queued, computed = await self._inferred(model, request, parts, held)
            except BaseException as problem:
                counted.status = status_of(problem) if isinstance(problem, Exception) else None
                if counted.model:
                    self._statistics.failed(counted.model, time.perf_counter_ns() - began)
                raise
            self._statistics.succeeded(request.model, time.perf_counter_ns() - began, queued, computed)
        return answer

    def _take(self, held: list[int], size: int, values: int) -> None:
        """Count the bytes of a request."""
        self._limits.check_body(sum(held) + size, values)
        held.append(self._admission.hold(size))

    async def _inferred(
        self, model: InferenceModel, request: InferenceRequest, parts: Mapping[str, RegionPart], held: list[int]
    ) -> tuple[bytes, int, int]:
        """The answer; how many ns the request waited for a thread, and how many it took."""
        held.append(self._admission.hold(self._limits.answer_bytes(model, request)))
        return await self._threads.infer(model, request, lambda response: encode_response(response, parts, self._regions))

    # -- what the server says of itself ----------------------------------------------------

    async def _ServerLive(self, data: bytes, _: list[int]) -> bytes:
        return _message("ServerLiveResponse", live=True)

    async def _ServerReady(self, data: bytes, _: list[int]) -> bytes:
        return _message("ServerReadyResponse", ready=self._repository.ready() and not self.draining)

    async def _ModelReady(self, data: bytes, _: list[int]) -> bytes:
        return _message("ModelReadyResponse", ready=self._model("ModelReadyRequest", data).ready())

    async def _ServerMetadata(self, data: bytes, _: list[int]) -> bytes:
        return _message("ServerMetadataResponse", **server_metadata(shared_memory=self._regions.allowed))

    async def _ModelMetadata(self, data: bytes, _: list[int]) -> bytes:
        return _message("ModelMetadataResponse", **model_metadata(self._model("ModelMetadataRequest", data)))

    async def _ModelConfig(self, data: bytes, _: list[int]) -> bytes:
        return _message("ModelConfigResponse", config=model_config(self._model("ModelConfigRequest", data)))

    async def _ModelStatistics(self, data: bytes, _: list[int]) -> bytes:
        name = parse("ModelStatisticsRequest", data).name
        models = (
            [self._model("ModelStatisticsRequest", data)] if name else map(self._repository.model, self._repository.names())
        )
        told = [self._statistics.to_json(model.name, (*model.versions(), "")[0]) for model in models]
        return _message("ModelStatisticsResponse", model_stats=told)

    def _model(self, request: str, data: bytes) -> InferenceModel:
        """The model that a message names, in the version that it names."""
        message = parse(request, data)
        model = self._repository.model(message.name)
        if message.version and message.version not in model.versions():
            raise VersionError(f"version: expected one of {', '.join(model.versions())}, got {message.version[:40]!r}")
        return model

    # -- the repository --------------------------------------------------------------------

    async def _RepositoryIndex(self, data: bytes, _: list[int]) -> bytes:
        only = parse("RepositoryIndexRequest", data).ready
        return _message("RepositoryIndexResponse", models=index_json(self._repository.index(), ready_only=only))

    async def _RepositoryModelLoad(self, data: bytes, _: list[int]) -> bytes:
        message = parse("RepositoryModelLoadRequest", data)
        if message.parameters and self._repository.may_change:
            raise InferenceError(400, "parameters: expected none, models are those of the server's config")
        await self._command(LOAD, message.model_name)
        return b""

    async def _RepositoryModelUnload(self, data: bytes, _: list[int]) -> bytes:
        await self._command(UNLOAD, parse("RepositoryModelUnloadRequest", data).model_name)
        return b""

    async def _command(self, command: str, name: str) -> None:
        if not self._repository.may_change:
            raise InferenceError(403, "models: loading and unloading is not allowed, start the server with --allow-control")
        if self._everywhere is not None:
            await self._everywhere(command, name)
            return
        change = self._repository.load if command == LOAD else self._repository.unload
        await asyncio.get_running_loop().run_in_executor(None, change, name)

    # -- shared memory -----------------------------------------------------------------------

    async def _SystemSharedMemoryStatus(self, data: bytes, _: list[int]) -> bytes:
        found = self._regions.status(parse("SystemSharedMemoryStatusRequest", data).name)
        message = schema().SystemSharedMemoryStatusResponse()
        for one in found:
            region = message.regions[one.name]
            region.name, region.key, region.offset, region.byte_size = one.name, one.key, one.offset, one.byte_size
        return bytes(message.SerializeToString())

    async def _SystemSharedMemoryRegister(self, data: bytes, _: list[int]) -> bytes:
        message = parse("SystemSharedMemoryRegisterRequest", data)
        self._regions.register(message.name, message.key, message.offset, message.byte_size)
        return b""

    async def _SystemSharedMemoryUnregister(self, data: bytes, _: list[int]) -> bytes:
        self._regions.unregister(parse("SystemSharedMemoryUnregisterRequest", data).name)
        return b""


def _message(kind: str, **values: Any) -> bytes:
    return bytes(schema().messages[kind](**values).SerializeToString())


def _log(problem: Exception, method: str) -> None:
    status = status_of(problem)
    if status >= 500:
        log.error("%s: %s", method, problem, exc_info=problem if status == 500 else None)
