"""Requests and answers of inference as tensors by name, in the terms of the Open Inference Protocol (KServe, version 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hps_numba.frontends.inference.problems import InferenceError

__all__ = ["DATATYPES", "InferenceRequest", "InferenceResponse", "TensorSpec", "datatype_of", "dtype_of"]

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""Datatype of the protocol -> dtype of NumPy. BYTES (text) and BF16 are not among them: no table has such keys or rows."""

_NAMES = {dtype: name for name, dtype in DATATYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a model.

    Attributes:
        name: of the tensor.   datatype: one of ``DATATYPES``.   shape: its sizes, -1 for any.
        optional: a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(eq=False, slots=True)  # not frozen: to make a frozen one takes three times as long, and each request makes some
class InferenceRequest:
    """What a client asks a model. Nobody changes it.

    Attributes:
        model: its name.   inputs: tensors by name.
        version: of the model that has to answer; empty: whichever is in force.
        id: whatever the client calls the request; the answer has it too.
        parameters: of the request: strings, numbers and bools by name.
        input_parameters: the same for single inputs, by the name of the input.
        outputs: names of the outputs that are wanted; empty: all.
        items: elements of all inputs.
    """

    model: str
    inputs: Mapping[str, np.ndarray]
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    input_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    items: int = field(init=False)

    def __post_init__(self) -> None:
        self.items = sum([array.size for array in self.inputs.values()])


@dataclass(eq=False, slots=True)
class InferenceResponse:
    """The answer of a model. Nobody changes it.

    Attributes:
        model, version: who answered.   id: of the request.   outputs: tensors by name, C-contiguous.
        parameters: of the answer, as those of a request.
    """

    model: str
    version: str
    outputs: Mapping[str, np.ndarray]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


def dtype_of(datatype: Any, place: str) -> np.dtype[Any]:
    """The dtype of a datatype.

    Raises:
        InferenceError: 400, it is none, or one that no model here takes.
    """
    found = DATATYPES.get(datatype) if isinstance(datatype, str) else None
    if found is None:
        raise InferenceError(400, f"{place}.datatype: expected one of {', '.join(DATATYPES)}, got {str(datatype)[:40]!r}")
    return found


def datatype_of(array: np.ndarray) -> str:
    """The datatype of an array's dtype.

    Raises:
        InferenceError: 500, the protocol has none for it.
    """
    name = _NAMES.get(array.dtype)
    if name is None:
        raise InferenceError(500, f"output: expected a dtype that the protocol has, got {array.dtype}")
    return name
