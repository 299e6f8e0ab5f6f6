"""Cache kernels for the CPU: compiled by numba on first call, or found in the cache folder.

*Why numba's own disk cache is not used.* It finds code by the file and line of a function, which all copies made by ``bind``
share, so that it would take one for another or find none. ``compiler.disk_cache`` keeps the machine code instead.
"""

from __future__ import annotations

import hashlib
from types import FunctionType
from typing import Any

from hps_numba.kernels.compiler import disk_cache
from hps_numba.kernels.compiler.diagnosis import refused
from hps_numba.kernels.compiler.safely import compile_lock, run_safely
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.compiler.specialize import bind

__all__ = ["HostKernel", "for_host"]


class HostKernel:
    """A kernel for the CPU: called with the arguments of its source, run without the GIL.

    On the first call it comes from the cache folder, else it is compiled and put there.

    Thread safety: call it from any thread.

    Raises, when first called:
        PolicyError: the functions of the policy do not compile.   DeviceError: the kernel does not.
    """

    def __init__(self, spec: KernelSpec) -> None:
        self._spec = spec
        self._entry: Any = None
        self._owner: Any = None  # lives as long as its code may run

    def __call__(self, *args: Any) -> None:
        (self._entry or self._compile())(*args)

    def ready(self) -> None:
        """Compile it now, unless that is done."""
        self._compile()

    def _compile(self) -> Any:
        run_safely(self._compile_once)
        return self._entry

    def _compile_once(self) -> None:
        with compile_lock:
            if self._entry is None:
                try:
                    self._entry, self._owner = _entry_point(self._spec)
                except Exception as problem:
                    raise refused(self._spec, "the CPU", problem, _compile_scalar) from problem


_host_kernels: dict[tuple[Any, ...], HostKernel] = {}


def for_host(spec: KernelSpec) -> HostKernel:
    """The kernel of a spec for the CPU: one a process, whatever ``lanes``, ``group``, ``depth``, ``registers``,
    ``by_tile`` and ``out_vector``, which mean nothing there.   Thread safety: any thread."""
    key = _host_key(spec)
    kernel = _host_kernels.get(key)
    return _host_kernels.setdefault(key, HostKernel(spec)) if kernel is None else kernel


def _host_key(spec: KernelSpec) -> tuple[Any, ...]:
    return spec.name, spec.dim, spec.policy.digest, spec.fixed, spec.row_type, spec.out_type, spec.key_form


def _entry_point(spec: KernelSpec) -> tuple[Any, Any]:
    """``(function, owner of its code)`` for the kernel of a spec: from the cache folder, else compiled and put there."""
    from numba.core.registry import cpu_target

    target = cpu_target.target_context
    name = disk_cache.name_of(spec.name, f"{_host_key(spec)!r} {disk_cache.host_target(target)}", ".object")
    result = disk_cache.find_result(name, target)
    if result is not None:
        return result.entry_point, result
    dispatcher = _compile_for_host(spec)
    (result,) = dispatcher.overloads.values()
    disk_cache.keep_result(name, result)
    return result.entry_point, dispatcher


def _compile_for_host(spec: KernelSpec) -> Any:
    """numba's dispatcher for the kernel of a spec, compiled for the types of its arguments.

    numba's linker knows the functions of a process by their names, and of two with one name it takes the first; the numbers
    that numba adds start from 1 in each process. So the names of functions contain a digest of what they are bound to.
    """
    import numba

    from hps_numba.kernels.simt.cpu import NAMES

    tag = hashlib.sha256(repr(_host_key(spec)).encode()).hexdigest()[:16]

    def wrap(function: FunctionType) -> Any:
        return numba.njit(nogil=True, error_model="numpy")(_tagged(function, tag))

    arguments = spec.argument_types(numba.types)
    function = _tagged(bind(spec.function, {**spec.for_one_lane, **NAMES}, wrap), tag)
    return numba.njit(numba.void(*arguments), nogil=True, error_model="numpy")(function)


def _tagged(function: FunctionType, tag: str) -> FunctionType:
    """A function that ``bind`` made, with a name of its own, in a module that every process can import."""
    function.__qualname__ = f"{function.__qualname__}_{tag}"
    if not function.__module__.startswith("hps_numba."):  # of a user's policy
        function.__module__ = function.__globals__["__name__"] = __name__
    return function


def _compile_scalar(function: FunctionType, signature: Any) -> None:
    import numba

    numba.njit(signature)(bind(function, {}, numba.njit))
