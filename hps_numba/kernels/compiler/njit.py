"""Host kernels: compiled by numba on first call, run without the GIL, and kept on disk (``compiler.disk_cache``).

*Why not numba's own disk cache.* It finds code by the file that a function is in, so a kernel that inlined a function of
another file would survive a change of that file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy.ma  # noqa: F401  # else numba does, outside its lock, and a child forked meanwhile could not

from hps_numba.kernels.compiler import disk_cache
from hps_numba.kernels.compiler.safely import safe_dispatcher

__all__ = ["host_function", "host_kernel", "safe_dispatcher"]


def host_kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` for the CPU on first call: GIL released, C division, kept on disk."""
    kernel = numba.njit(nogil=True, error_model="numpy")(function)
    kernel._cache = _DiskCache(function)
    return safe_dispatcher(kernel)


class _DiskCache:
    """The disk cache of one kernel, as numba's dispatcher uses it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self._module = function.__module__

    @property
    def cache_path(self) -> str:
        """The folder of the files."""
        return str(disk_cache.folder(".object") or "")

    def load_overload(self, signature: Any, target: Any) -> Any:
        """numba's result of the compilation for these types; None if it has to be compiled."""
        return disk_cache.find_result(self._file_for(signature, target), target)

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep numba's result of a compilation."""
        disk_cache.keep_result(self._file_for(signature, result.target_context), result)

    def _file_for(self, signature: Any, target: Any) -> str:
        made_for = f"{self._module} {_digest_beside(self._module)} {signature} {disk_cache.host_target(target)}"
        return disk_cache.name_of(self._name, made_for, ".object")


@functools.cache
def _digest_beside(module: str) -> str:
    """Digest of the sources in the folder of a kernel outside of ``hps_numba.kernels``."""
    if module.startswith("hps_numba.kernels."):
        return ""  # ``source_digest`` has it
    return disk_cache.digest_of_sources(Path(str(sys.modules[module].__file__)).parent)


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
    return safe_dispatcher(numba.njit(nogil=True, error_model="numpy")(bound))
