"""The HTTP front end as a bare ASGI application: any ASGI server can run it.

Choice: no framework, as routing, validation and answers of FastAPI cost more than twice the time of a lookup and its transport
together. Small requests whose rows are in memory are answered where they arrive, on the thread of the event loop, as handing
them to another thread costs more than the lookup; others are answered by a bounded number of threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from hps_numba.errors import VersionError
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.inference.tensors import InferenceRequest
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.answers import (
    Answer,
    MethodError,
    Receive,
    Scope,
    Send,
    error_answer,
    json_answer,
    live,
)
from hps_numba.frontends.open_inference.calls import Call, ClientGone
from hps_numba.frontends.open_inference.codec import JSON_SIZE_HEADER, Body, decode_request, encode_response
from hps_numba.frontends.open_inference.commands import LOAD, METRICS, UNLOAD, Everywhere, perform
from hps_numba.frontends.open_inference.heads import AnswerForm, json_object
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.frontends.open_inference.metadata import index_json, model_config, model_metadata, server_metadata
from hps_numba.frontends.open_inference.region_routes import answer_regions
from hps_numba.frontends.open_inference.statistics import Statistics
from hps_numba.frontends.open_inference.threads import InferenceThreads
from hps_numba.metrics import RequestMetrics, accepts_openmetrics, content_type
from hps_numba.metrics.families import merged
from hps_numba.metrics.prometheus import render

__all__ = ["InferenceApp"]

log = logging.getLogger(__name__)

_JSON_SIZE = JSON_SIZE_HEADER.encode()
_SMALL_JSON = 8_192  # bytes of outputs that become JSON in well under a millisecond
_GIVEN_UP = 499  # status of a request whose client is gone
_MAX_COMMANDS = 8  # that wait for their turn


class InferenceApp:
    """The ASGI application of a repository of models.

    Args:
        repository: whose models are served; it stays the caller's.   limits: of this process.   access: who may ask.
        everywhere: carries out a command in all processes that serve; by default there is only this one.
        admission, statistics: of this process, where other front ends of it count there too.
        regions: shared memory that clients may name; by default none.

    Attributes:
        everywhere, admission, statistics, regions: as given, or its own.
        draining: the server is about to end: it is not ready, and every answer ends its connection.

    Thread safety: one event loop. ``drain`` may be called by any thread.
    """

    def __init__(
        self,
        repository: Repository,
        limits: Limits | None = None,
        access: Access | None = None,
        *,
        everywhere: Everywhere | None = None,
        admission: Admission | None = None,
        statistics: Statistics | None = None,
        regions: SharedRegions | None = None,
    ) -> None:
        self.draining = False
        self._repository = repository
        self._limits = limits or Limits()
        self._access = access or Access()
        self.admission = admission or Admission(self._limits)
        self.statistics = statistics or Statistics()
        self.regions = regions or SharedRegions()
        self._requests = RequestMetrics("open_inference", "http")
        self._detach = self._requests.attach(repository.server)
        self._threads = InferenceThreads(self._limits, self.admission, self._requests, "hps-serve")
        self._control = ThreadPoolExecutor(1, "hps-serve-control")
        self._commands = 0
        self.everywhere = everywhere or self._here

    def drain(self) -> None:
        """Be not ready from now on, and end connections with their next answer."""
        self.draining = True

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._detach()
        self._threads.close()
        self._control.shutdown(cancel_futures=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, version 3."""
        if scope["type"] == "lifespan":
            await live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        elif scope["type"] == "http":
            call = Call(scope, receive, self.admission)
            status = _GIVEN_UP
            try:
                answer = await self._answer(call)
                await answer.send(send, close=self.draining)
                status = answer.status
            except ClientGone:
                log.debug("a client cut its connection before its request was here")
            finally:
                call.end(status)

    async def _answer(self, call: Call) -> Answer:
        try:
            return await self._routed(call)
        except (ClientGone, asyncio.CancelledError):
            raise
        except InferenceError as problem:
            return error_answer(problem)
        except Exception as problem:
            answer = error_answer(problem)
            if answer.status >= 500:
                log.error("%s /%s: %s", call.method, "/".join(call.path)[:200], problem, exc_info=answer.status == 500)
            return answer

    async def _routed(self, call: Call) -> Answer:
        path = call.path
        if path[:2] != ("v2", "health"):
            self._check_access(call)
        match path:
            case ["v2", "models", name, "infer"]:
                return await self._infer(call, name, "")
            case ["v2", "models", name, "versions", version, "infer"]:
                return await self._infer(call, name, version)
            case ["v2", "repository", *rest]:
                return await self._of_repository(call, rest)
            case ["v2", "systemsharedmemory", *rest]:
                return await answer_regions(call, rest, self.regions, self._limits)
        if path not in (("metrics",), ("v2",)) and path[:2] not in (("v2", "health"), ("v2", "models")):
            raise _no_such(call)
        if call.method not in ("GET", "HEAD"):
            raise MethodError("GET, HEAD", call.method)
        match path:
            case ["v2", "health", "live"]:
                return json_answer({"live": True})
            case ["v2", "health", "ready"]:
                ready = self._repository.ready() and not self.draining
                return json_answer({"ready": ready}, 200 if ready else 503)
            case ["v2"]:
                return json_answer(server_metadata(shared_memory=self.regions.allowed))
            case ["metrics"]:
                return await self._metrics(call)
            case ["v2", "models", "stats"]:
                return json_answer({"model_stats": [self._stats(name) for name in self._repository.names()]})
            case ["v2", "models", name]:
                return self._of_model(call, name, "", "")
            case ["v2", "models", name, "versions", version]:
                return self._of_model(call, name, version, "")
            case ["v2", "models", name, what]:
                return self._of_model(call, name, "", what)
            case ["v2", "models", name, "versions", version, what]:
                return self._of_model(call, name, version, what)
        raise _no_such(call)

    def _check_access(self, call: Call) -> None:
        if not self._access.allows(call.headers.get(b"authorization")):
            raise InferenceError(401, "Authorization: expected Bearer and a token of this server")

    # -- inference --------------------------------------------------------------------

    async def _infer(self, call: Call, name: str, version: str) -> Answer:
        if call.method != "POST":
            raise MethodError("POST", call.method)
        began = time.perf_counter_ns()
        counted = call.counted = self._requests.request()
        model = self._repository.model(name)
        counted.model = name
        try:
            body = await call.body(self._limits)
            request, form = decode_request(body, name, version, call.json_size, self.regions, partial(self._take, call, body))
            counted.keys = request.items
            answer, queued, computed = await self._inferred(call, model, request, form)
        except BaseException:
            self.statistics.failed(name, time.perf_counter_ns() - began)
            raise
        self.statistics.succeeded(name, time.perf_counter_ns() - began, queued, computed)
        headers = () if answer.json_size is None else ((_JSON_SIZE, b"%d" % answer.json_size),)
        return Answer(200, answer.parts, answer.content_type.encode(), headers)

    def _take(self, call: Call, body: bytes, size: int) -> None:
        """Count bytes of a request that are in shared memory."""
        self._limits.check_body(len(body) + size, len(body) if call.json_size is None else call.json_size)
        call.hold(size)

    async def _inferred(
        self, call: Call, model: InferenceModel, request: InferenceRequest, form: AnswerForm
    ) -> tuple[Body, int, int]:
        """The answer; how many ns the request waited for its turn, and how many it took."""
        binary = all(map(form.is_binary, request.outputs)) if request.outputs else form.binary
        size = self._limits.answer_bytes(model, request, binary=binary)
        call.hold(size)
        is_quick = binary or size <= _SMALL_JSON
        return await self._threads.infer(
            model, request, lambda response: encode_response(response, form, self.regions), is_quick=is_quick
        )

    # -- models -----------------------------------------------------------------------

    def _of_model(self, call: Call, name: str, version: str, what: str) -> Answer:
        model = self._repository.model(name)
        if version and version not in model.versions():
            raise VersionError(f"version: expected one of {', '.join(model.versions())}, got {version[:40]!r}")
        if what == "":
            return json_answer(model_metadata(model))
        if what == "ready":
            return json_answer({"name": name, "ready": model.ready()}, 200 if model.ready() else 503)
        if what == "config":
            return json_answer(model_config(model))
        if what == "stats":
            return json_answer({"model_stats": [self._stats(name)]})
        if what == "infer":  # with too much behind it
            raise MethodError("POST", call.method)
        raise _no_such(call)

    def _stats(self, name: str) -> dict[str, Any]:
        versions = self._repository.model(name).versions()
        return self.statistics.to_json(name, versions[-1] if versions else "")

    async def _of_repository(self, call: Call, rest: Sequence[str]) -> Answer:
        match rest:
            case ["index"] | ["models", _, "load" | "unload"]:
                if call.method != "POST":
                    raise MethodError("POST", call.method)
            case _:
                raise _no_such(call)
        body = await call.body(self._limits)
        wanted = json_object(body, "body") if body.strip() else {}
        if rest == ["index"]:
            return json_answer(index_json(self._repository.index(), ready_only=wanted.get("ready") is True))
        _, name, command = rest
        self._check_control(call, wanted, command)
        await self.everywhere(LOAD if command == "load" else UNLOAD, name)
        return json_answer({})

    def _check_control(self, call: Call, wanted: dict[str, Any], command: str) -> None:
        if not self._repository.may_change:
            raise InferenceError(403, "models: loading and unloading is not allowed, start the server with --allow-control")
        if b"origin" in call.headers:
            raise InferenceError(403, "Origin: expected none, pages in browsers may not load or unload models")
        if command == "load" and wanted.get("parameters"):
            raise InferenceError(400, "parameters: expected none, models are those of the server's config")

    # -- every process ----------------------------------------------------------------

    async def _metrics(self, call: Call) -> Answer:
        openmetrics = accepts_openmetrics(call.headers.get(b"accept", b"").decode("latin-1"))
        families = merged(family for some in await self.everywhere(METRICS, "") for family in some)
        return Answer(
            200, (render(families, openmetrics=openmetrics).encode(),), content_type(openmetrics=openmetrics).encode()
        )

    async def _here(self, command: str, argument: str) -> Sequence[Any]:
        return [await self.perform(command, argument)]

    async def perform(self, command: str, argument: str) -> Any:
        """Carry out a command in this process, one at a time.

        Raises:
            InferenceError: 429, too many commands wait.   As ``commands.perform``.
        """
        if self._commands >= _MAX_COMMANDS:
            raise InferenceError(429, f"server: {_MAX_COMMANDS} commands wait already, try again in a while")
        self._commands += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._control, perform, self._repository, command, argument)
        finally:
            self._commands -= 1


def _no_such(call: Call) -> InferenceError:
    return InferenceError(404, f"path: expected one of the Open Inference Protocol, got {'/'.join(call.path)[:200]!r}")
