"""Requests and answers of the Open Inference Protocol by HTTP: JSON, with tensors in it or behind it as bytes.

With the header ``Inference-Header-Content-Length: n``, a body is ``n`` bytes of JSON and then the bytes of every tensor that
has the parameter ``binary_data_size``, in the order of the JSON and without gaps. Bytes are read in place.

Both sides are here: a server decodes requests and encodes answers, a client does the other half.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.inference.tensors import DATATYPES, InferenceRequest, InferenceResponse, datatype_of
from hps_numba.frontends.open_inference.heads import (
    BINARY,
    BINARY_ALL,
    BINARY_SIZE,
    AnswerForm,
    Memory,
    TensorHead,
    head_of,
    json_object,
    tensor_heads,
)
from hps_numba.frontends.open_inference.tensor_values import checked_parameters, tensor_of_bytes, tensor_of_list

__all__ = [
    "JSON_SIZE_HEADER",
    "Body",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
]

JSON_SIZE_HEADER = "Inference-Header-Content-Length"
_REMEMBERED = 256  # heads of answers


@dataclass(eq=False, slots=True)
class Body:
    """A body to send. Nobody changes it.

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
    text, offset = _split(body, json_size)
    head = head_of(text, remember=offset < len(body))
    inputs = _read_tensors(body, offset, head.inputs, regions, take)
    return head.request(model, version, inputs), head.form


def encode_response(response: InferenceResponse, form: AnswerForm, regions: SharedRegions | None = None) -> Body:
    """The body of an answer; outputs that go to shared memory are written there.

    Raises:
        InferenceError: 400, an output that is wanted in JSON has values that JSON cannot say (NaN, infinite), or one does not
            fit where it should go.
    """
    if not (response.id or response.parameters or form.places) and all(map(form.is_binary, response.outputs)):
        outputs = [(name, datatype_of(array), array.shape) for name, array in response.outputs.items()]
        text = _binary_head(response.model, response.version, tuple(outputs))
        return Body((text, *map(_bytes_of, response.outputs.values())), len(text) if outputs else None)
    tensors, parts = _tensors_and_bytes(response.outputs, form, {}, regions)
    head: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    return _joined({**head, "outputs": tensors}, parts)


@functools.lru_cache(_REMEMBERED)
def _binary_head(model: str, version: str, outputs: tuple[tuple[str, str, tuple[int, ...]], ...]) -> bytes:
    """The JSON of an answer whose outputs, with datatypes and shapes, all follow as bytes."""
    tensors = [
        {
            "name": name,
            "datatype": datatype,
            "shape": list(shape),
            "parameters": {BINARY_SIZE: math.prod(shape) * DATATYPES[datatype].itemsize},
        }
        for name, datatype, shape in outputs
    ]
    return _text({"model_name": model, "model_version": version, "outputs": tensors})


# -- what a client does ---------------------------------------------------------------


def encode_request(request: InferenceRequest, form: AnswerForm, *, binary: bool = True) -> Body:
    """The body of a request.

    Args:
        form: how the answer is wanted.   binary: inputs go as bytes rather than in JSON.
    """
    tensors, parts = _tensors_and_bytes(request.inputs, AnswerForm(binary), request.input_parameters)
    head: dict[str, Any] = {"id": request.id} if request.id else {}
    parameters = {**request.parameters, **({BINARY_ALL: True} if form.binary else {})}
    if parameters:
        head["parameters"] = parameters
    outputs = [_wanted(name, form) for name in dict.fromkeys((*request.outputs, *form.by_output))]
    if outputs:
        head["outputs"] = outputs
    return _joined({**head, "inputs": tensors}, parts)


def _wanted(name: str, form: AnswerForm) -> dict[str, Any]:
    return {"name": name, "parameters": {BINARY: form.is_binary(name)}}


def decode_response(body: Memory, json_size: int | None = None) -> InferenceResponse:
    """The answer in a body.

    Raises:
        InferenceError: 400, it is not what the protocol says.
    """
    text, offset = _split(body, json_size)
    head = json_object(text, "body")
    model, version, id_ = (head.get(name, "") for name in ("model_name", "model_version", "id"))
    if not (isinstance(model, str) and isinstance(version, str) and isinstance(id_, str)):
        raise InferenceError(400, "answer: expected strings as model_name, model_version and id")
    outputs = _read_tensors(body, offset, tensor_heads(head, "outputs"))
    return InferenceResponse(model, version, outputs, id_, checked_parameters(head.get("parameters"), "answer"))


# -- tensors --------------------------------------------------------------------------


def _split(body: Memory, json_size: int | None) -> tuple[bytes, int]:
    """The JSON of a body, and where the bytes of tensors begin."""
    if json_size is None:
        return bytes(body), len(body)
    if not 0 < json_size <= len(body):
        raise InferenceError(400, f"{JSON_SIZE_HEADER}: expected 1 to {len(body)}, the bytes of the body, got {json_size}")
    return bytes(body[:json_size]), json_size


def _read_tensors(
    body: Memory,
    offset: int,
    heads: Sequence[TensorHead],
    regions: SharedRegions | None = None,
    take: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Tensors by name: views of the body, of copies from shared memory, or made of values in the JSON."""
    arrays: dict[str, np.ndarray] = {}
    for head in heads:
        if head.part is not None:
            if take is not None:
                take(head.part.size)
            memory = (regions or SharedRegions()).read(head.part, head.place)
            arrays[head.name] = tensor_of_bytes(memory.data, 0, head.part.size, head.dtype, head.shape, head.place)
        elif head.size is None:
            arrays[head.name] = tensor_of_list(head.values, head.dtype, head.shape, head.place)
        else:
            arrays[head.name] = tensor_of_bytes(body, offset, head.size, head.dtype, head.shape, head.place)
            offset += head.size
    if offset != len(body):
        raise InferenceError(400, f"body: expected {offset} bytes, JSON and tensors together, got {len(body)}")
    return arrays


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
            own[BINARY_SIZE] = array.nbytes
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
    return np.ascontiguousarray(array).data.cast("B")


def _listed(array: np.ndarray, name: str) -> list[Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InferenceError(400, f"{name}: has values that JSON cannot say (NaN or infinite); ask for {BINARY}")
    values: list[Any] = array.reshape(-1).tolist()
    return values


def _joined(head: Mapping[str, Any], parts: list[Memory]) -> Body:
    text = _text(head)
    return Body((text, *parts), len(text) if parts else None)


def _text(head: Mapping[str, Any]) -> bytes:
    return json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
