"""Requests and answers of the Open Inference Protocol by gRPC: messages, and the bytes of tensors beside them.

Choice: the bytes of tensors (``raw_input_contents``, ``raw_output_contents``) are taken out of a message, and put into one,
by hand, as the wire format is a list of fields with their lengths: keys are read in place, and rows are copied once. protobuf
itself would copy either twice more.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import RegionPart, SharedRegions
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, datatype_of, dtype_of
from hps_numba.frontends.open_inference.grpc_schema import schema
from hps_numba.frontends.open_inference.heads import AnswerForm, RequestHead, TensorHead
from hps_numba.frontends.open_inference.remembered import remembered
from hps_numba.frontends.open_inference.tensor_values import check_bytes, checked_shape, tensor_of_bytes

__all__ = ["decode_request", "encode_response", "encode_stream_response", "parse"]

_RAW_INPUT, _RAW_OUTPUT, _STREAMED = 7, 6, 2  # numbers of fields in open_inference.proto
_MAX_FIELDS = 1 << 16  # of a message
_REMEMBERED = 256  # heads of answers
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # types of the wire
#: field of typed contents -> dtype of its values; FP16 can only be sent as bytes
_CONTENTS: Mapping[str, tuple[str, np.dtype[Any]]] = {
    **dict.fromkeys(("INT8", "INT16", "INT32"), ("int_contents", np.dtype(np.int32))),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), ("uint_contents", np.dtype(np.uint32))),
    "INT64": ("int64_contents", np.dtype(np.int64)),
    "UINT64": ("uint64_contents", np.dtype(np.uint64)),
    "BOOL": ("bool_contents", np.dtype(np.bool_)),
    "FP32": ("fp32_contents", np.dtype(np.float32)),
    "FP64": ("fp64_contents", np.dtype(np.float64)),
}


def parse(name: str, data: bytes) -> Any:
    """A message of the protocol.

    Raises:
        InferenceError: 400, the bytes are no such message.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return schema().messages[name].FromString(data)
    except (DecodeError, UnicodeDecodeError) as problem:
        raise InferenceError(400, f"message: expected {name}, got: {str(problem)[:100]}") from None


def decode_request(
    data: bytes, regions: SharedRegions, take: Callable[[int, int], None]
) -> tuple[InferenceRequest, Mapping[str, RegionPart]]:
    """A request in a message, and where its client wants outputs that go to shared memory.

    Args:
        take: is told before memory is taken: how many bytes of the request are in messages or regions, and how many bytes
            of messages are values to be read one by one; may refuse it.

    Raises:
        InferenceError: 400, something is wrong, with its place.   What ``take`` raises.
    """
    rest, raw = _without_raw(data)
    take(len(data), len(rest))
    model, version, head = _remembered(rest) if raw else _parsed(rest)
    inputs = _read_inputs(head.inputs, raw, regions, take)
    return head.request(model, version, inputs), head.form.places


def _parsed(data: bytes) -> tuple[str, str, RequestHead]:
    """Model and version, and what a message says beside the bytes of its tensors."""
    message = parse("ModelInferRequest", data)
    parameters = _parameters(message.parameters, "request")
    inputs = _input_heads(message.inputs)
    places: dict[str, RegionPart] = {}
    for i, output in enumerate(message.outputs):
        place = f"outputs[{i}]"
        own = _parameters(output.parameters, place)
        if own.get("classification"):
            raise InferenceError(
                400, f"{place}.parameters.classification: expected outputs as they are, this server has no other"
            )
        part = RegionPart.of(own, place)
        if part is not None:
            places[output.name] = part
    outputs = tuple(output.name for output in message.outputs)
    head = RequestHead(message.id, parameters, inputs, outputs, AnswerForm(True, places=places))
    return message.model_name, message.model_version, head


#: clients send the same again and again, but for the bytes of tensors
_remembered = remembered(_parsed, 4096)


def _input_heads(tensors: Any) -> tuple[TensorHead, ...]:
    """Inputs of a message, with the message of each as ``values``."""
    found: dict[str, TensorHead] = {}
    for i, tensor in enumerate(tensors):
        place = f"inputs[{i}]"
        if not tensor.name or tensor.name in found:
            raise InferenceError(400, f"{place}.name: expected a name that no other input has, got {tensor.name[:100]!r}")
        dtype, shape = dtype_of(tensor.datatype, place), checked_shape(list(tensor.shape), place)
        own = _parameters(tensor.parameters, place)
        part = RegionPart.of(own, place)
        if part is not None:
            check_bytes(part.size, dtype, shape, place)
        left = {name: value for name, value in own.items() if not name.startswith("shared_memory_")}
        found[tensor.name] = TensorHead(tensor.name, place, dtype, shape, None, part, tensor, left)
    return tuple(found.values())


