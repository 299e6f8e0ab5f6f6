"""The JSON of a request, checked and without its tensors' bytes: names, types, shapes, and how the answer is wanted.

Clients send the same JSON again and again, as only the bytes behind it differ. Checking it takes longer than a small lookup, so
short ones are remembered by their text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import RegionPart
from hps_numba.frontends.inference.tensors import InferenceRequest, dtype_of
from hps_numba.frontends.open_inference.remembered import remembered
from hps_numba.frontends.open_inference.tensor_values import check_bytes, checked_parameters, checked_shape

__all__ = [
    "BINARY",
    "BINARY_ALL",
    "BINARY_SIZE",
    "AnswerForm",
    "Memory",
    "RequestHead",
    "TensorHead",
    "head_of",
    "json_object",
    "tensor_heads",
]

BINARY, BINARY_ALL, BINARY_SIZE = "binary_data", "binary_data_output", "binary_data_size"
_SHARED = "shared_memory_"  # how the parameters begin that name a place there
#: parameters of tensors that ask for what no model here does
_REFUSED = {"classification": "outputs as they are"}

Memory = bytes | bytearray | memoryview


@dataclass(frozen=True)
class AnswerForm:
    """How a client wants the outputs.

    Attributes:
        binary: as bytes rather than in JSON, unless ``by_output`` says otherwise for one.
        places: of outputs that go to shared memory.
    """

    binary: bool = False
    by_output: Mapping[str, bool] = field(default_factory=dict)
    places: Mapping[str, RegionPart] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        """Whether an output goes as bytes, in the body or in shared memory."""
        return output in self.places or self.by_output.get(output, self.binary)


@dataclass(frozen=True, eq=False)
class TensorHead:
    """What is said of a tensor, in JSON or in a message of gRPC.

    Attributes:
        place: for messages, such as ``inputs[0]``.   dtype, shape: of the tensor.
        size: of its bytes behind the JSON, or None.   part: where it is in shared memory, or None.
        values: in the JSON, where there is neither; or the message of the tensor.
        parameters: those that are not about the wire.
    """

    name: str
    place: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int | None
    part: RegionPart | None
    values: Any
    parameters: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class RequestHead:
    """What is said of a request, in JSON or in a message of gRPC.

    Attributes:
        id: that the client gave it.   parameters: of the request, but for those about the wire.
        inputs: its tensors.   outputs: names of those that are wanted; none: all.   form: how they are.
    """

    id: str
    parameters: Mapping[str, Any]
    inputs: tuple[TensorHead, ...]
    outputs: tuple[str, ...]
    form: AnswerForm

    def request(self, model: str, version: str, arrays: Mapping[str, np.ndarray]) -> InferenceRequest:
        """The request, which may change its parameters."""
        own = {tensor.name: dict(tensor.parameters) for tensor in self.inputs if tensor.parameters}
        return InferenceRequest(model, arrays, version, self.id, dict(self.parameters), own, self.outputs)


def head_of(text: bytes, *, remember: bool) -> RequestHead:
    """The head of a request.

    Args:
        remember: the text may come again, as the values of tensors are not in it.

    Raises:
        InferenceError: 400, something is wrong, with its place.
    """
    return _remembered(text) if remember else _parsed(text)


def _parsed(text: bytes) -> RequestHead:
    head = json_object(text, "body")
    id_ = head.get("id", "")
    if not isinstance(id_, str):
        raise InferenceError(400, f"id: expected a string, got {type(id_).__name__}")
    parameters = checked_parameters(head.get("parameters"), "request")
    inputs = tensor_heads(head, "inputs")
    outputs, by_output, places = _wanted_outputs(head.get("outputs"))
    form = AnswerForm(_bool(parameters, BINARY_ALL, "request"), by_output, places)
    mine = {name: value for name, value in parameters.items() if name != BINARY_ALL}
    return RequestHead(id_, mine, inputs, outputs, form)


_remembered = remembered(_parsed, 4096)


def json_object(memory: Memory, place: str) -> dict[str, Any]:
    """An object in JSON.

    Raises:
        InferenceError: 400, it is none.
    """
    try:
        found = json.loads(str(memory, "utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as problem:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InferenceError(400, f"{place}: expected JSON, got: {str(problem)[:100]}") from None
    if not isinstance(found, dict):
        raise InferenceError(400, f"{place}: expected an object in JSON, got {type(found).__name__}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def tensor_heads(head: Mapping[str, Any], kind: str) -> tuple[TensorHead, ...]:
    """The tensors of a request (``inputs``) or of an answer (``outputs``).

    Raises:
        InferenceError: 400, something is wrong, with its place.
    """
    found: dict[str, TensorHead] = {}
    for place, entry in _entries(head.get(kind), kind):
        name = _name(entry, place, found)
        dtype = dtype_of(entry.get("datatype"), place)
        shape = checked_shape(entry.get("shape"), place)
        own = checked_parameters(entry.get("parameters"), place)
        _refuse(own, place)
        part = RegionPart.of(own, place)
        size = own.get(BINARY_SIZE)
        if part is not None:
            if size is not None or "data" in entry:
                raise InferenceError(
                    400, f"{place}: expected a shared memory region, or {BINARY_SIZE}, or data, got two of them"
                )
            check_bytes(part.size, dtype, shape, place)
        elif size is not None:
            check_bytes(_size(size, entry, place), dtype, shape, place)
        left = {key: value for key, value in own.items() if key != BINARY_SIZE and not key.startswith(_SHARED)}
        found[name] = TensorHead(name, place, dtype, shape, size, part, entry.get("data"), left)
    return tuple(found.values())


def _wanted_outputs(entries: Any) -> tuple[tuple[str, ...], dict[str, bool], dict[str, RegionPart]]:
    """Names of the outputs that a client asks for, whether as bytes where it says so, and those for shared memory."""
    if entries is None:
        return (), {}, {}
    by_output: dict[str, bool] = {}
    places: dict[str, RegionPart] = {}
    names: dict[str, None] = {}
    for place, entry in _entries(entries, "outputs"):
        name = _name(entry, place, names)
        parameters = checked_parameters(entry.get("parameters"), place)
        _refuse(parameters, place)
        names[name] = None
        if BINARY in parameters:
            by_output[name] = _bool(parameters, BINARY, place)
        if (part := RegionPart.of(parameters, place)) is not None:
            places[name] = part
    return tuple(names), by_output, places


def _entries(value: Any, kind: str) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(value, list):
        raise InferenceError(400, f"{kind}: expected a list, got {type(value).__name__}")
    places = [(f"{kind}[{number}]", entry) for number, entry in enumerate(value)]
    for place, entry in places:
        if not isinstance(entry, dict):
            raise InferenceError(400, f"{place}: expected an object, got {type(entry).__name__}")
    return places


def _name(entry: Mapping[str, Any], place: str, others: Mapping[str, Any]) -> str:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise InferenceError(400, f"{place}.name: expected a name, got {str(name)[:40]!r}")
    if name in others:
        raise InferenceError(400, f"{place}.name: expected another than {name[:100]!r}, which is there already")
    return name


def _size(value: Any, entry: Mapping[str, Any], place: str) -> int:
    if type(value) is not int or value < 0:
        raise InferenceError(400, f"{place}.parameters.{BINARY_SIZE}: expected a number of bytes, got {str(value)[:40]!r}")
    if "data" in entry:
        raise InferenceError(400, f"{place}: expected either data or {BINARY_SIZE}, got both")
    return value


def _bool(parameters: Mapping[str, Any], name: str, place: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InferenceError(400, f"{place}.parameters.{name}: expected true or false, got {str(value)[:40]!r}")
    return value


def _refuse(parameters: Mapping[str, Any], place: str) -> None:
    for name, instead in _REFUSED.items():
        if parameters.get(name):
            raise InferenceError(400, f"{place}.parameters.{name}: expected {instead}, this server has none of it")
