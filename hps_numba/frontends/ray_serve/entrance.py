"""What answers for a fleet whose models have an application each: is it alive, is it ready, which models are there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.open_inference.answers import Answer, Receive, Scope, Send, error_answer, json_answer, live
from hps_numba.frontends.open_inference.metadata import server_metadata

__all__ = ["Entrance"]


class Entrance:
    """What Ray Serve makes an actor of, beside the applications of the models.

    Args:
        applications: of Ray Serve, by the name of their model.
    """

    def __init__(self, applications: Mapping[str, str]) -> None:
        self._app = _EntranceApp(applications)

    def __serve_build_asgi_app__(self) -> _EntranceApp:
        """The application; Ray asks for it once the replica is made."""
        return self._app


class _EntranceApp:
    def __init__(self, applications: Mapping[str, str]) -> None:
        self._applications = dict(applications)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, version 3."""
        if scope["type"] == "lifespan":
            await live(receive, send)
        elif scope["type"] == "http":
            await (await self._answer(scope["method"], scope["path"].strip("/"))).send(send)

    async def _answer(self, method: str, path: str) -> Answer:
        if path == "v2":
            return json_answer(server_metadata())
        if path == "v2/health/live":
            return json_answer({"live": True})
        if path == "v2/health/ready":
            ready = all((await asyncio.to_thread(self._running)).values())
            return json_answer({"ready": ready}, 200 if ready else 503)
        if path == "v2/repository/index" and method == "POST":
            running = await asyncio.to_thread(self._running)
            return json_answer([{"name": name, "state": "READY" if ok else "UNAVAILABLE"} for name, ok in running.items()])
        known = ", ".join(self._applications)
        return error_answer(InferenceError(404, f"path: expected one of the protocol, or a model of {known}"))

    def _running(self) -> dict[str, bool]:
        from ray import serve

        found = serve.status().applications
        return {model: name in found and found[name].status == "RUNNING" for model, name in self._applications.items()}
