"""Machine code of kernels on disk, for GPUs and for the CPU: found again, never trusted, never required.

A file is named after the kernel, a digest of the text of all kernel sources and the versions of the compilers, and a digest of
what the code was made for. It repeats that name inside, under a checksum, so that a truncated, damaged or misplaced file is
recognized: then the kernel is compiled again and the file replaced. Files appear atomically (``os.replace``), so that any
number of processes may look for and keep the same one. Code that another user could have written is not run: files, and the
folder that they are in, must belong to the user, and no other may be able to write them or to replace a folder above. What is
no file of this cache, such as a link, is neither read nor replaced nor removed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import re
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hps_numba.kernels.compiler.safely import compile_lock

__all__ = [
    "FOLDERS",
    "MAX_FILES",
    "digest_of_sources",
    "find",
    "find_result",
    "folder",
    "host_target",
    "keep",
    "keep_result",
    "name_of",
    "source_digest",
    "user_cache",
]

log = logging.getLogger(__name__)

MAX_FILES = 400  # with more in the folder, those made from other sources are removed
FOLDERS = {".cubin": "cuda", ".object": "cpu"}  # by how the names of files end
_MAGIC = b"HPSK2\n"
_CHECKSUM = hashlib.sha256().digest_size
_ABANDONED = 3600.0  # seconds after which an unfinished file no longer has a writer
_PACKAGES = (
    "numba-cuda",
    "numba",
    "llvmlite",
    "cuda-core",
    "nvidia-nvjitlink",
    "nvidia-nvvm",
    "nvidia-nvjitlink-cu12",
    "nvidia-cuda-nvcc-cu12",
)
_OUR_NAME = re.compile(r".+-[0-9a-f]{16}-[0-9a-f]{32}\.(cubin|object)|tmp\w+\.part")
_MAX_BYTES = 1 << 28  # of a file
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_warned = False


def _versions() -> list[str]:
    found = [sys.implementation.cache_tag or sys.version, getattr(sys, "abiflags", "")]
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def user_cache() -> Path:
    """The folder for what this user's processes keep, whatever their working directory; it need not exist.

    HPS_NUMBA_CACHE_DIR, else ``hps_numba`` in the system's folder for caches: on Linux in XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: the user has no home directory.
    """
    chosen = os.environ.get("HPS_NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    from platformdirs import user_cache_path

    folder = user_cache_path("hps_numba", appauthor=False)
    if not folder.is_absolute():
        raise RuntimeError(f"the cache folder {folder} is not absolute: there is no home directory")
    return folder


def digest_of_sources(folder: Path, before: str = "") -> str:
    """Digest (hex) of ``before`` and of the names and texts of all Python files below a folder."""
    digest = hashlib.sha256(before.encode())
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"\n{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


@functools.cache
def source_digest() -> str:
    """Digest (hex) of all files whose text may become part of a kernel, and of the versions of their compilers."""
    return digest_of_sources(Path(__file__).parents[1], ", ".join(_versions()))[:16]


def host_target(target: Any) -> str:
    """What machine code for the CPU depends on besides its source: compiler, options, processor and its features.

    Args:
        target: numba's context of the CPU.
    """
    import llvmlite
    import numba

    config = numba.config
    options = [str(config.OPT), config.DEBUGINFO_DEFAULT, config.LOOP_VECTORIZE, config.SLP_VECTORIZE]
    return repr((numba.__version__, llvmlite.__version__, options, target.codegen().magic_tuple()))


def name_of(kernel: str, made_for: str, ending: str = ".cubin") -> str:
    """Name of the file of a kernel; ``made_for``: what its code depends on besides the sources; ``ending``: see FOLDERS."""
    return f"{kernel}-{source_digest()}-{hashlib.sha256(made_for.encode()).hexdigest()[:32]}{ending}"


def folder(ending: str = ".cubin") -> Path | None:
    """The folder of the files, mode 0700; None (with one WARNING a process) if there is none that only this user can write."""
    try:
        cache = user_cache()
        chosen = cache / FOLDERS[ending]
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        chosen.mkdir(mode=0o700, exist_ok=True)
        _check_above(cache)
        _check_folder(chosen)
        if not os.access(chosen, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(f"{chosen} is not writable")
    except (OSError, RuntimeError) as problem:
        _warn(problem)
        return None
    return chosen


def _check_above(cache: Path) -> None:
    """Raise PermissionError if another user can replace the folder of the cache or one above it."""
    if not hasattr(os, "getuid"):
        return
    owners = {os.getuid(), 0, os.stat("/").st_uid}  # noqa: PTH116
    resolved = cache.resolve()
    for place in (resolved, *resolved.parents):
        status = place.stat()
        if status.st_uid not in owners:
            raise PermissionError(
                f"{place}: expected a folder of user {os.getuid()} or of root, got one of user {status.st_uid}"
            )
        if status.st_mode & _OTHERS_WRITE and not status.st_mode & stat.S_ISVTX and not _writable_by_owner_alone(status):
            mode = stat.S_IMODE(status.st_mode)
            raise PermissionError(f"{place}: expected a folder that no other user can write, got mode {mode:o}; chmod go-w it")


def _writable_by_owner_alone(status: os.stat_result) -> bool:
    """Whether the one group that may write has no member but this user, as where every user has a group of that name."""
    if status.st_mode & stat.S_IWOTH:
        return False
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == status.st_gid and set(group.gr_mem) <= {user.pw_name}


def _check_folder(chosen: Path) -> None:
    """Raise PermissionError for a link, and for a folder that another user owns or can write: code from there is not run."""
    if not hasattr(os, "getuid"):
        return
    status = chosen.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{chosen}: expected a folder, got a link")
    if status.st_uid != os.getuid():
        raise PermissionError(f"{chosen}: expected a folder of user {os.getuid()}, got one of user {status.st_uid}")
    if status.st_mode & _OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise PermissionError(
            f"{chosen}: expected a folder that no other user can write, got mode {mode:o}; remove it, or chmod go-w it"
        )
    if status.st_mode & 0o077:
        chosen.chmod(0o700)


def _read(file: Path) -> bytes:
    """The content of a file of the user's own: others may have put theirs here while the folder was open to them."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(file, flags), "rb") as opened:  # noqa: PTH123
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise OSError(f"expected a file of at most {_MAX_BYTES} bytes, got mode {status.st_mode:o}, {status.st_size} bytes")
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & _OTHERS_WRITE):
            raise PermissionError(
                f"expected a file of this user, writable by no other, got user {status.st_uid}, mode {status.st_mode & 0o777:o}"
            )
        return opened.read()


