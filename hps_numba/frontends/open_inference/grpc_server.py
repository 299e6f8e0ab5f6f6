"""The gRPC front end as a server: its address, TLS, bounds of connections, and its end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.open_inference.access import Access
from hps_numba.frontends.open_inference.commands import Everywhere
from hps_numba.frontends.open_inference.grpc_service import InferenceService
from hps_numba.frontends.open_inference.limits import Admission, Limits
from hps_numba.frontends.open_inference.options import Tls
from hps_numba.frontends.open_inference.statistics import Statistics

__all__ = ["GrpcServer", "RunningGrpc", "start_grpc"]

#: seconds after which a client is told to open a new connection, which costs it nothing; calls on the old one then have
#: ``write_seconds`` to end, or what they need to be answered, so that no client holds memory for ever by not reading
_AGE = 120.0


class GrpcServer:
    """Answers the calls of one event loop.

    Args:
        repository: whose models are served; it stays the caller's.
        limits, access, everywhere, regions, admission, statistics: see ``InferenceService``.
        host, port: where it listens; port 0: any that is free.   tls: None: without.
        shared_port: several processes may listen there, the system shares connections out (SO_REUSEPORT).

    Attributes:
        port: where it listens, once started.   service: what answers.

    Thread safety: its event loop.
    """

    def __init__(
        self,
        repository: Repository,
        limits: Limits | None = None,
        access: Access | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None = None,
        shared_port: bool = False,
        everywhere: Everywhere | None = None,
        regions: SharedRegions | None = None,
        admission: Admission | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.port = port
        self.service = InferenceService(
            repository,
            self.limits,
            access or Access(),
            everywhere=everywhere,
            regions=regions,
            admission=admission,
            statistics=statistics,
        )
        self._host, self._tls, self._shared_port = host, tls, shared_port
        self._server: Any = None

    async def start(self) -> None:
        """Listen, and answer from now on.

        Raises:
            ConfigError: grpcio or protobuf is not installed, a file of TLS is wrong, or the address cannot be used.
        """
        try:
            import grpc.aio  # type: ignore[import-untyped]

            handlers = self.service.handlers()
        except ImportError as problem:
            raise ConfigError(f"gRPC: expected the package {problem.name}: pip install 'hps-numba[serve]'") from None
        self._server = grpc.aio.server(
            handlers=[handlers], options=self._options(), maximum_concurrent_rpcs=self.limits.max_connections
        )
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self.port}"
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(self._tls))
        except RuntimeError as problem:
            raise ConfigError(
                f"gRPC: expected an address that is free, and TLS files in PEM form, at {address}: {problem}"
            ) from None
        await self._server.start()

    def _options(self) -> list[tuple[str, int]]:
        limits = self.limits
        return [
            ("grpc.max_receive_message_length", limits.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", limits.max_header_bytes),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            ("grpc.server_handshake_timeout_ms", int(limits.read_seconds * 1000)),
            ("grpc.max_connection_age_ms", int(_AGE * 1000)),
            (
                "grpc.max_connection_age_grace_ms",
                int(max(limits.read_seconds + limits.request_seconds, limits.write_seconds) * 1000),
            ),
            ("grpc.so_reuseport", int(self._shared_port)),
        ]

    def drain(self) -> None:
        """Be not ready from now on; calls are still answered."""
        self.service.draining = True

    async def stop(self, grace: float = 30.0) -> None:
        """Take no calls any more, answer those that were taken, and end.

        Args:
            grace: seconds that these have for it.
        """
        self.drain()
        if self._server is not None:
            await self._server.stop(grace)
        self.service.close()


class RunningGrpc:
    """A server on an event loop and a thread of its own; see ``start_grpc``.

    Attributes:
        port: where it listens.

    Thread safety: every method.
    """

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="hps-grpc-loop", daemon=True)
        self._thread.start()
        self._ended = False
        self._lock = threading.Lock()
        try:
            self._on_loop(server.start()).result()
        except BaseException:
            self.stop(0.0)
            raise
        self.port = server.port

    def _on_loop(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def drain(self) -> None:
        """Be not ready from now on; calls are still answered."""
        self._server.drain()

    def stop(self, grace: float = 30.0) -> None:
        """Take no calls any more, answer those that were taken, and end; a second call changes nothing.

        Args:
            grace: seconds that these have for it.
        """
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._on_loop(self._server.stop(grace)).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> RunningGrpc:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_grpc(repository: Repository, limits: Limits | None = None, access: Access | None = None, **more: Any) -> RunningGrpc:
    """Serve a repository by gRPC, beside whatever this process does.

    Args:
        more: as of ``GrpcServer``.

    Returns:
        The server, which ends with ``stop`` or at the end of a ``with`` block.

    Raises:
        ConfigError: see ``GrpcServer.start``.
    """
    return RunningGrpc(GrpcServer(repository, limits, access, **more))


def _credentials(tls: Tls) -> Any:
    import grpc

    try:
        pair = tls.key.read_bytes(), tls.certificate.read_bytes()
        client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    except OSError as problem:
        raise ConfigError(f"tls: expected files that can be read: {problem}") from None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)
