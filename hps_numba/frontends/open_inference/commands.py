"""What concerns every process that serves: loading and unloading models, and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.repository import Repository

__all__ = ["LOAD", "METRICS", "UNLOAD", "Everywhere", "perform"]

LOAD, UNLOAD, METRICS = "load", "unload", "metrics"

Everywhere = Callable[[str, str], Awaitable[Sequence[Any]]]
"""``await everywhere(command, argument)``: what every process says to a command. Raises what one of them raised."""


def perform(repository: Repository, command: str, argument: str) -> Any:
    """Carry out a command in this process; may take long.

    Args:
        argument: of LOAD and UNLOAD, the name of a model.

    Returns:
        Of METRICS, families of metrics.

    Raises:
        As ``Repository.load`` and ``Repository.unload``.
    """
    if command == LOAD:
        return repository.load(argument)
    if command == UNLOAD:
        return repository.unload(argument)
    if command == METRICS:
        return repository.server.metrics.collect()
    raise InferenceError(500, f"command: expected {LOAD}, {UNLOAD} or {METRICS}, got {command!r}")
