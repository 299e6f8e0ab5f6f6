"""Paths as callers give them, checked before anything is opened."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from hps_numba.errors import HpsError, ModelFileError

__all__ = ["PathLike", "check_room", "checked_path", "kind_of"]

PathLike = str | os.PathLike[str]


def checked_path(path: object, what: str = "path", *, error: type[HpsError] = ModelFileError) -> Path:
    """``path`` as a ``Path``, if the system can take it as the name of a file.

    Args:
        path: expected to be a str or an ``os.PathLike`` of str.
        what: the name of the argument, for messages.
        error: the type to raise.

    Raises:
        HpsError, of the type ``error``: another type, an empty name, or one with NUL or characters that no file name can hold.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
    except Exception:  # __fspath__ may be anybody's code
        raise error(f"{what}: expected a str or a path, got {type(path).__name__} {_shown(path)}") from None
    if not isinstance(text, str):
        raise error(f"{what}: expected a str or a path of str, got {_shown(path)}")
    if not text:
        raise error(f"{what}: expected the name of a file or directory, got ''")
    try:
        encoded = os.fsencode(text)
    except UnicodeError:
        raise error(f"{what}: expected a name that the file system can encode, got {_shown(text)}") from None
    if b"\0" in encoded:
        raise error(f"{what}: expected a name without NUL characters, got {text}")
    return Path(text)


def check_room(path: Path, size: int, *, error: type[HpsError] = ModelFileError) -> None:
    """Refuse to write what cannot fit, before hours are spent on filling the disk.

    Args:
        path: of the file or directory to be written.   size: its bytes.   error: the type to raise.

    Raises:
        HpsError, of the type ``error``: the file system has less room.
    """
    try:
        free = shutil.disk_usage(path.absolute().parent).free
    except OSError:  # there is no such directory: whoever writes says so
        return
    if size > free:
        raise error(f"{path}: cannot be written: {size:,} bytes are needed, {free:,} are free")


def _shown(thing: object) -> str:
    try:
        text = repr(thing)
    except Exception:  # somebody's __repr__
        return "(without a repr)"
    return text if len(text) <= 200 else f"{text[:197]}..."


def kind_of(mode: int) -> str:
    """What ``st_mode`` says that an entry of the file system is, for messages."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "an entry of an unknown kind")


_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)
