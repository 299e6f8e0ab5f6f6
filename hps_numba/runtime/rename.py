"""Renames that replace nothing, or swap two entries in one step, where kernel and file system can (``renameat2`` of Linux)."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["rename_new", "swap"]

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2


def rename_new(source: Path, target: Path) -> None:
    """Rename, unless there is something at ``target``.

    Raises:
        FileExistsError: there is.   OSError: the system refuses, or cannot do it (ENOSYS, EINVAL).
    """
    _renameat2(source, target, _NOREPLACE)


def swap(one: Path, other: Path) -> None:
    """Exchange two entries of any kind in one step: at every moment, each of the two names has one of them.

    Raises:
        FileNotFoundError: one is missing.   OSError: the system refuses, or cannot do it (ENOSYS, EINVAL).
    """
    _renameat2(one, other, _EXCHANGE)


def _renameat2(source: Path, target: Path, flags: int) -> None:
    call = _system_call()
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source), None, str(target))
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags):
        problem = ctypes.get_errno()
        raise OSError(problem, os.strerror(problem), str(source), None, str(target))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):  # Windows, macOS, an old libc
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return call
