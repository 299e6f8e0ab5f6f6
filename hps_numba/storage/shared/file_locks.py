"""Locks on bytes of a file (POSIX record locks): the kernel drops them when the process ends, however it ends.

They belong to the process: a forked child has none of them, and two threads of one process do not exclude each other. Closing
any descriptor of the file drops all of them, so a process opens a segment once (``segment.attach``).
"""

from __future__ import annotations

import time
from collections.abc import Callable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Check", "go_on", "is_supported", "lock_within", "try_lock", "unlock", "wait_for"]

_FIRST_PAUSE, _LAST_PAUSE = 2e-5, 5e-4
Check = Callable[[], object]
"""Called while something is waited for; raises if that is of no use any more."""


def go_on() -> None:
    """A Check that lets every wait go on."""


def is_supported() -> bool:
    """Whether this system has such locks."""
    return fcntl is not None


def try_lock(file: int, start: int, count: int = 1) -> bool:
    """Lock bytes from ``start`` on for this process; False if another process has one of them."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, start)
    except (BlockingIOError, PermissionError):  # what EAGAIN and EACCES become; either means that it is taken
        return False
    return True


def unlock(file: int, start: int, count: int = 1) -> None:
    """Give bytes back."""
    fcntl.lockf(file, fcntl.LOCK_UN, count, start)


def lock_within(file: int, start: int, seconds: float | None, check: Check = go_on) -> bool:
    """Lock one byte, waiting for its holder; False if that takes longer. ``check`` is called meanwhile and may raise."""
    return wait_for(lambda: try_lock(file, start), seconds, check)


def wait_for(attempt: Callable[[], bool], seconds: float | None, check: Check = go_on) -> bool:
    """Try until an attempt succeeds; False if that takes longer. ``check`` is called between two attempts and may raise."""
    end = None if seconds is None else time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while not attempt():
        if end is not None and time.monotonic() >= end:
            return False
        check()
        time.sleep(pause)
        pause = min(2 * pause, _LAST_PAUSE)
    return True
