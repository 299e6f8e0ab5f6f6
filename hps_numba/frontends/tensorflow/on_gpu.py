"""Eager lookups whose ids are on a GPU: ids and rows are handed over by DLPack, and nothing is copied through the host.

*Not verified* with a TensorFlow that was built for CUDA: tests run this with stand-ins for the two hand-overs. What is between
them, ``HPS.lookup`` of CuPy arrays, is tested on GPUs.

TensorFlow's streams are private: DLPack waits for the ids to be there, and the rows are waited for before they are handed on.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from hps_numba.errors import DeviceError
from hps_numba.frontends._queries import Query, tables_of

__all__ = ["rows_on_gpu"]


def rows_on_gpu(query: Query, inputs: Sequence[Any]) -> list[Any] | None:
    """The rows of eager ids on one GPU, on that GPU: float32 tensors, one a table.

    None if they are elsewhere, if rows are to be pooled, if the model is not deployed there, or without CuPy; then keys and
    rows go through the host.

    Raises:
        As ``HPS`` and ``HPS.lookup``.
    """
    device = _gpu_of(inputs[0])
    if device is None or any(table.combiner is not None for table in query.tables):
        return None
    if any(_gpu_of(tensor) != device for tensor in inputs):
        return None
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        return None
    tables = tables_of(query.encoded)
    try:
        if any(server.direct.cache_on(device, table.model, table.table) is None for server, table in tables):
            return None
    except DeviceError:
        return None
    with cupy.cuda.Device(device):
        keys = [cupy.from_dlpack(_Capsule(tf.experimental.dlpack.to_dlpack(tensor), device)) for tensor in inputs]
        rows = [server.lookup(some, table.model, table.table) for some, (server, table) in zip(keys, tables, strict=True)]
        cupy.cuda.get_current_stream().synchronize()
        return [tf.experimental.dlpack.from_dlpack(some.__dlpack__()) for some in rows]


class _Capsule:
    """A capsule of TensorFlow, in the current DLPack protocol."""

    def __init__(self, capsule: Any, device: int) -> None:
        self._capsule, self._device = capsule, device

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._device  # kDLCUDA


def _gpu_of(tensor: Any) -> int | None:
    """The number of the GPU that an eager tensor lies on."""
    device = tf.DeviceSpec.from_string(getattr(tensor, "backing_device", "") or "")
    return device.device_index if device.device_type == "GPU" else None
