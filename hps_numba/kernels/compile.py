"""Builds host kernels: compiled by numba on first call, without the GIL, and kept on disk.

*Why a folder of our own.* numba keys its disk cache by the file a function stands in, so a kernel that inlined a function of
another file would survive a change of that file. The folder is named after the text of all kernel sources instead: any change
of any kernel starts a new one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba

__all__ = ["cache_folder", "host_function", "host_kernel", "user_cache"]

log = logging.getLogger(__name__)
_decorating = threading.Lock()  # numba's cache folder is process-wide while a function is decorated


def user_cache() -> Path:
    """The folder for what this user's processes keep, wherever they run; it need not exist.

    HPS_NUMBA_CACHE_DIR, else hps_numba in XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get("HPS_NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hps_numba"


@functools.cache
def _source_digest() -> str:
    here = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for file in [*sorted(here.rglob("*.py")), here.parent / "layout.py", here.parent / "cache_layout.py"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def cache_folder() -> Path | None:
    """The folder for compiled host kernels, mode 0700; None (with one WARNING) if no writable one exists."""
    try:
        folder = user_cache() / f"host-{_source_digest()}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as problem:
        log.warning("kernels are compiled anew in each process: %s (HPS_NUMBA_CACHE_DIR names another folder)", problem)
        return None
    return folder


def host_kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` for the CPU: on first call, GIL released, C division, kept on disk."""
    folder = cache_folder()
    with _decorating:
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder or "")
        try:
            kernel = numba.njit(nogil=True, error_model="numpy", cache=folder is not None)(function)
        finally:
            numba.config.CACHE_DIR = before
    if folder is not None:
        kernel._cache = _ForgivingCache(kernel._cache)
    return kernel


class _ForgivingCache:
    """numba's disk cache of one kernel, but a damaged or vanished file means "compile anew" and not an error."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return self._cache.load_overload(signature, context)
        except Exception as problem:  # unpickling garbage raises anything
            log.debug("%s: compiled anew: %s", self._cache.cache_path, problem)
            self._flush()
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            self._cache.save_overload(signature, data)
        except Exception as problem:
            log.debug("%s: not kept: %s", self._cache.cache_path, problem)

    def _flush(self) -> None:
        try:
            self._cache.flush()
        except OSError as problem:
            log.debug("%s: cannot be emptied: %s", self._cache.cache_path, problem)


def host_function(function: Callable[..., Any]) -> Any:
    """Compile ``function`` for use inside host kernels; it becomes part of their code.

    Plain functions that it calls (the scalar pieces are plain Python) are compiled with it.
    """
    return _host_functions(function)


@functools.cache
def _host_functions(function: Callable[..., Any]) -> Any:
    names = function.__code__.co_names
    scope = function.__globals__
    calls = {name: _host_functions(scope[name]) for name in names if isinstance(scope.get(name), FunctionType)}
    bound = FunctionType(function.__code__, {**scope, **calls}, function.__name__)
    return numba.njit(nogil=True, error_model="numpy")(bound)
