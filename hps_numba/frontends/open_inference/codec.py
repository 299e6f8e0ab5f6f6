"""Requests and answers of the Open Inference Protocol by HTTP: JSON, with tensors in it or behind it as bytes.

With the header ``Inference-Header-Content-Length: n``, a body is ``n`` bytes of JSON and then the bytes of every tensor that
has the parameter ``binary_data_size``, in the order of the JSON and without gaps. Bytes are read in place.

Both sides are here: a server decodes requests and encodes answers, a client does the other half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import RegionPart, SharedRegions
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, datatype_of, dtype_of
from hps_numba.frontends.open_inference.tensor_values import (
    checked_parameters,
    checked_shape,
    tensor_of_bytes,
    tensor_of_list,
)

__all__ = [
    "JSON_SIZE_HEADER",
    "AnswerForm",
    "Body",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "json_object",
]

JSON_SIZE_HEADER = "Inference-Header-Content-Length"
_BINARY, _BINARY_ALL, _SIZE = "binary_data", "binary_data_output", "binary_data_size"
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


@dataclass(frozen=True)
class Body:
    """A body to send.

    Attributes:
        parts: its bytes, one after the other; arrays are not copied, so whoever sends them holds on to this.
        json_size: of the JSON at the front, for the header, if tensors follow as bytes; else None.
    """

    parts: Sequence[Memory]
    json_size: int | None

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(memoryview(part).nbytes for part in self.parts)

    @property
    def content_type(self) -> str:
        """The media type."""
        return "application/json" if self.json_size is None else "application/octet-stream"


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


# -- what a server does ---------------------------------------------------------------


def decode_request(
    body: Memory,
    model: str,
    version: str = "",
    json_size: int | None = None,
    regions: SharedRegions | None = None,
    take: Callable[[int], object] | None = None,
) -> tuple[InferenceRequest, AnswerForm]:
    """A request in a body.

    Args:
        model, version: of the URL.   json_size: what ``Inference-Header-Content-Length`` says, if it is there.
        regions: shared memory that tensors may be in; by default none.
        take: is told of bytes before they are read from there; may refuse them.

    Raises:
        InferenceError: 400, something is wrong, with its place.   What ``take`` raises.
    """
    head, offset = _split(body, json_size)
    id_ = head.get("id", "")
    if not isinstance(id_, str):
        raise InferenceError(400, f"id: expected a string, got {type(id_).__name__}")
    parameters = checked_parameters(head.get("parameters"), "request")
    inputs, input_parameters = _read_tensors(body, offset, head, "inputs", regions, take)
    outputs, by_output, places = _wanted_outputs(head.get("outputs"))
    form = AnswerForm(_bool(parameters, _BINARY_ALL, "request"), by_output, places)
    mine = {name: value for name, value in parameters.items() if name != _BINARY_ALL}
    return InferenceRequest(model, inputs, version, id_, mine, input_parameters, outputs), form


def encode_response(response: InferenceResponse, form: AnswerForm, regions: SharedRegions | None = None) -> Body:
    """The body of an answer; outputs that go to shared memory are written there.

    Raises:
        InferenceError: 400, an output that is wanted in JSON has values that JSON cannot say (NaN, infinite), or one does not
            fit where it should go.
    """
    tensors, parts = _tensors_and_bytes(response.outputs, form, {}, regions)
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    return _joined({**head, "outputs": tensors}, parts)


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
        if _BINARY in parameters:
            by_output[name] = _bool(parameters, _BINARY, place)
        if (part := RegionPart.of(parameters, place)) is not None:
            places[name] = part
    return tuple(names), by_output, places


# -- what a client does ---------------------------------------------------------------


def encode_request(request: InferenceRequest, form: AnswerForm, *, binary: bool = True) -> Body:
    """The body of a request.

    Args:
        form: how the answer is wanted.   binary: inputs go as bytes rather than in JSON.
    """
    tensors, parts = _tensors_and_bytes(request.inputs, AnswerForm(binary), request.input_parameters)
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    parameters = {**request.parameters, **({_BINARY_ALL: True} if form.binary else {})}
    if parameters:
        head["parameters"] = parameters
    outputs = [_wanted(name, form) for name in dict.fromkeys((*request.outputs, *form.by_output))]
    if outputs:
        head["outputs"] = outputs
    return _joined({**head, "inputs": tensors}, parts)


def _wanted(name: str, form: AnswerForm) -> dict[str, Any]:
    return {"name": name, "parameters": {_BINARY: form.is_binary(name)}}


def decode_response(body: Memory, json_size: int | None = None) -> InferenceResponse:
    """The answer in a body.

    Raises:
        InferenceError: 400, it is not what the protocol says.
    """
    head, offset = _split(body, json_size)
    model, version, id_ = (head.get(name, "") for name in ("model_name", "model_version", "id"))
    if not (isinstance(model, str) and isinstance(version, str) and isinstance(id_, str)):
        raise InferenceError(400, "answer: expected strings as model_name, model_version and id")
    outputs, _ = _read_tensors(body, offset, head, "outputs")
    return InferenceResponse(model, version, outputs, id_, checked_parameters(head.get("parameters"), "answer"))


# -- tensors --------------------------------------------------------------------------


def _split(body: Memory, json_size: int | None) -> tuple[dict[str, Any], int]:
    """The JSON of a body, and where the bytes of tensors begin."""
    if json_size is None:
        return json_object(body, "body"), len(body)
    if not 0 < json_size <= len(body):
        raise InferenceError(400, f"{JSON_SIZE_HEADER}: expected 1 to {len(body)}, the bytes of the body, got {json_size}")
    return json_object(memoryview(body)[:json_size], "body"), json_size


def _read_tensors(
    body: Memory,
    offset: int,
    head: Mapping[str, Any],
    kind: str,
    regions: SharedRegions | None = None,
    take: Callable[[int], object] | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Tensors by name, and the parameters of those that have any that are not about the wire."""
    arrays: dict[str, np.ndarray] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for place, entry in _entries(head.get(kind), kind):
        name = _name(entry, place, arrays)
        dtype = dtype_of(entry.get("datatype"), place)
        shape = checked_shape(entry.get("shape"), place)
        own = checked_parameters(entry.get("parameters"), place)
        _refuse(own, place)
        size = own.get(_SIZE)
        part = RegionPart.of(own, place)
        if part is not None:
            if size is not None or "data" in entry:
                raise InferenceError(400, f"{place}: expected a shared memory region, or {_SIZE}, or data, got two of them")
            if take is not None:
                take(part.size)
            memory = (regions or SharedRegions()).read(part, place)
            arrays[name] = tensor_of_bytes(memory.data, 0, part.size, dtype, shape, place)
        elif size is None:
            arrays[name] = tensor_of_list(entry.get("data"), dtype, shape, place)
        else:
            arrays[name] = tensor_of_bytes(body, offset, _size(size, entry, place), dtype, shape, place)
            offset += size
        if left := {key: value for key, value in own.items() if key != _SIZE and not key.startswith(_SHARED)}:
            parameters[name] = left
    if offset != len(body):
        raise InferenceError(400, f"body: expected {offset} bytes, JSON and tensors together, got {len(body)}")
    return arrays, parameters


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
        raise InferenceError(400, f"{place}.parameters.{_SIZE}: expected a number of bytes, got {str(value)[:40]!r}")
    if "data" in entry:
        raise InferenceError(400, f"{place}: expected either data or {_SIZE}, got both")
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


