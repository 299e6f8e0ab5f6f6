"""Servers that tests start on loopback and end: skipped where the program is missing, unless CI says that it must be there."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
import tempfile
from functools import cache
from pathlib import Path

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
    """A port of loopback where nobody listens, for a server or for none.

    Until this process ends, no other process of tests gets it; and it is none that the system itself takes for connections,
    so that it is still free when a server listens there, however late that is.
    """
    if sys.platform == "win32":
        return _free_now(0) or 0
    choice = random.SystemRandom()  # whatever seed a test has set
    for port in (choice.choice(_PORTS) for _ in range(100 * len(_PORTS))):
        if port not in _taken and _reserved(port) and _free_now(port):
            _taken.add(port)
            return port
    raise RuntimeError("expected a free port, all are taken")


def _free_now(port: int) -> int | None:
    """The port, or one that the system chooses for 0, if nobody has it."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return None
        found: int = probe.getsockname()[1]
        return found


#: below the ports of connections of Linux, above those of workers of Ray, not those of its replicas
_PORTS = range(20_000, 30_000)
_taken: set[int] = set()  # by this process


def _reserved(port: int) -> bool:
    """Reserve a port among processes of tests: a lock of one byte of a file, which ends with the process."""
    import fcntl

    try:
        fcntl.lockf(_lock_file(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


@cache
def _lock_file() -> int:
    """It stays open, as the system drops all locks of a process with the first of its files that is closed."""
    return os.open(Path(tempfile.gettempdir()) / f"hps_numba_tests_ports.{os.getuid()}.lock", os.O_RDWR | os.O_CREAT, 0o600)
