"""Shared by tests of shared memory: tiers with a segment of their own, and another process that uses the same one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from support.children import fork
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba.config import VolatileDatabaseConfig
from hps_numba.storage.shared import segment
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

__all__ = ["MIB", "Peer", "kill_self", "killed", "new_name", "open_tier", "segment_file", "started_child"]

MIB = 1 << 20


def new_name() -> str:
    """A name that no other test uses."""
    return f"hps_test_{uuid.uuid4().hex}"


def segment_file(name: str) -> Path:
    """The file of a segment."""
    return segment.FOLDER / name


def open_tier(name: str, size: int = 16 * MIB, *, auto_remove: bool = True, **options: Any) -> MultiProcessHashMapTier:
    """A tier in the segment of a name."""
    return MultiProcessHashMapTier(
        VolatileDatabaseConfig(
            type="multi_process_hash_map",
            shared_memory_name=name,
            shared_memory_size=size,
            shared_memory_auto_remove=auto_remove,
            **options,
        )
    )


def started_child(work: Callable[[], object]) -> int:
    """The pid of a forked child that does ``work`` and ends; whatever it raises is an exit status of 1."""
    child = fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def kill_self() -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work: Callable[[], object]) -> None:
    """Let a forked child do ``work``, in which it is killed."""
    child = started_child(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


class Peer:
    """Another process, started anew, that does what it is told: methods of a tier, or of a server."""

    def __init__(self, **opened: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.shared_peer", json.dumps(opened)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        self.pid = self._process.pid
        self._answer()

    def do(self, what: str, **given: Any) -> Any:
        """The answer of the other process; what it raises is an AssertionError here."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, given]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the other process has ended"
        status, answer = json.loads(line)
        assert status == "ok", answer
        return answer

    def rows(self, table: str, keys: np.ndarray) -> np.ndarray:
        """float32 ``[n, dim]`` as the other process reads them."""
        return np.array(self.do("rows", table=table, keys=keys.tolist()), np.float32)

    def kill(self) -> None:
        """End it as ``kill -9`` does."""
        self._process.kill()
        self._process.wait(HANG_SECONDS)
        self._close_pipes()

    def end(self) -> None:
        """Let it close what it has and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(HANG_SECONDS) == 0
        self._close_pipes()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
