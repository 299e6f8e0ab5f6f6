"""Reading a whole file in as few calls of the system as that takes: after each, a thread waits for the GIL again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["content_of"]


def content_of(path: Path) -> bytes:
    """What is in a file.

    Raises:
        OSError: it is not there, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_BINARY", 0))
    try:
        size = os.fstat(descriptor).st_size
        content = os.read(descriptor, size + 1)
        while len(content) != size and (more := os.read(descriptor, 1 << 20)):  # it grew, or came in parts
            content += more
        return content
    finally:
        os.close(descriptor)
