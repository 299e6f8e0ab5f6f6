"""One replica: a server of the config, behind the ASGI app that ``hps-numba serve`` runs too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from hps_numba.config import ServerConfig
from hps_numba.errors import TierUnavailable
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.open_inference.answers import Receive, Scope, Send
from hps_numba.frontends.open_inference.app import InferenceApp
from hps_numba.frontends.open_inference.limits import Limits
from hps_numba.server.hps import HPS

__all__ = ["Replica", "Sendable"]

log = logging.getLogger(__name__)


class Replica:
    """What Ray Serve makes an actor of, on any node.

    Args:
        config: of the server; its files are read on the node of the replica.   limits: of the app.
        allow_code: as for ``HPS``.

    Raises:
        as ``HPS``; Ray tries again, and says the deployment is unhealthy if it never works.
    """

    def __init__(self, config: ServerConfig, limits: Limits, allow_code: bool) -> None:
        self._server = HPS(config, allow_code=allow_code, progress=False)
        self._models = Repository(self._server)
        self._app = InferenceApp(self._models, limits)

    def __serve_build_asgi_app__(self) -> Sendable:
        """The app that answers requests; Ray asks for it once the replica is made."""
        return Sendable(self._app)

    async def reconfigure(self, wanted: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over the versions of models that ``app(versions=...)`` names; lookups go on meanwhile.

        Raises:
            as ``HPS.replace_model``; Ray then keeps the replicas that have not changed yet.
        """
        for name, version in wanted.items():
            number, files = version["version"], version["sparse_files"]
            if self._server.model_version(name) != number:
                log.info("model %s: version %d takes the place of %d", name, number, self._server.model_version(name))
                await asyncio.to_thread(self._server.replace_model, name, files, version=number)

    def check_health(self) -> None:
        """
        Raises:
            TierUnavailable: a model cannot answer; Ray replaces a replica that says so again and again.
        """
        if not self._models.ready():
            raise TierUnavailable("replica: expected every model to be ready, got one that is not")

    def __del__(self) -> None:
        """Ray calls it when the replica is taken down, after its last request."""
        if "_app" in vars(self):
            self._app.close()
            self._models.close()
        if "_server" in vars(self):
            self._server.close()


class Sendable:
    """An ASGI app whose answers Ray can send between processes, as it does without its direct ingress: bodies are bytes."""

    def __init__(self, app: InferenceApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_bytes(message: dict[str, Any]) -> None:
            if isinstance(message.get("body"), memoryview):
                message = {**message, "body": bytes(message["body"])}
            await send(message)

        await self._app(scope, receive, send_bytes)
