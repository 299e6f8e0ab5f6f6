"""A process that serves: the server of a config, its models, the HTTP application on uvicorn, and its end.

Told to end (SIGTERM, Ctrl-C), it is not ready at once, so that load balancers look elsewhere, goes on accepting requests for
``drain_seconds``, answers what it accepted, and ends. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.programs import open_program
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.frontends.inference.tensors import InferenceRequest
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.app import InferenceApp
from hps_numba.frontends.open_inference.commands import Everywhere
from hps_numba.frontends.open_inference.grpc_server import GrpcServer
from hps_numba.frontends.open_inference.listening import BACKLOG, SETTLE, ignore_new_clients, listen
from hps_numba.frontends.open_inference.malloc import keep_freed_memory
from hps_numba.frontends.open_inference.options import ServeOptions
from hps_numba.metrics.instruments import Distribution
from hps_numba.metrics.requests import BATCH_REQUESTS
from hps_numba.server.hps import HPS

if TYPE_CHECKING:
    import uvicorn

__all__ = ["Process", "serve_in_this_process", "urls"]

log = logging.getLogger(__name__)

_POLL = 0.01  # seconds


def urls(options: ServeOptions, listening: socket.socket, grpc_port: int | None) -> list[str]:
    """Where clients find a server, HTTP first; ``grpc_port``: where it serves gRPC, if it does."""
    host = f"[{options.host}]" if ":" in options.host else options.host
    scheme = "http" if options.tls is None else "https"
    found = [f"{scheme}://{host}:{listening.getsockname()[1]}"]
    if grpc_port is not None:
        found.append(f"grpc://{host}:{grpc_port}")
    return found


def serve_in_this_process(options: ServeOptions, announce: Callable[[Sequence[str]], object]) -> None:
    """Serve until a signal says to end.

    Args:
        announce: is called once, with the URLs, when the server is ready.

    Raises:
        ConfigError: something is wrong with the config, or a package is not installed.   OSError: the address cannot be used.
        As ``HPS``.
    """
    with listen(options.host, options.port) as listening:
        process = Process(options, listening)
        process.run(lambda: announce(urls(options, listening, process.grpc_port)))


class Process:
    """What one process serves.

    Args:
        listening: where it accepts connections; it stays the caller's.
        everywhere: gives what carries out commands in all processes, for the application of this one; None: there is only this.
        interrupts: whether Ctrl-C and the listening socket are for this process, and not for whoever looks after it.
    """

    def __init__(
        self,
        options: ServeOptions,
        listening: socket.socket,
        *,
        everywhere: Callable[[Process], Everywhere] | None = None,
        interrupts: bool = True,
    ) -> None:
        self.options, self._listening = options, listening
        self._everywhere = everywhere
        self._interrupts = interrupts
        self.app: InferenceApp
        self.repository: Repository
        self.loop: asyncio.AbstractEventLoop
        self._server: uvicorn.Server
        self._grpc: GrpcServer | None = None
        self._stopping = False

    @property
    def grpc_port(self) -> int | None:
        """Where it serves gRPC now."""
        return None if self._grpc is None else self._grpc.port

    def run(self, ready: Callable[[], object]) -> None:
        """Serve until ``stop`` or a signal; ``ready`` is called when requests are answered."""
        keep_freed_memory()
        with ExitStack() as closing:
            server = closing.enter_context(HPS(self.options.config, allow_code=self.options.allow_code))
            self.repository = Repository(server, may_change=self.options.allow_control)
            closing.callback(self.repository.close)
            add_models(self.repository, self.options)
            warm(self.repository)
            everywhere = None if self._everywhere is None else self._everywhere(self)
            access = Access(self.options.tokens)
            regions = SharedRegions(self.options.shared_memory)
            self.app = InferenceApp(self.repository, self.options.limits, access, everywhere=everywhere, regions=regions)
            closing.callback(self.app.close)
            with asyncio.Runner(loop_factory=_new_loop()) as runner:
                runner.run(self._serve(ready))

    async def _serve(self, ready: Callable[[], object]) -> None:
        from hps_numba.frontends.open_inference.connections import close_late

        self.loop = asyncio.get_running_loop()
        self._server = _uvicorn(self.app, self.options)
        restore = self._take_signals()
        grpc = await self._start_grpc()
        late = self.loop.create_task(close_late(self._server.server_state.connections))
        # uvicorn closes the socket that it is given; another process may still accept from it
        serving = self.loop.create_task(self._server.serve([self._listening.dup()]))
        try:
            while not (self._server.started or serving.done()):
                await asyncio.sleep(_POLL)
            if not serving.done():
                ready()
                if self._interrupts and self.options.seconds is not None:
                    self.loop.call_later(self.options.seconds, self.stop)
            await serving
        finally:
            late.cancel()
            if grpc is not None:
                await grpc.stop(self.options.stop_seconds)
            restore()

    async def _start_grpc(self) -> GrpcServer | None:
        options, app = self.options, self.app
        if options.grpc_port is None:
            return None
        self._grpc = GrpcServer(
            self.repository,
            options.limits,
            Access(options.tokens),
            host=options.host,
            port=options.grpc_port,
            tls=options.tls,
            shared_port=options.workers > 1,
            everywhere=app.everywhere,
            admission=app.admission,
            statistics=app.statistics,
            regions=app.regions,
        )
        await self._grpc.start()
        return self._grpc

    def stop(self) -> None:
        """End, as the module says; on the event loop's thread. A second call changes nothing."""
        if not self._stopping:
            self._stopping = True
            log.info("serve: ends: not ready from now on, accepts for %g s", self.options.drain_seconds)
            self.app.drain()
            if self._grpc is not None:
                self._grpc.drain()
            self.loop.call_later(self.options.drain_seconds, self._stop_accepting)

    def _stop_accepting(self) -> None:
        if self._interrupts:
            ignore_new_clients(self._listening)
        self.loop.call_later(SETTLE, self._end)

    def _end(self) -> None:
        self._server.should_exit = True

    def _interrupt(self) -> None:
        if self._stopping:
            self._server.should_exit = self._server.force_exit = True
        self.stop()

    def _take_signals(self) -> Callable[[], None]:
        """Signals end this process; returns what undoes that."""
        actions: dict[int, Callable[[], None]] = {signal.SIGTERM: self.stop}
        if self._interrupts:
            actions[signal.SIGINT] = self._interrupt
        before = {which: signal.getsignal(which) for which in actions}
        for which, action in actions.items():
            try:
                self.loop.add_signal_handler(which, action)
            except NotImplementedError:  # Windows
                signal.signal(which, lambda *_, action=action: self.loop.call_soon_threadsafe(action))

        def restore() -> None:
            for which, handler in before.items():
                with suppress(NotImplementedError):
                    self.loop.remove_signal_handler(which)
                signal.signal(which, handler)

        return restore


