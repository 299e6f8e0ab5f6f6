"""Shared by tests: in_child."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable

from support.waiting import HANG_SECONDS


def in_child(work: Callable[[], bool]) -> int:
    """Exit status of a forked child that does ``work``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(int(HANG_SECONDS))
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