def _warn(problem: Exception) -> None:
    global _warned
    with compile_lock:  # which a forked child can take
        if not _warned:
            _warned = True
            log.warning("compiled kernels are not kept on disk: %s (HPS_NUMBA_CACHE_DIR names another folder)", problem)


def find(name: str) -> tuple[bytes, str] | None:
    """``(machine code, symbol)`` of a file; None if there is no such file, or (with a WARNING) if it is not valid."""
    place = folder(Path(name).suffix)
    if place is None:
        return None
    try:
        data = _read(place / name)
    except FileNotFoundError:
        return None
    except OSError as problem:
        log.warning("%s: cannot be read, compiled again: %s", place / name, problem)
        return None
    head = _MAGIC + name.encode() + b"\n"
    body = data[len(head) + _CHECKSUM :]
    if data[: len(head) + _CHECKSUM] != head + hashlib.sha256(body).digest():
        log.warning("%s: damaged or not the file of this kernel, compiled again", place / name)
        return None
    symbol, _, code = body.partition(b"\n")
    return code, symbol.decode()


def keep(name: str, code: bytes, symbol: str) -> None:
    """Write or replace a file. Where that fails, one WARNING a process."""
    place = folder(Path(name).suffix)
    if place is None:
        return
    body = symbol.encode() + b"\n" + code
    try:
        _replace(place / name, _MAGIC + name.encode() + b"\n" + hashlib.sha256(body).digest() + body)
        _sweep(place)
    except OSError as problem:
        _warn(problem)


def find_result(name: str, target: Any) -> Any:
    """numba's result of a compilation for the CPU, restored from a file without compiling; None where ``find`` has none.

    Args:
        target: numba's context of the CPU.
    """
    from numba.core.compiler import CompileResult
    from numba.core.compiler_lock import global_compiler_lock

    kept = find(name)
    if kept is None:
        return None
    try:
        with global_compiler_lock:  # numba allows one thread at a time
            target.refresh()
            return CompileResult._rebuild(target, *pickle.loads(kept[0]))
    except Exception as problem:  # what numba has written may raise anything
        log.warning("%s: cannot be used, compiled again: %s: %s", name, type(problem).__name__, problem)
        return None


def keep_result(name: str, result: Any) -> None:
    """``keep`` a result of numba's, as numba's own disk cache would write it; DEBUG if it cannot be written."""
    from numba.core.serialize import dumps

    if result.lifted or result.library.has_dynamic_globals:
        log.debug("%s: not kept: the code holds addresses of this process", name)
        return
    try:
        code = dumps(result._reduce())
    except Exception as problem:
        log.debug("%s: not kept: %s: %s", name, type(problem).__name__, problem)
        return
    keep(name, code, result.fndesc.llvm_func_name)


def _replace(file: Path, data: bytes) -> None:
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise OSError(f"{file}: expected a file or nothing, got something else, which stays")
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as out:
        written = Path(out.name)
        try:
            out.write(data)
            out.close()
            written.replace(file)
        except BaseException:
            with suppress(OSError):
                written.unlink()
            raise


@functools.cache
def _sweep_old_folders(cache: Path) -> None:
    """Remove the files of numba's own disk cache in folders ``host-<digest>``, of versions up to 0.1; once a process."""
    for old in cache.glob("host-" + "[0-9a-f]" * 16):
        if old.is_dir() and not old.is_symlink():
            with suppress(OSError):  # others may sweep too; a folder that has more in it stays
                for file in (*old.rglob("*.nbi"), *old.rglob("*.nbc")):
                    file.unlink()
                for inside in sorted(old.rglob("*"), reverse=True):
                    inside.rmdir()
                old.rmdir()


def _sweep(place: Path) -> None:
    """If there are many files, remove those made from other sources and what dead writers left. Others may do so too."""
    _sweep_old_folders(place.parent)
    files = list(place.iterdir())
    if len(files) <= MAX_FILES:
        return
    ours = f"-{source_digest()}-"
    for file in files:
        with suppress(OSError):
            if not _OUR_NAME.fullmatch(file.name) or not stat.S_ISREG(file.lstat().st_mode):
                continue  # somebody else's
            abandoned = file.suffix == ".part" and time.time() - file.stat().st_mtime > _ABANDONED
            if abandoned or (file.suffix in FOLDERS and ours not in file.name):
                file.unlink()
