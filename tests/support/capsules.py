"""Shared by tests: Forged, OnDevice, drop."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from hps_numba.arrays.dlpack import _Managed, _ManagedVersioned

NAMES = {name: name.encode() for name in ("dltensor", "dltensor_versioned", "used_dltensor", "something")}


new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class Forged:
    """A capsule whose struct the test fills in by itself; by default the 6 int64 keys 0..5 on the CPU."""

    def __init__(self, *, versioned: bool = False, name: str | None = None) -> None:
        self.memory = np.arange(6)
        self.struct = (_ManagedVersioned if versioned else _Managed)()
        if versioned:
            self.struct.major = 1
        tensor = self.tensor = self.struct.tensor
        tensor.data, tensor.ndim = self.memory.ctypes.data, 1
        tensor.device.type = 1
        tensor.dtype.bits, tensor.dtype.lanes = 64, 1
        self.shape((6,))
        self.capsule = new_capsule(
            ctypes.addressof(self.struct), NAMES[name or ("dltensor_versioned" if versioned else "dltensor")], None
        )

    def shape(self, shape: tuple[int, ...], strides: tuple[int, ...] | None = None) -> None:
        self.sizes = (ctypes.c_int64 * len(shape))(*shape)
        self.tensor.shape, self.tensor.ndim = ctypes.cast(self.sizes, ctypes.POINTER(ctypes.c_int64)), len(shape)
        if strides is not None:
            self.steps = (ctypes.c_int64 * len(strides))(*strides)
            self.tensor.strides = ctypes.cast(self.steps, ctypes.POINTER(ctypes.c_int64))


class OnDevice(Forged):
    """A capsule of an array of the host that says that its memory is on a CUDA device."""

    def __init__(self, memory: np.ndarray, device: int = 0, *, versioned: bool = False) -> None:
        super().__init__(versioned=versioned)
        self.memory = memory
        self.tensor.data = memory.ctypes.data if memory.size else None
        self.shape(memory.shape, tuple(stride // memory.itemsize for stride in memory.strides))
        self.tensor.device.type, self.tensor.device.id = 2, device
        self.tensor.dtype.bits = 8 * memory.itemsize
        self.tensor.dtype.code = {"i": 0, "u": 1, "f": 2, "b": 6}[memory.dtype.kind]


def drop(tensor: Any, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(tensor, name, value)
