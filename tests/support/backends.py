"""A backend whose kernels run as plain Python."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numpy as np

from hps_numba.cache.backends import CpuBackend
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.compiler.specialize import bindings


class PlainKernel:
    """A kernel as plain Python."""

    def __init__(self, spec: KernelSpec, **names: Any) -> None:
        self._run: FunctionType = bindings(spec, lambda function: function, names)

    def launch(self, blocks: int, stream: int, *args: Any, threads: int = 1, rows: int = 1) -> None:
        with np.errstate(all="ignore"):
            self._run(*args)


class PlainBackend(CpuBackend):
    """The memory of the process, and kernels that are not compiled."""

    def kernel(self, spec: KernelSpec) -> Any:
        return PlainKernel(spec)
