"""Keys and answers that are tensors of Torch as kernels take them: looked up with a few questions to each.

What ``arrays.batch`` opens may be anything, and it says what is wrong with it; for a small batch that takes longer than the
lookup. Here a call that is not plain is left to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hps_numba.arrays.encodings import ELEMENT_BYTES, KEY_ALIGNMENT, KEY_ENCODINGS, NARROW_INTEGERS
from hps_numba.arrays.streams import torch_streams
from hps_numba.errors import ClosedError

__all__ = ["PlainHostTensors", "PlainTensors", "is_tensor"]


def is_tensor(kind: type) -> bool:
    """Whether a class is Torch's, and no subclass."""
    return kind is getattr(sys.modules.get("torch"), "Tensor", None)


class PlainTensors:
    """Lookups of one table on one GPU.

    Args:
        look_up: called with the address of keys, their number, the address of rows, the handle of a stream, key encoding and
            ``output_type``; ClosedError from it leaves the call to others.
        dim: elements of a row.   output_type: of the answer.   key_bits: of the server, 64 or 32.   device: CUDA ordinal.

    Thread safety: call it from any thread.
    """

    __slots__ = (
        "_device",
        "_dim",
        "_dtype",
        "_forms",
        "_look_up",
        "_ordinal",
        "_output_type",
        "_row_bytes",
        "_stream_on",
        "_torch",
    )

    def __init__(self, look_up: Callable[..., object], dim: int, output_type: str, key_bits: int, device: int) -> None:
        torch = sys.modules["torch"]
        self._look_up, self._dim, self._output_type, self._ordinal = look_up, dim, output_type, device
        self._torch, self._device, self._dtype = torch, torch.device("cuda", device), getattr(torch, output_type)
        self._stream_on = torch_streams()
        self._row_bytes = dim * ELEMENT_BYTES[output_type]
        self._forms = {
            getattr(torch, name): (form, KEY_ALIGNMENT[form])
            for name, form in KEY_ENCODINGS[key_bits].items()
            if name not in NARROW_INTEGERS and hasattr(torch, name)
        }

    def __call__(self, keys: Any, out: Any, stream: Any) -> Any:
        """The rows of the keys, in ``out`` or a new tensor, in the order of Torch's current stream.

        Args:
            keys: a tensor on the GPU, of no subclass.   out, stream: as for ``HPS.lookup``.

        Returns:
            None, with nothing done, if the call is not plain: strides or narrow integers, no key, another stream than the
            current one, or an ``out`` that cannot be written as it is; or if what looks up was closed.
        """
        if stream is not None:
            return None
        found = self.open(keys, out)
        if found is None:
            return None
        rows, n, at, to, form = found
        try:
            self._look_up(at, n, to, self._stream_on(self._ordinal), form, self._output_type)
        except ClosedError:
            return None
        return rows

    def open(self, keys: Any, out: Any = None) -> tuple[Any, int, int, int, str] | None:
        """The answer, the number of keys, the addresses of keys and rows, and the key encoding; None if they are not plain."""
        try:
            return self._opened(keys, out)
        except Exception:  # foreign code may raise anything; who takes the call next says what
            return None

    def stream(self) -> int:
        """The handle of Torch's current stream."""
        return self._stream_on(self._ordinal)

    def _opened(self, keys: Any, out: Any) -> tuple[Any, int, int, int, str] | None:
        """The answer, the number of keys, the addresses of keys and rows, and the key encoding; None if it is not plain."""
        form, size = self._forms.get(keys.dtype, ("", 0))
        if not size or not keys.is_contiguous():
            return None
        shape, n, at = keys.shape, keys.numel(), keys.data_ptr()
        if n == 0 or at % size:
            return None
        if out is None:
            rows = self._torch.empty(*shape, self._dim, dtype=self._dtype, device=self._device)  # a tuple takes longer
            return rows, n, at, rows.data_ptr(), form
        if type(out) is not self._torch.Tensor or out.dtype is not self._dtype or out.requires_grad:
            return None
        if out.shape != (*shape, self._dim):
            return None
        if out.device != self._device or not out.is_contiguous() or out.is_neg():  # negated when it is read
            return None
        to = out.data_ptr()
        if to & 3 or (at < to + n * self._row_bytes and to < at + n * size):
            return None
        return out, n, at, to, form


class PlainHostTensors:
    """Lookups of one table in host memory.

    Args:
        look_up: of arrays of NumPy: from int64 keys ``[n]``, and rows ``[n, dim]`` or None to write to, to the rows; or to None
            if that takes more.

    Thread safety: call it from any thread.
    """

    def __init__(self, look_up: Callable[[Any, Any, Any], Any]) -> None:
        self._look_up, self._torch = look_up, sys.modules["torch"]

    def __call__(self, keys: Any, out: Any, stream: Any) -> Any:
        """The rows of the keys, in ``out`` or a new tensor; None as from ``look_up``, or for an ``out`` of another kind."""
        torch = self._torch
        try:
            some, to = keys.numpy().reshape(-1), None  # shares memory, or raises
            if out is not None:
                if type(out) is not torch.Tensor or out.requires_grad or out.shape[:-1] != keys.shape:
                    return None
                if not out.is_contiguous():
                    return None
                to = out.numpy().reshape(len(some), -1)
        except Exception:  # foreign code may raise anything; who takes the call next says what
            return None
        rows = self._look_up(some, to, None)
        if rows is None or out is not None:
            return None if rows is None else out
        answer = torch.from_numpy(rows)
        return answer if keys.dim() == 1 else answer.view(*keys.shape, -1)
