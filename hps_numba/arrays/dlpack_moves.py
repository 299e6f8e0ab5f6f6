"""Capsules on both sides of a lookup, wherever each lies: keys read from, and rows written to, the memory of any device.

Keys and output on one GPU that has the rows are ``arrays.batch.DeviceBatch``: nothing is copied, nothing waits. Here is the
rest: the output is elsewhere than the keys, or their GPU has no cache of the table. What crosses is a temporary, and the call
returns when the rows are there, as the memory of the host knows no streams.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps_numba.arrays.batch import HostBatch
from hps_numba.arrays.cuda import as_device_keys
from hps_numba.arrays.cuda_memory import device_of_array
from hps_numba.arrays.cuda_outputs import as_device_output
from hps_numba.arrays.dlpack import DeviceMemory, cuda_memory_of, is_capsule
from hps_numba.arrays.host_outputs import as_output
from hps_numba.arrays.kinds import Finish
from hps_numba.arrays.streams import ambient_stream, stream_handle
from hps_numba.device import memory as device_memory
from hps_numba.device import streams
from hps_numba.device.driver import current
from hps_numba.errors import ArrayError, KeyDtypeError
from hps_numba.kernels.dtypes import ELEMENT_BYTES

__all__ = ["MovedBatch", "keys_on_host", "settle", "write_rows"]


class MovedBatch:
    """A call whose keys are on a GPU that answers it, and whose output is elsewhere. Used as ``arrays.batch.DeviceBatch``.

    Args:
        keys: integers on a GPU.   dim, output_type, key_bits: as for ``DeviceBatch``.
        out: in host memory or on another GPU, with room for at least the rows; the first elements, in C order, are written.
        out_name: what ``out`` is called, for messages.

    Attributes:
        keys: addresses.   bags: None.   address: of rows on the GPU of the keys.   stream: to fill them on.

    Raises:
        KeyDtypeError, ArrayError, DeviceError, CapacityError: as ``DeviceBatch``.
    """

    def __init__(self, keys: Any, dim: int, output_type: str, key_bits: int, out: Any, *, out_name: str) -> None:
        self.bags = None
        self.keys = seen = as_device_keys(keys, key_bits=key_bits)
        self.stream = stream_handle(None, seen.kind, seen.device)
        self._shape, self._out = (*seen.shape, dim), out
        self._target = _open(out, self._shape, output_type, out_name)
        size = math.prod(self._shape) * ELEMENT_BYTES[output_type]
        self._memory = device_memory.allocate(seen.device, size, f"{out_name}: rows on their way to it")
        self.address = self._memory.address

    def result(self) -> Any:
        """Move the rows to ``out``, when the work is on the stream; returns ``out`` when they are there."""
        with current(self.keys.device):
            self._target.take_from(self._memory, self.stream)
            streams.synchronize(self.stream)
        self._target.finish()
        self._memory.release()
        return self._out


class _HostTarget:
    def __init__(self, rows: NDArray[Any], finish: Finish) -> None:
        self._rows, self.finish = rows, finish

    def take_from(self, source: device_memory.DeviceRegion, stream: int) -> None:
        device_memory.to_host(self._rows, source.address, stream)


class _DeviceTarget:
    def __init__(self, out: Any, shape: tuple[int, ...], output_type: str, device: int, place: str) -> None:
        self.device, self.stream = device, ambient_stream(device)
        opened = as_device_output(out, shape, output_type, device, larger=True, place=place, stream=self.stream)
        self.address, self.finish, self._keep = opened

    def take_from(self, source: device_memory.DeviceRegion, stream: int) -> None:
        with current(self.device):
            streams.synchronize(self.stream)  # whoever uses the output is done with it
        device_memory.copy(self.address, source.address, source.size, stream)

    def take(self, rows: NDArray[Any]) -> None:
        with current(self.device):
            device_memory.to_device(self.address, rows, self.stream)
        self.finish()


def _open(out: Any, shape: tuple[int, ...], output_type: str, place: str) -> _HostTarget | _DeviceTarget:
    device = device_of_array(out)
    if device is not None:
        return _DeviceTarget(out, shape, output_type, device, place)
    if output_type == "bfloat16":  # NumPy has none
        raise ArrayError(f"{place}: expected memory on a GPU for rows of bfloat16, got host memory")
    return _HostTarget(*as_output(out, shape, output_type, larger=True, place=place))


def write_rows(keys: Any, dim: int, output_type: str, key_bits: int, out: Any, *, out_name: str) -> tuple[HostBatch, Finish]:
    """A batch of keys in host memory whose output is a capsule on a GPU; call the second when it is filled.

    Raises:
        As ``HostBatch`` and ``as_device_output``.
    """
    batch = HostBatch(keys, dim, output_type, key_bits)
    rows = batch.rows
    device = device_of_array(out)
    assert device is not None
    target = _DeviceTarget(out, (len(batch.keys), dim), output_type, device, out_name)
    return batch, lambda: target.take(np.ascontiguousarray(rows, np.dtype(output_type)))


def keys_on_host(keys: Any, *, place: str = "keys") -> Any:
    """A capsule on a GPU as a copy in host memory, of the same shape and dtype; anything else as it is.

    Raises:
        KeyDtypeError: a malformed capsule, or a dtype that NumPy has not.   DeviceError: the driver refuses.
    """
    if not is_capsule(keys) or device_of_array(keys) is None:
        return keys
    memory = cuda_memory_of(keys, place=place, error=KeyDtypeError)
    try:
        dtype = np.dtype(memory.dtype)  # with ml_dtypes loaded, NumPy knows bfloat16 too
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in "iufb":
        expected = "expected integers (int64, int32, uint64, ...)"
        raise KeyDtypeError(f"{place}: {expected}, got capsule of dtype {memory.dtype}")
    if 0 in memory.shape:
        return np.empty(memory.shape, dtype)
    low, high = _span(memory)
    held = np.empty(high - low, np.uint8)
    with current(memory.device):
        device_memory.to_host(held, memory.address + low, ambient_stream(memory.device))
    return np.ndarray(memory.shape, dtype, held.data, -low, memory.strides)


def _span(memory: DeviceMemory) -> tuple[int, int]:
    """Where the elements begin and end, in bytes from the address."""
    if memory.strides is None:
        return 0, memory.itemsize * math.prod(memory.shape)
    reach = [stride * (size - 1) for stride, size in zip(memory.strides, memory.shape)]
    return sum(step for step in reach if step < 0), memory.itemsize + sum(step for step in reach if step > 0)


def settle(*arrays: Any) -> None:
    """Wait for the GPUs of capsules whose framework says nothing of its streams: TensorFlow's are private.

    Capsules of Torch and CuPy are ordered by their current streams (``arrays.streams``), which costs no wait; which framework
    made a capsule is unknown, so this waits only where TensorFlow is imported, and never while the stream is captured.
    """
    if sys.modules.get("tensorflow") is None:
        return
    for device in {device_of_array(array) for array in arrays if is_capsule(array)} - {None}:
        assert device is not None
        if not streams.is_capturing(ambient_stream(device)):
            streams.synchronize_device(device)
