"""One call in, one call out: keys of any kind are opened here, and the answer is handed over here, as the same kind.

A lookup meets the caller's arrays twice: when it makes a batch, which says where the keys are, how they are encoded and where
rows go, and when it asks for the batch's ``result()``. In between there are addresses and flat arrays only.

Choice: a class for each side of the bus, whose constructor opens the call. Host memory: ``keys`` int64 ``[n]`` and ``rows``
float32 ``[n, dim]``. CUDA memory: addresses and a stream. Turned down: one class for both, whose users ask at each step which
one it is; functions that open and a class that carries, which is a Python frame more a call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from hps_numba.arrays.bags import DeviceBags
from hps_numba.arrays.cuda import DeviceKeys, as_device_keys
from hps_numba.arrays.cuda_outputs import as_device_output, new_device_output
from hps_numba.arrays.encodings import KEY_ALIGNMENT, OUTPUT_TYPES
from hps_numba.arrays.host import as_keys
from hps_numba.arrays.host_outputs import as_output, new_output, wrap_output
from hps_numba.arrays.kinds import NUMPY, Finish, do_nothing
from hps_numba.arrays.streams import stream_handle
from hps_numba.errors import ArrayError

__all__ = ["DeviceBatch", "HostBatch", "check_rows"]

_FLOAT32 = np.dtype(np.float32)
_DTYPES = {name: np.dtype(name) for name in OUTPUT_TYPES if name != "bfloat16"}


class HostBatch:
    """A call whose keys the CPU reads.

    Args:
        keys: integers of any kind and shape ``S``.
        dim: elements of a row.
        output_type: of the answer: ``float32`` or ``float16``.
        key_bits: of the server, 64 or 32.
        out: an array to write the answer to, or None.
        larger: ``out`` may have more elements than the answer; the first ones, in C order, are written.
        out_name: what ``out`` is called, for messages.

    Attributes:
        keys: int64 ``[n]``, contiguous; may be the caller's memory: never write to it.
        rows: float32 ``[n, dim]``, contiguous: fill it, then call ``result``.

    Raises:
        KeyDtypeError: keys are not integers or do not fit.   ArrayError: ``out`` does not fit, or NumPy has no such type.
        DeviceError: keys or ``out`` are on a device from which nothing can be copied.
    """

    __slots__ = ("_answer", "_finish", "_kind", "keys", "rows")

    def __init__(
        self,
        keys: Any,
        dim: int,
        output_type: str,
        key_bits: int,
        out: Any = None,
        *,
        larger: bool = False,
        out_name: str = "out",
    ) -> None:
        self.keys, shape, kind = as_keys(keys, key_bits=key_bits)
        dtype = _DTYPES.get(output_type)
        if dtype is None:
            raise ArrayError(f"output_dtype: expected float32 or float16 for keys in host memory, got {output_type}")
        self._finish: Finish | None = None
        if out is None:
            rows = self._answer = new_output(kind, (*shape, dim), dtype)
            self._kind = kind
        else:
            rows, finish = as_output(out, (*shape, dim), dtype, larger=larger, place=out_name)
            self._answer, self._kind = out, NUMPY
            if finish is not do_nothing:
                self._finish = finish
        self.rows = rows = rows if rows.ndim == 2 else rows.reshape(-1, dim)
        if dtype is not _FLOAT32:
            self.rows = np.empty(rows.shape, np.float32)
            self._finish = partial(_convert, self.rows, rows, self._finish)

    def result(self) -> Any:
        """The answer ``S + (dim,)`` in the kind of the keys, or ``out``; to be called once, when ``rows`` are filled."""
        if self._finish is not None:
            self._finish()
        return self._answer if self._kind is NUMPY else wrap_output(self._answer, self._kind)


def _convert(filled: np.ndarray, rows: np.ndarray, finish: Finish | None) -> None:
    rows[:] = filled
    if finish is not None:
        finish()


def check_rows(out: np.ndarray, shape: tuple[int, ...]) -> None:
    """
    Raises:
        ArrayError: float32 rows of this shape cannot be written to ``out`` as it is.
    """
    if out.dtype != _FLOAT32 or out.shape != shape or not out.flags.carray:
        got = f"{out.dtype}{list(out.shape)}{'' if out.flags.carray else ', not contiguous and writable'}"
        raise ArrayError(f"out: expected contiguous writable float32{list(shape)}, got {got}")


def _read_by(keys: DeviceKeys, bags: DeviceBags | None) -> list[tuple[int, int]]:
    """Addresses and sizes in bytes of what a lookup on a device reads of its caller's."""
    read = [(keys.address, keys.n * KEY_ALIGNMENT[keys.form])]
    if bags is not None:
        read += [(bags.offsets, 8 * bags.count + 8), (bags.weights, 4 * keys.n)]
    return read


class DeviceBatch:
    """A call whose keys are in the memory of a GPU that answers it.

    Args:
        keys: integers of any shape ``S`` for which ``device_of_array`` has an answer.
        dim: elements of a row.
        output_type: of the answer: ``float32``, ``float16``, or ``bfloat16`` (Torch only).
        key_bits: of the server, 64 or 32.
        out: an array on the same GPU to write the answer to, or None.
        stream: to work on; None: the current one of the framework of the keys.
        larger, out_name: as for ``HostBatch``.
        bags: the keys in bags; ``keys`` does not count then, and the answer is ``[bags, dim]``.

    Attributes:
        keys: addresses.   bags: as given.
        address: of rows of ``output_type``: launch what fills them, then call ``result``.
        stream: handle of the stream to launch it on.

    Raises:
        KeyDtypeError, ArrayError, DeviceError, CapacityError: as ``as_device_keys``, ``stream_handle``,
            ``new_device_output`` and ``as_device_output``.
    """

    __slots__ = ("_answer", "_finish", "_keep", "address", "bags", "keys", "stream")

    def __init__(
        self,
        keys: Any,
        dim: int,
        output_type: str,
        key_bits: int,
        out: Any = None,
        stream: Any = None,
        *,
        larger: bool = False,
        out_name: str = "out",
        bags: DeviceBags | None = None,
    ) -> None:
        self.bags = bags
        self.keys = seen = as_device_keys(keys, key_bits=key_bits, stream=stream) if bags is None else bags.keys
        shape = (*seen.shape, dim) if bags is None else (bags.count, dim)
        self.stream = handle = stream_handle(stream, seen.kind, seen.device)
        self._finish: Finish = do_nothing
        if out is None:
            self._answer, self.address = new_device_output(seen.kind, shape, output_type, stream=stream)
        else:
            self._answer = out
            self.address, self._finish, self._keep = as_device_output(
                out, shape, output_type, seen.device, larger=larger, place=out_name, stream=handle, read=_read_by(seen, bags)
            )

    def result(self) -> Any:
        """The answer in the kind of the keys, or ``out``, in stream order; to be called once, when the work is launched."""
        if self._finish is not do_nothing:
            self._finish()
        return self._answer
