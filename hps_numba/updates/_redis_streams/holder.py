"""Who reads a stream for a group: one process at a time, as entries of a stream would be out of order with two.

The name of a holder tells where it runs, so that one that was killed is replaced at once by a process that can see that it is
gone; from elsewhere, it is replaced when its lease has expired.
"""

from __future__ import annotations

import os
import platform
import secrets
from pathlib import Path

__all__ = ["is_gone", "new_holder"]


def _place() -> str:
    """The host and, as process ids mean something only there, its namespace of processes; empty if that is not known."""
    try:
        return f"{platform.node()}/{Path('/proc/self/ns/pid').readlink()}/{_boot()}"
    except OSError:
        return ""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_holder() -> str:
    """A name for one reader of this process."""
    return f"{_place() or platform.node()} process {os.getpid()} {secrets.token_hex(8)}"


def is_gone(holder: str) -> bool:
    """Whether a process of this host that held a stream has ended; False if that cannot be told from here."""
    place, _, rest = holder.rpartition(" process ")
    number = rest.partition(" ")[0]
    if not place or place != _place() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
