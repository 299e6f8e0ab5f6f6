"""PTX of cache kernels: compiled by numba for a chip, which need not be in this machine."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from hps_numba.errors import ConfigError, DeviceError
from hps_numba.kernels.compiler.diagnosis import first_line, refused
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.compiler.specialize import bind

__all__ = ["ptx_of", "uses_pdl"]

_LANES = (4, 8)


def ptx_of(spec: KernelSpec, capability: tuple[int, int]) -> str:
    """PTX of a kernel for a chip, which need not be in this machine.

    Raises:
        DeviceError: numba-cuda is missing, or the kernel does not compile.
        PolicyError: the functions of the policy do not compile.
        ConfigError: a tile of so many lanes does not exist.
    """
    if spec.lanes not in _LANES:
        raise ConfigError(f"kernel {spec.name!r}: expected lanes to be 4 or 8 on a GPU, got {spec.lanes}")
    if spec.by_tile and (spec.lanes, spec.group) != (8, 4):
        raise ConfigError(
            f"kernel {spec.name!r}: expected lanes=8, group=4 with by_tile, got lanes={spec.lanes}, group={spec.group}"
        )
    try:
        from hps_numba.kernels.compiler.numba_cuda import compile_ptx
    except ImportError as problem:
        raise DeviceError(
            f"{spec.name}: numba's CUDA target does not import ({first_line(problem)}): install hps-numba[cuda12] or [cuda13]"
        ) from problem

    def compile_scalar(function: FunctionType, signature: Any) -> None:
        compile_ptx(bind(function, {}, _device_function), signature, capability, device=True)

    try:
        return _compile_for_chip(spec, capability)
    except Exception as problem:
        raise refused(spec, f"sm_{capability[0]}{capability[1]}", problem, compile_scalar) from problem


def uses_pdl(spec: KernelSpec, capability: tuple[int, int]) -> bool:
    """Whether the kernel is started while the one before it on the stream still runs, and waits for its end by itself.

    This hides the time to start a kernel (programmatic dependent launch; CUDA C++ Programming Guide). From Hopper on.
    """
    return capability >= (9, 0) and spec.source.pdl


def _device_function(function: FunctionType) -> Any:
    from hps_numba.kernels.compiler.numba_cuda import cuda

    return cuda.jit(device=True)(function)


def _compile_for_chip(spec: KernelSpec, capability: tuple[int, int]) -> str:
    from hps_numba.kernels.compiler.numba_cuda import compile_ptx, types
    from hps_numba.kernels.simt.cuda import names

    constants = spec.constants
    target = names(
        lanes=spec.lanes,
        uniform=spec.source.whole_warps,
        out_vector=spec.out_vector,
        pdl=uses_pdl(spec, capability),
        copies=capability >= (8, 0),
        constants=constants,
        device=_device_function,
    )
    function = bind(spec.function, {**constants, **target}, _device_function)
    signature = spec.argument_types(types)
    return compile_ptx(function, signature, capability)
