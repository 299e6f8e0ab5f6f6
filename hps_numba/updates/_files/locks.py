"""A file that one process at a time holds: the lock is the system's, so it ends with its holder, however that ends."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from hps_numba.errors import TierUnavailable
from hps_numba.runtime.fork import register_fork_reset

try:
    import fcntl
except ImportError:  # Windows: a second holder is not noticed
    fcntl = None  # type: ignore[assignment]

__all__ = ["HeldFile"]


class HeldFile:
    """The lock of ``path``; the file names the process that has it, for messages. A forked child does not have it.

    Raises:
        TierUnavailable: another one has it, or the file cannot be made.
    """

    def __init__(self, path: Path, expected: str) -> None:
        """``expected``: what the message expects instead of another holder."""
        self._fd = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if fcntl is not None:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()} on {platform.node()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(self._fd, 300, 0).decode(errors="replace").strip() or "(starting)"
            self.release()
            raise TierUnavailable(f"{path}: expected {expected}, got one of process {holder}") from None
        except OSError as problem:
            self.release()
            raise TierUnavailable(f"{path}: cannot be locked: {problem.strerror}") from problem
        register_fork_reset(self)

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._fd >= 0

    def reset_after_fork(self) -> None:
        """The lock stays with the parent."""
        self.release()

    def release(self) -> None:
        """Let another one have it; again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
