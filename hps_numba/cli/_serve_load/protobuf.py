"""The few messages of the Open Inference Protocol that a load needs, as protobuf writes them.

A request is made once and sent many times, as bytes: generated classes would only be in the way, and would need ``protobuf``.
The fields, by number, are those of ``inference.GRPCInferenceService``: a field is a varint ``number << 3 | kind``, kind 0 a
varint, kind 2 a length and so many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from hps_numba.cli._serve_load.connection import ModelFacts, Probe, TensorFacts
from hps_numba.cli._serve_load.tensors import datatype_of

__all__ = ["answer_of", "facts_of", "named_message", "names_of", "request_of", "tensor_bytes"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def named_message(name: str) -> bytes:
    """A message whose first field is a name: ModelMetadataRequest, and RepositoryIndexRequest with an empty one."""
    return _field(1, name.encode()) if name else b""


def request_of(model: str, tensors: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bytes:
    """ModelInferRequest with raw contents."""
    message = [_field(1, model.encode())]
    for name, value in parameters.items():
        message.append(_field(4, _field(1, name.encode()) + _field(2, _parameter(value))))
    for name, array in tensors.items():
        shape = b"".join(_varint(size) for size in array.shape)
        message.append(_field(5, _field(1, name.encode()) + _field(2, datatype_of(array).encode()) + _field(3, shape)))
    message += [_field(7, array.tobytes()) for array in tensors.values()]
    return b"".join(message)


def facts_of(message: bytes) -> ModelFacts:
    """ModelMetadataResponse."""
    found = list(_fields(message))
    inputs = {}
    for number, value in found:
        if number == 4:
            name, tensor = _tensor(value)
            inputs[name] = tensor
    texts = {number: bytes(value).decode() for number, value in found if number in (1, 3)}
    return ModelFacts(texts.get(1, ""), texts.get(3, ""), inputs)


def names_of(message: bytes) -> list[str]:
    """Names of the models in a RepositoryIndexResponse."""
    return [bytes(value).decode() for number, entry in _fields(message) if number == 1
            for inner, value in _fields(entry) if inner == 1]  # fmt: skip


def answer_of(message: bytes) -> Probe:
    """ModelInferResponse."""
    outputs = {}
    for number, value in _fields(message):
        if number == 5:
            name, tensor = _tensor(value)
            outputs[name] = (tensor.datatype, tensor.shape)
    return Probe(outputs, tensor_bytes(message))


def tensor_bytes(message: bytes) -> int:
    """Bytes of the raw contents of a ModelInferResponse."""
    return sum(len(value) for number, value in _fields(message) if number == 6)


def _tensor(message: Any) -> tuple[str, TensorFacts]:
    name, datatype, shape = "", "", []
    for number, value in _fields(message):
        if number == 1:
            name = bytes(value).decode()
        elif number == 2:
            datatype = bytes(value).decode()
        elif number == 3:
            shape += [_signed(value)] if isinstance(value, int) else list(_packed(value))
    return name, TensorFacts(datatype, tuple(shape))


def _packed(view: Any) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _read_varint(view, at)
        yield _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an integer, or a view of its bytes.

    Raises:
        ValueError: it is no message.
    """
    view, at = memoryview(message), 0
    while at < len(view):
        key, at = _read_varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(view, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"expected a protobuf message, got a field of kind {kind}")
        if at + size > len(view):
            raise ValueError("expected a protobuf message, got one that is cut off")
        yield number, view[at : at + size]
        at += size


def _read_varint(view: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("expected a protobuf message, got one that is cut off")


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _parameter(value: Any) -> bytes:
    """InferParameter: bool_param, int64_param, string_param or double_param."""
    if isinstance(value, bool):
        return _varint(1 << 3) + _varint(value)
    if isinstance(value, int):
        return _varint(2 << 3) + _varint(value & (1 << 64) - 1)
    if isinstance(value, float):
        return _varint(4 << 3 | _FIXED64) + struct.pack("<d", value)
    return _field(3, str(value).encode())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
