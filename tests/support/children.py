"""Shared by tests: forked children."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable

from support.waiting import HANG_SECONDS


def fork() -> int:
    """``os.fork``, without the warning of a fork beside threads: that is what is tested."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def in_child(work: Callable[[], bool]) -> int:
    """Exit status of a forked child that does ``work``."""
    child = fork()
    if child == 0:
        signal.alarm(int(HANG_SECONDS))
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
