"""Calls of layers that ask for one version of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hps_numba.config.arguments import as_count
from hps_numba.frontends._queries import tables_of

__all__ = ["of_version"]

T = TypeVar("T")


def of_version(text: str | bytes, version: object, answer: Callable[[], T]) -> T:
    """What ``answer`` returns, all of one version of the model of a query; it is called again if a switch overtakes it.

    Raises:
        VersionError: another one is in force.   ConfigError: ``version`` is no integer from 0 on.   Otherwise as ``HPS``.
    """
    number = as_count(version, "version", 0)
    server, query = tables_of(text)[0]
    return server.direct.of_version(query.model, number, answer)