def _read_inputs(
    heads: Sequence[TensorHead], raw: list[memoryview], regions: SharedRegions, take: Callable[[int, int], None]
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    left = iter(raw)
    for head in heads:
        dtype, shape, place = head.dtype, head.shape, head.place
        if head.part is not None:
            take(head.part.size, 0)
            memory = regions.read(head.part, place)
            arrays[head.name] = tensor_of_bytes(memory.data, 0, head.part.size, dtype, shape, place)
        elif raw:
            if head.values.HasField("contents"):
                raise InferenceError(400, f"{place}: expected either contents or raw_input_contents, got both")
            piece = next(left, None)
            if piece is None:
                raise InferenceError(400, f"raw_input_contents: expected one for each input, got {len(raw)}")
            check_bytes(len(piece), dtype, shape, place)
            arrays[head.name] = tensor_of_bytes(piece, 0, len(piece), dtype, shape, place)
        else:
            arrays[head.name] = _typed(head.values, dtype, shape, place)
    if next(left, None) is not None:
        raise InferenceError(400, f"raw_input_contents: expected one for each input, got {len(raw)}")
    return arrays


def _typed(tensor: Any, dtype: np.dtype[Any], shape: tuple[int, ...], place: str) -> np.ndarray:
    if tensor.datatype not in _CONTENTS:
        raise InferenceError(400, f"{place}: expected raw_input_contents for {tensor.datatype}, got none")
    name, wide = _CONTENTS[tensor.datatype]
    values = getattr(tensor.contents, name)
    if len(values) != math.prod(shape):
        raise InferenceError(
            400, f"{place}.contents.{name}: expected {math.prod(shape)} values for shape {list(shape)}, got {len(values)}"
        )
    array = np.fromiter(values, wide, len(values))
    narrow = array.astype(dtype, copy=False)
    if narrow.dtype != wide and not np.array_equal(narrow, array):
        raise InferenceError(400, f"{place}.contents.{name}: expected values of {dtype}, got one out of its range")
    return narrow.reshape(shape)


def _parameters(found: Any, place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, one in found.items():
        kind = one.WhichOneof("parameter_choice")
        if kind is None:
            raise InferenceError(400, f"{place}.parameters.{name[:40]}: expected a value, got none")
        values[name] = getattr(one, kind)
    return values


def encode_response(response: InferenceResponse, parts: Mapping[str, RegionPart], regions: SharedRegions) -> bytes:
    """The message of an answer; outputs that go to shared memory are written there.

    Raises:
        InferenceError: 400, an output does not fit where it should go.
    """
    pieces: list[bytes | memoryview] = [_head_of_answer(response, parts, regions)]
    for name, array in response.outputs.items():
        piece = memoryview(b"") if name in parts or not array.size else _bytes_of(array)
        pieces += _head(_RAW_OUTPUT, piece.nbytes), piece
    return b"".join(pieces)


def _head_of_answer(response: InferenceResponse, parts: Mapping[str, RegionPart], regions: SharedRegions) -> bytes:
    """The message without the bytes of tensors."""
    if not (response.id or response.parameters or parts):
        outputs = tuple([(name, datatype_of(array), array.shape) for name, array in response.outputs.items()])
        return _plain_head(response.model, response.version, outputs)
    message = schema().ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    _set_parameters(message.parameters, response.parameters)
    for i, (name, array) in enumerate(response.outputs.items()):
        tensor = message.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        part = parts.get(name)
        if part is not None:
            regions.write(part, array, f"outputs[{i}]")
            _set_parameters(tensor.parameters, part.to_parameters(array.nbytes))
    return bytes(message.SerializeToString())


@functools.lru_cache(_REMEMBERED)
def _plain_head(model: str, version: str, outputs: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """That of an answer which has nothing but outputs, by name, datatype and shape."""
    message = schema().ModelInferResponse(model_name=model, model_version=version)
    for name, datatype, shape in outputs:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    return bytes(message.SerializeToString())


def encode_stream_response(answer: bytes | None, error: str = "") -> bytes:
    """The message of a stream that has an answer, or says why there is none."""
    if answer is None:
        return bytes(schema().ModelStreamInferResponse(error_message=error).SerializeToString())
    return b"".join((_head(_STREAMED, len(answer)), answer))


def _set_parameters(place: Any, parameters: Mapping[str, Any]) -> None:
    for name, value in parameters.items():
        if isinstance(value, bool):
            place[name].bool_param = value
        elif isinstance(value, int):
            place[name].int64_param = value
        elif isinstance(value, float):
            place[name].double_param = value
        else:
            place[name].string_param = str(value)


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# -- the wire ------------------------------------------------------------------------


def _without_raw(data: bytes) -> tuple[bytes, list[memoryview]]:
    """A message without the bytes of its tensors, and those, in place."""
    whole, kept, raw = memoryview(data), 0, []
    rest: list[memoryview] = []
    for number, start, value, end in _fields(data):
        if number == _RAW_INPUT:
            rest.append(whole[kept:start])
            raw.append(whole[value:end])
            kept = end
    return (b"".join([*rest, whole[kept:]]) if raw else data), raw


def _fields(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Number, start, start of the value, and end of every field of a message."""
    at = count = 0
    while at < len(data):
        start = at
        count += 1
        if count > _MAX_FIELDS:
            raise InferenceError(413, f"message: expected at most {_MAX_FIELDS} inputs, outputs and parameters")
        tag, at = _varint(data, at)
        kind = tag & 7
        value = at
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _LENGTH:
            size, value = _varint(data, at)
            at = value + size
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise InferenceError(400, f"message: expected a field of a known type at byte {start}, got type {kind}")
        if at > len(data):
            raise InferenceError(400, f"message: expected {at - len(data)} bytes more at its end")
        yield (tag >> 3 if kind == _LENGTH else 0), start, value, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise InferenceError(400, "message: expected a number at its end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise InferenceError(400, f"message: expected a number of at most 64 bits at byte {at}")


def _head(number: int, size: int) -> bytes:
    """What is in front of the bytes of a field."""
    head = bytearray([number << 3 | _LENGTH])
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)
