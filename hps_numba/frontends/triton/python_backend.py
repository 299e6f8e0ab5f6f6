"""The module that Triton's Python backend gives its models, ``triton_python_backend_utils``: tensors in and out, errors.

It is there only inside Triton, so it is imported late, and only here.

With NumPy 2, tensors of that build (Triton 2.51) are wrong in silence: ``tensor.as_numpy()`` has other values, and
``Tensor(name, array)`` has no bytes. So both ways go through DLPack; and there

* arrays of no elements are refused ("not contiguous"): these do go by ``Tensor(name, array)``, which has no bytes;
* a capsule that was taken is named ``used_dlpack``, which no standard knows, and NumPy prints a traceback when it drops one of
  that name: it gets the right name back.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from hps_numba.frontends.inference.problems import message_of, status_of
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse

__all__ = ["array_of", "backend", "error_response", "request_of", "response_of", "tensor_of"]

_USED = b"used_dltensor"  # a capsule keeps the address of its name
_rename = ctypes.pythonapi.PyCapsule_SetName
_rename.argtypes, _rename.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_int
_CODES = {
    400: "INVALID_ARG",
    404: "NOT_FOUND",
    409: "ALREADY_EXISTS",
    413: "INVALID_ARG",
    415: "INVALID_ARG",
    429: "UNAVAILABLE",
    499: "CANCELLED",
    503: "UNAVAILABLE",
}


def backend() -> Any:
    """The module of the backend.

    Raises:
        ImportError: this process is none of Triton's.
    """
    return importlib.import_module("triton_python_backend_utils")


def array_of(tensor: Any) -> np.ndarray:
    """The memory of an input as an array, which is valid as long as the request is answered; it may be read-only."""
    return np.from_dlpack(tensor)


def tensor_of(name: str, array: np.ndarray) -> Any:
    """An output; its memory is that of the array, which it keeps alive."""
    array = np.asarray(array, order="C")
    if not array.size:
        return backend().Tensor(name, array)
    capsule = array.__dlpack__()
    tensor = backend().Tensor.from_dlpack(name, capsule)
    _rename(capsule, _USED)
    return tensor


def request_of(request: Any, model: str) -> InferenceRequest:
    """A request of Triton's for the model of a server.

    Which outputs the client wants is left out: Triton names all of them for a client that names none.
    """
    text = request.parameters() if hasattr(request, "parameters") else "{}"
    return InferenceRequest(
        model,
        {tensor.name(): array_of(tensor) for tensor in request.inputs()},
        id=request.request_id(),
        parameters=_parameters(text),
    )


def _parameters(text: Any) -> Mapping[str, Any]:
    given = json.loads(text) if text else {}
    return given if isinstance(given, dict) else {}


def response_of(response: InferenceResponse, wanted: Any) -> Any:
    """Triton's form of an answer, with the outputs that are wanted; parameters go along where the server has them."""
    tensors = [tensor_of(name, array) for name, array in response.outputs.items() if name in wanted]
    kind = backend().InferenceResponse
    if response.parameters and _takes_parameters(kind):
        return kind(tensors, parameters=dict(response.parameters))
    return kind(tensors)


def _takes_parameters(kind: Any) -> bool:
    return "parameters" in (kind.__init__.__doc__ or "")


def error_response(error: BaseException) -> Any:
    """An answer that says what is wrong, with the code that Triton turns into the same HTTP status."""
    pb = backend()
    code = getattr(pb.TritonError, _CODES.get(status_of(error), "INTERNAL"), None)
    message = message_of(error)
    return pb.InferenceResponse(error=pb.TritonError(message) if code is None else pb.TritonError(message, code))
