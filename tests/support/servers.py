"""Servers that tests start on loopback and end: skipped where the program is missing, unless CI says that it must be there."""

from __future__ import annotations

import os
import shutil
import socket

import pytest

__all__ = ["free_port", "program"]


def program(name: str, package: str) -> str:
    """Path of a program of the system; without it the test is skipped, or fails with ``HPS_NUMBA_REQUIRE_SERVERS=1``.

    Args:
        package: of Debian, for the message.
    """
    found = shutil.which(name)
    if found is not None:
        return found
    missing = f"needs {name}: apt-get install {package}"
    if os.environ.get("HPS_NUMBA_REQUIRE_SERVERS"):
        pytest.fail(missing)
    pytest.skip(missing)


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
