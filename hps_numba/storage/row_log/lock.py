"""One writer a folder, in any process: a lock of the system, which ends with the process that holds it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from hps_numba.errors import TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.row_log.segment import is_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["WriterLock"]


class WriterLock:
    """The lock of the writer of ``folder``; its file names the process, for messages.

    ``flock`` belongs to the open file: it refuses a second writer of this process too, and the closing of other files does not
    end it. A forked child closes its copy at once, so that the lock does not outlive its holder.

    Attributes:
        path: of the file.

    Raises:
        TierUnavailable: another writer has the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._fd = -1
        if fcntl is None:
            raise TierUnavailable(f"{folder}: row_log: expected a system with flock (Linux or macOS), got {platform.system()}")
        self.path = path = folder / "lock"
        fd = -1
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {platform.node()}\n".encode(), 0)
        except BlockingIOError:
            pid, _, host = os.pread(fd, 300, 0).decode(errors="replace").strip().partition(" ")
            os.close(fd)
            raise TierUnavailable(
                f"{path}: expected no other writer, got process {pid or '(starting)'} on {host or 'this host'}: "
                "open the folder with read_only, or close the other writer"
            ) from None
        except OSError as problem:
            if fd >= 0:
                os.close(fd)
            raise TierUnavailable(f"{path}: cannot be locked: {problem.strerror}") from problem
        self._fd = fd
        register_fork_reset(self)

    @property
    def held(self) -> bool:
        """Whether this process has the lock."""
        return self._fd >= 0

    @property
    def stays(self) -> bool:
        """Whether the file still has its name; else another process may lock one of the same name.

        Raises:
            OSError: it cannot be looked at.
        """
        return is_at(self.path, self._fd)

    def reset_after_fork(self) -> None:
        """The lock stays with the parent."""
        self.release()

    def release(self) -> None:
        """Let the next writer in; again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
