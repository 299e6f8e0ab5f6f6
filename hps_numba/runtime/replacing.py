"""Replace a file or directory atomically: a crash leaves no half of it under its name, and nobody else's data is lost.

Problem: a writer may be killed at any moment; a directory cannot be renamed over another; and what lies at the target may be
somebody's home, a device or another file than the one that was looked at a moment ago. Choice: everything is written inside a
hidden workspace beside the target, ``.<name>.<random>.hps-partial/``, synced, and *swapped* with the target in one step. What
came out is judged then, where nobody else finds it, and swapped back unless it may be replaced. Where the file system cannot
swap, the target is judged again right before the rename, and a directory first moves into the workspace as ``old``.

A symbolic link is followed: what it points to is replaced, by the same rules, and the link stays.

Whoever writes next under the same name finds workspaces whose writer is dead, moves ``old`` back if the target is missing, and
deletes the rest. A writer is alive while it holds the lock of its workspace. Locks of other machines may be invisible on a
shared file system: a workspace that was made by another one (the lock file names it) also has to be untouched for a day.
Turned down: process ids in names, which mean nothing on a file system shared by machines.
"""

from __future__ import annotations

import glob
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hps_numba.errors import HpsError, ModelFileError
from hps_numba.runtime import rename
from hps_numba.runtime.paths import kind_of

try:
    import fcntl
except ImportError:  # Windows: workspaces of dead writers are ignored and stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["Judge", "check_target", "file_judge", "leftovers", "replace_file", "replacing", "write_report"]

_log = logging.getLogger(__name__)
_SUFFIX = ".hps-partial"
_PLACING = "placing"  # in a workspace from when what is ``new`` may have come from the target, by a swap
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # opening a FIFO would wait for the other side
_FOREIGN_SECONDS = 86_400.0  # after which a workspace of another machine, untouched and not locked, has no writer

Judge = Callable[[Path], "str | None"]
"""Told where a regular file or a directory lies, says in words why it must not be replaced (``is no checkpoint``), or None."""


