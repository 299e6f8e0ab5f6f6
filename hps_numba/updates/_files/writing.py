"""A small file appears under its name only when all of it is on the disk."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PARTIAL", "put_file", "sync_folder"]

#: ends the names of files that are not finished
PARTIAL = ".partial"


def put_file(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file, or replace it, in one step.

    Args:
        sync: it is on the disk when this returns, whatever happens to the machine; the name follows with ``sync_folder``.

    Raises:
        OSError: the disk refuses; what was at ``path`` is as it was.
    """
    new = path.with_name(path.name + PARTIAL)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        left = memoryview(content)
        while len(left):
            left = left[os.write(descriptor, left) :]
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    new.replace(path)


def sync_folder(folder: Path) -> None:
    """See that names of a folder outlive a loss of power.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
