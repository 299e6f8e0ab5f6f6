"""Paths as callers give them, checked before anything is opened."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

from hps_numba.errors import HpsError, ModelFileError

__all__ = ["PathLike", "check_room", "checked_path", "is_free", "is_url", "kind_of", "safe_to_show", "settled_path"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_USER = re.compile(r"(://)[^/\s?#]*@")
_QUERY = re.compile(r"(://[^\s?'\"]*)\?[^\s'\"]*")

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


def settled_path(path: object, what: str = "path", *, error: type[HpsError] = ModelFileError) -> Path:
    """``checked_path`` for what is used again later: an absolute path, which stays when the working directory changes.

    Raises:
        HpsError, of the type ``error``: as ``checked_path``; or it is relative and the working directory is gone.
    """
    checked = checked_path(path, what, error=error)
    try:
        return checked.absolute()
    except OSError as problem:
        raise error(f"{what}: {checked}: the working directory cannot be found: {problem.strerror}") from problem


def is_url(path: object) -> bool:
    """True for ``scheme://...``; a drive letter (``C:\\x``) and a local name with a colon are not."""
    return isinstance(path, str) and _URL.match(path) is not None


def is_free(path: Path) -> bool:
    """Whether nothing has this name, not even a link, so that it can be made; False if that cannot be seen."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def safe_to_show(text: str) -> str:
    """The text without users, passwords and queries (which hold signatures) of the URLs in it."""
    return _QUERY.sub(r"\1?...", _USER.sub(r"\1", text))


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