def file_judge(what: str, is_one: Callable[[bytes], bool]) -> Judge:
    """A judge for writers of files: only a file whose first 64 bytes are those of ``what`` may be replaced."""

    def judge(place: Path) -> str | None:
        if place.is_dir():
            return f"is a directory, where {what} was to be written"
        try:
            descriptor = os.open(place, os.O_RDONLY | _NO_WAITING | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        except OSError as problem:
            return f"cannot be read to see whether it is {what}: {problem.strerror}"
        try:
            return None if is_one(os.read(descriptor, 64)) else f"is a file, but not {what}"
        finally:
            os.close(descriptor)

    return judge


@contextmanager
def replacing(path: Path, *, overwrite: bool, judge: Judge, error: type[HpsError] = ModelFileError) -> Iterator[Path]:
    """A new path to write to; when the block ends well, what is there takes the place of ``path``.

    If the block raises, or the process dies, ``path`` is as it was.

    Args:
        overwrite: something may be at ``path``; an empty file is replaced, anything else if ``judge`` agrees.
        judge: called for regular files that are not empty, and for directories; a device, FIFO, socket or the working
            directory is never replaced.
        error: the type to raise.

    Raises:
        HpsError, of the type ``error``: ``path`` exists and may not be replaced, its directory is missing, or the disk refuses.
    """
    try:
        target = Path(os.path.realpath(path))
        check_target(path, target, overwrite, judge, error)
        for dead in leftovers(target):
            _sweep(dead, target, judge)
        workspace, lock = _new_workspace(target)
    except OSError as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{path}: cannot be written: {problem}") from problem
    place = _Place(path, target, workspace, overwrite, judge, error)
    try:
        yield workspace / "new"
        try:
            _sync(workspace / "new")
            place.put()
        except OSError as problem:
            if isinstance(problem, error):
                raise
            raise error(f"{path}: cannot be written: {problem}") from problem
    finally:
        if not place.holds_something_else:
            _discard(workspace, target)
        os.close(lock)


def replace_file(path: Path, content: bytes, judge: Judge, *, error: type[HpsError]) -> None:
    """Write a file, replacing the one at ``path`` if it is empty or ``judge`` agrees.

    Raises:
        HpsError, of the type ``error``: there is something else, which is not replaced, or it cannot be written.
    """
    with replacing(path, overwrite=True, judge=judge, error=error) as new, _as_error(path, error):
        new.write_bytes(content)


def write_report(path: Path, text: str, *starts: str, error: type[HpsError]) -> None:
    """Write a file of text that begins with one of ``starts``, as a file that is there must; or into a device or FIFO.

    Raises:
        HpsError, of the type ``error``: there is another file, which is not replaced, a FIFO that nobody reads, or the text
            cannot be written.
    """
    content, heads = text.encode(errors="surrogateescape"), tuple(start.encode().lower() for start in starts)
    try:
        mode = path.stat().st_mode
    except OSError:  # there is nothing yet; what else is wrong shows below
        mode = stat.S_IFREG
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        replace_file(path, content, file_judge("such a report", lambda found: found.lower().startswith(heads)), error=error)
        return
    with _as_error(path, error):
        descriptor = os.open(path, os.O_WRONLY | _NO_WAITING)
        os.set_blocking(descriptor, True)
        with os.fdopen(descriptor, "wb") as device:
            device.write(content)


@contextmanager
def _as_error(path: Path, error: type[HpsError]) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{path}: cannot be written: {problem.strerror or problem}") from problem


def leftovers(target: Path) -> list[Path]:
    """Workspaces of writers of ``target``, dead or alive."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*{_SUFFIX}"))


def check_target(path: Path, target: Path, overwrite: bool, judge: Judge, error: type[HpsError]) -> None:
    """Raise ``error`` unless something new may take the place of ``target``, which ``path`` led to."""
    if not target.name:
        raise error(f"{path}: expected the name of a file or directory to write, got the root directory")
    if not target.parent.is_dir():
        raise error(f"{path}: there is no directory {target.parent} to write it to")
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    if not overwrite:
        raise error(f"{path}: exists already; pass overwrite=True to replace it")
    reason = _objection(target, judge)
    if reason is not None:
        raise error(f"{path}: {reason}; it is not replaced")


def _objection(place: Path, judge: Judge) -> str | None:
    """Why what lies at ``place`` must not be replaced; None if it may be, or is gone."""
    try:
        status = os.lstat(place)
    except FileNotFoundError:  # another writer is replacing it at this moment
        return None
    if stat.S_ISDIR(status.st_mode):
        if _is_working_directory(place):
            return "is the working directory"
    elif not stat.S_ISREG(status.st_mode):
        return f"is {kind_of(status.st_mode)}"
    elif status.st_size == 0:
        return None
    return judge(place)


def _is_working_directory(place: Path) -> bool:
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return False
    return any(place.samefile(folder) for folder in (here, *here.parents))


class _Place:
    """Where the finished ``workspace/new`` goes.

    Attributes:
        holds_something_else: what came out of the place must not be deleted and could not be put back.
    """

    def __init__(self, path: Path, target: Path, workspace: Path, overwrite: bool, judge: Judge, error: type[HpsError]) -> None:
        self._path, self._target, self._workspace = path, target, workspace
        self._overwrite, self._judge, self._error = overwrite, judge, error
        self.holds_something_else = False

    def put(self) -> None:
        """Put it there, by the surest way that the file system knows."""
        whole = self._workspace / "new"
        (self._workspace / _PLACING).touch()
        self._check()
        while not self._try_to_put(whole):
            self._check()
        _sync_entry(self._target.parent)

    def _check(self) -> None:
        check_target(self._path, self._target, self._overwrite, self._judge, self._error)

    def _try_to_put(self, whole: Path) -> bool:
        """False: something came to the place, or left it, since it was checked."""
        try:
            rename.rename_new(whole, self._target)
        except FileExistsError:
            return self._overwrite and self._try_to_swap(whole)
        except OSError:
            self._put_by_renames(whole)
        return True

    def _try_to_swap(self, whole: Path) -> bool:
        try:
            rename.swap(whole, self._target)
        except FileNotFoundError:
            return False
        except OSError:
            self._put_by_renames(whole)
            return True
        self._judge_or_put_back(whole, rename.swap)
        return True

    def _put_by_renames(self, whole: Path) -> None:
        target, old = self._target, self._workspace / "old"
        self._check()
        if target.is_dir() or (whole.is_dir() and os.path.lexists(target)):
            target.rename(old)
            self._judge_or_put_back(old, Path.rename)
        whole.replace(target)

    def _judge_or_put_back(self, taken: Path, back: Callable[[Path, Path], object]) -> None:
        """Look again at what came out of the place: it may be another thing than the one that was checked."""
        reason = _objection(taken, self._judge)
        if reason is None:
            return
        try:
            back(taken, self._target)
        except OSError as problem:
            self.holds_something_else = True
            raise self._error(f"{self._path}: what came there meanwhile {reason}; it is now at {taken}: {problem}") from problem
        raise self._error(f"{self._path}: what came there meanwhile {reason}; it is not replaced")


def _new_workspace(target: Path) -> tuple[Path, int]:
    """A locked workspace and the descriptor of its lock."""
    while True:
        workspace = Path(tempfile.mkdtemp(_SUFFIX, f".{target.name}.", target.parent))
        try:
            lock = os.open(workspace / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        except FileNotFoundError:  # swept away by another writer before there was a lock
            continue
        _locked(lock, wait=True)
        if os.fstat(lock).st_nlink:
            try:
                os.ftruncate(lock, 0)
                os.write(lock, _this_machine())
            except OSError:  # the disk is full
                _discard(workspace, target)
                os.close(lock)
                raise
            return workspace, lock
        os.close(lock)  # swept away by another writer before it was locked


def _this_machine() -> bytes:
    """What names the machine among those that share its locks: the running kernel, which containers have in common."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:
        return platform.node().encode()


def _locked(lock: int, *, wait: bool) -> bool:
    """Lock the file until its descriptor is closed or the process ends. False: held by another, or no locks here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(workspace: Path, target: Path, judge: Judge) -> None:
    """Roll back and delete a workspace unless its writer lives, or it holds what ``judge`` would not have deleted.

    A workspace without a lock is that of a writer that died while it was deleting it, or that has only just begun: the latter
    finds itself without a workspace, and begins again.
    """
    try:
        lock = os.open(workspace / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        return  # gone, or another user's
    try:
        if not _locked(lock, wait=False) or not _writer_is_dead(workspace, lock):
            return
        for place in _perhaps_from_target(workspace, target):
            reason = _objection(place, judge)
            if reason is not None:
                _log.warning("%s: left by a writer that was killed, and kept: it %s", place, reason)
                return
        _discard(workspace, target)
    finally:
        os.close(lock)


def _perhaps_from_target(workspace: Path, target: Path) -> Iterator[Path]:
    """What may have been at the target and would be deleted with the workspace."""
    if os.path.lexists(workspace / _PLACING):
        yield workspace / "new"
    if os.path.lexists(target):  # else it goes back there
        yield workspace / "old"


def _writer_is_dead(workspace: Path, lock: int) -> bool:
    """Whether a lock that nobody here holds has no holder: on another machine it may be held without our seeing it."""
    writer = os.pread(lock, 256, 0)
    if not writer or writer == _this_machine():
        return True
    ages = [os.lstat(entry).st_mtime for entry in (workspace, *workspace.rglob("*")) if os.path.lexists(entry)]
    with tempfile.TemporaryFile(dir=workspace.parent) as clock:  # the time of the file server, not ours
        now = os.fstat(clock.fileno()).st_mtime
    return now - max(ages, default=now) > _FOREIGN_SECONDS


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
    with suppress(OSError):  # the lock goes last, so that the next writer can tell whose the rest is
        (workspace / _PLACING).unlink(missing_ok=True)
        for entry in workspace.iterdir():
            if entry.name != "lock":
                _delete(entry)
    shutil.rmtree(workspace, ignore_errors=True)


def _delete(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


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