def add_models(repository: Repository, options: ServeOptions) -> None:
    """Add whole models to the table sets of the config.

    Raises:
        ModelFileError, ConfigError: as ``open_program``.   InferenceError: two have one name.
    """
    together, limits = Distribution(BATCH_REQUESTS), options.limits
    if options.batch_delay is not None:
        repository.server.metrics.add(lambda: [together.collect()])
    for name, path in options.programs.items():
        model: InferenceModel = open_program(name, path, repository.server)
        if options.batch_delay is not None and model.max_batch_size > 1:
            model = BatchedModel(
                model,
                max_batch_size=options.max_batch,
                max_delay=options.batch_delay,
                max_queue=limits.max_concurrent + limits.max_queue,
                timeout=limits.request_seconds,
                on_call=partial(_record, together, name),
            )
        repository.add(model)


def _record(together: Distribution, name: str, requests: int) -> None:
    together.record(requests, "open_inference", "in_process", name)  # of whatever protocols the requests came by


def warm(repository: Repository) -> None:
    """Look one key of every table up, so that no client waits for the compilation of a kernel."""
    for name in repository.names():
        model = repository.model(name)
        if isinstance(model, TableSetModel):
            specs = repository.server.direct.tables(name)
            one, offsets = np.zeros(1, np.int64), np.array([0, 1], np.int64)
            counts = np.ones(len(specs), np.int32)
            model.infer(InferenceRequest(name, {"KEYS": np.zeros(len(specs), np.int64), "NUMKEYS": counts}))
            model.infer(InferenceRequest(name, {specs[0].name: one, f"{specs[0].name}.offsets": offsets}))


def _new_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _uvicorn(app: InferenceApp, options: ServeOptions) -> uvicorn.Server:
    try:
        import ssl

        import uvicorn

        from hps_numba.frontends.open_inference.connections import bounded_connections
    except ImportError as problem:
        raise ConfigError(f"serve: expected the package {problem.name}: pip install 'hps-numba[serve]'") from None

    class Server(uvicorn.Server):
        """Leaves signals to others."""

        def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
            return nullcontext()

    tls: dict[str, Any] = {}
    if options.tls is not None:
        tls = {"ssl_certfile": options.tls.certificate, "ssl_keyfile": options.tls.key}
        if options.tls.client_ca is not None:
            tls |= {"ssl_ca_certs": options.tls.client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    config = uvicorn.Config(
        app,
        http=bounded_connections(options.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=options.limits.keep_alive_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=options.stop_seconds,  # type: ignore[arg-type]
        **tls,
    )
    try:
        config.load()
    except (OSError, ValueError) as problem:
        raise ConfigError(f"tls: expected a certificate and its key in PEM form, got: {problem}") from None
    return Server(config)
