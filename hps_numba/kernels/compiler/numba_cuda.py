"""The one place that imports numba's CUDA target: numba-cuda if it is installed, as ``numba.cuda``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba import cuda, types

try:
    from numba.cuda.extending import intrinsic
except ImportError:  # numba's own target, which has the simulator
    from numba.extending import intrinsic

try:
    from numba.cuda.np.arrayobj import make_array, populate_array
except ImportError:
    from numba.np.arrayobj import make_array, populate_array

from hps_numba.kernels.compiler.safely import compile_lock

__all__ = ["compile_ptx", "cuda", "intrinsic", "make_array", "populate_array", "types"]


class _Chip:
    """The part of a device that numba queries while it compiles."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.compute_capability = capability


@contextmanager
def _for_chip(capability: tuple[int, int]) -> Iterator[None]:
    """The calling thread's device functions are compiled for a chip.

    They query the current device for its capability, and there may be none, or another one. Other threads, which may run numba
    kernels of their own meanwhile, get the device that they always got.
    """
    from numba.cuda import dispatcher

    thread, chip = threading.get_ident(), _Chip(capability)
    with compile_lock:
        before = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: chip if threading.get_ident() == thread else before()
        try:
            yield
        finally:
            dispatcher.get_current_device = before


def compile_ptx(kernel: Any, signature: Any, capability: tuple[int, int], *, device: bool = False) -> str:
    """PTX of a kernel for a chip, which need not be in this machine.   Thread safety: any thread, one at a time.

    Args:
        kernel: a plain function that returns nothing; with ``device``, one that kernels call.
        signature: a tuple of the numba types of its arguments; with ``device``, a signature with the type of the result.
        capability: (major, minor) of the chip.
    """
    with _for_chip(capability):
        ptx: str = cuda.compile(kernel, signature, device=device, abi="numba", cc=capability, output="ptx")[0]
    return ptx