def _tensors_and_bytes(
    arrays: Mapping[str, np.ndarray],
    form: AnswerForm,
    parameters: Mapping[str, Mapping[str, Any]],
    regions: SharedRegions | None = None,
) -> tuple[list[dict[str, Any]], list[Memory]]:
    tensors: list[dict[str, Any]] = []
    parts: list[Memory] = []
    for name, array in arrays.items():
        own = dict(parameters.get(name, {}))
        tensor: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        part = form.places.get(name)
        if part is not None and regions is not None:
            regions.write(part, array, f"outputs[{len(tensors)}]")
            own.update(part.to_parameters(array.nbytes))
        elif form.is_binary(name):
            own[_SIZE] = array.nbytes
            parts.append(_bytes_of(array))
        else:
            tensor["data"] = _listed(array, name)
        if own:
            tensor["parameters"] = own
        tensors.append(tensor)
    return tensors, parts


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of an array, which the view keeps alive."""
    if not array.size:
        return memoryview(b"")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _listed(array: np.ndarray, name: str) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InferenceError(400, f"{name}: has values that JSON cannot say (NaN or infinite); ask for {_BINARY}")
    values: list[Any] = array.reshape(-1).tolist()
    return values


def _joined(head: Mapping[str, Any], parts: list[Memory]) -> Body:
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    return Body((text, *parts), len(text) if parts else None)
