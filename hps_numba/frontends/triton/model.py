"""What runs in Triton's Python backend: the tables of one model of a config. Each instance is a process with its own server.

A ``model.py`` of a Triton repository imports ``TritonPythonModel`` from here; ``frontends.triton.repository`` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from hps_numba.frontends.inference.problems import InferenceError, status_of
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.frontends.triton.deployment import open_server
from hps_numba.frontends.triton.metrics import MetricsReporter
from hps_numba.frontends.triton.python_backend import error_response, request_of, response_of
from hps_numba.frontends.triton.settings import Settings

__all__ = ["TritonPythonModel"]

log = logging.getLogger(__name__)


class TritonPythonModel:
    """Answers with rows, as ``frontends.inference.tables`` says: flat (``KEYS``, ``NUMKEYS``), or a tensor for each table.

    Thread safety: Triton calls one method at a time.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model.

        Args:
            args: Triton's: ``model_config`` (JSON), ``model_name``, ``model_repository`` (the model's folder), ...

        Raises:
            As ``HPS``; Triton refuses to load the model then, and tells why.
        """
        settings = Settings.from_arguments(args)
        self._server = open_server(settings)
        try:
            self._tables = TableSetModel(self._server, settings.model)
            self._metrics = MetricsReporter(self._server, settings.metrics_interval)
        except BaseException:
            self._server.close()
            raise
        log.info("model %s: serves model %s of %s", args["model_name"], settings.model, settings.ps)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests; one that is wrong gets an error, and the others their rows."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            answer = self._tables.infer(request_of(request, self._tables.name))
            wanted = request.requested_output_names()
            if not any(name in wanted for name in answer.outputs):
                asked = ", ".join(sorted(wanted))[:200]
                raise InferenceError(400, f"outputs: expected some of {', '.join(answer.outputs)}, got {asked}")
            return response_of(answer, wanted)
        except Exception as problem:
            if status_of(problem) == 500:
                log.exception("model %s: a request failed", self._tables.name)
            return error_response(problem)

    def finalize(self) -> None:
        """Unload the model: caches and host memory are freed, rows in tiers that outlive the process stay."""
        self._metrics.close()
        self._server.close()
