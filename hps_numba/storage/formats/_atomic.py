"""Replace a file or directory atomically: a crash never leaves half of it under its name.

Problem: a writer may be killed at any moment, and a directory cannot be replaced by another in one step. Choice:
everything is written inside a hidden workspace beside the target, ``.<name>.<random>.hps-partial/``, synced, and
renamed into place. A directory that is there already first moves into the workspace as ``old``. Whoever writes next
under the same name finds workspaces whose writer is dead (the lock that it held is free), moves ``old`` back if the
target is missing, and deletes the rest. Turned down: process ids in names, which mean nothing on a file system shared
by machines, and deletion by age.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hps_numba.errors import ModelFileError

try:
    import fcntl
except ImportError:  # Windows: workspaces of dead writers are ignored and stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["leftovers", "replacing"]

_log = logging.getLogger(__name__)
_SUFFIX = ".hps-partial"


@contextmanager
def replacing(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new path to write to; when the block ends well, what is there takes the place of ``path``.

    If the block raises, or the process dies, ``path`` is as it was.

    Raises:
        ModelFileError: ``path`` exists and ``overwrite`` is off, its directory is missing, or the disk refuses.
    """
    target = Path(os.path.realpath(path))
    _check_target(path, target, overwrite)
    try:
        for dead in leftovers(target):
            _sweep(dead, target)
        workspace, lock = _new_workspace(target)
    except OSError as problem:
        raise ModelFileError(f"{path}: cannot be written: {problem}") from problem
    try:
        yield workspace / "new"
        try:
            _sync(workspace / "new")
            _check_target(path, target, overwrite)
            _put_in_place(workspace, target)
        except OSError as problem:
            raise ModelFileError(f"{path}: cannot be written: {problem}") from problem
    finally:
        _discard(workspace, target)
        os.close(lock)


def leftovers(target: Path) -> list[Path]:
    """Workspaces of writers of ``target``, dead or alive."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*{_SUFFIX}"))


def _check_target(path: Path, target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ModelFileError(f"{path}: there is no directory {target.parent} to write it to")
    if os.path.lexists(target) and not overwrite:
        raise ModelFileError(f"{path}: exists already; pass overwrite=True to replace it")


def _new_workspace(target: Path) -> tuple[Path, int]:
    """A locked workspace and the descriptor of its lock."""
    while True:
        workspace = Path(tempfile.mkdtemp(_SUFFIX, f".{target.name}.", target.parent))
        lock = os.open(workspace / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        _locked(lock, wait=True)
        if os.fstat(lock).st_nlink:
            return workspace, lock
        os.close(lock)  # swept away by another writer before it was locked


def _locked(lock: int, *, wait: bool) -> bool:
    """Lock the file until its descriptor is closed or the process ends. False: held by another, or no locks here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(workspace: Path, target: Path) -> None:
    """Roll back and delete a workspace unless its writer lives."""
    try:
        lock = os.open(workspace / "lock", os.O_RDWR)
    except OSError:
        return  # its writer is about to create the lock, or it is another user's
    try:
        if _locked(lock, wait=False):
            _discard(workspace, target)
    finally:
        os.close(lock)


def _discard(workspace: Path, target: Path) -> None:
    """Delete a workspace; an ``old`` whose successor did not arrive goes back to its place first."""
    old = workspace / "old"
    if os.path.lexists(old) and not os.path.lexists(target):
        try:
            old.rename(target)
        except OSError as problem:
            if not os.path.lexists(target):  # else another writer was quicker, and its model is the newer one
                _log.error("%s: the old model cannot be put back, it stays at %s: %s", target, old, problem)
                return
    shutil.rmtree(workspace, ignore_errors=True)


def _put_in_place(workspace: Path, target: Path) -> None:
    new = workspace / "new"
    if target.is_dir() or (new.is_dir() and os.path.lexists(target)):
        target.rename(workspace / "old")
    new.replace(target)
    _sync_entry(target.parent)


def _sync(path: Path) -> None:
    """Flush a file, or a directory with all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # Windows has no descriptors of directories
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
