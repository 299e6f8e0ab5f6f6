"""Tensors between Triton and NumPy, and errors as Triton tells them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support import played_triton
from support.played_triton import PlayedRequest

from hps_numba.errors import ClosedError, HpsError, TierUnavailable, UnknownModelError
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceResponse
from hps_numba.frontends.triton.python_backend import backend, error_response, request_of, response_of, tensor_of


@pytest.fixture(autouse=True)
def pb(monkeypatch: pytest.MonkeyPatch) -> Any:
    return played_triton.play(monkeypatch)


def test_without_triton_there_is_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ImportError):
        backend()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0,), (0, 4), (2, 0, 3)])
def test_outputs_keep_values_shape_and_dtype(shape: tuple[int, ...], dtype: Any) -> None:
    """A capsule of a wrong name would be an unraisable exception here, and those are errors."""
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    tensor = tensor_of("x", array)
    np.testing.assert_array_equal(tensor.array, array, strict=True)


def test_outputs_that_are_not_contiguous() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)[:, ::2]
    np.testing.assert_array_equal(tensor_of("x", array).array, array, strict=True)


def test_a_request() -> None:
    given = PlayedRequest({"a": np.arange(4), "b": np.zeros((0, 2), np.int32)}, ["x"], mode="max", n=3)
    request = request_of(given, "m")
    assert (request.model, request.id, request.parameters, request.outputs) == ("m", "7", {"mode": "max", "n": 3}, ())
    np.testing.assert_array_equal(request.inputs["a"], np.arange(4), strict=True)
    np.testing.assert_array_equal(request.inputs["b"], np.zeros((0, 2), np.int32), strict=True)


def test_only_wanted_outputs_go_back() -> None:
    answer = InferenceResponse("m", "1", {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)})
    assert list(response_of(answer, {"b", "c"}).outputs) == ["b"]


@pytest.mark.parametrize("has_them", [True, False])
def test_parameters_go_back_where_the_server_has_them(monkeypatch: pytest.MonkeyPatch, has_them: bool) -> None:
    played_triton.play(monkeypatch, with_parameters=has_them)
    answer = InferenceResponse("m", "1", {"a": np.ones(2, np.float32)}, "", {"NumSample": 2, "DeviceID": -1})
    assert response_of(answer, {"a"}).parameters == ({"NumSample": 2, "DeviceID": -1} if has_them else None)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InferenceError(400, "keys: expected x, got y"), "INVALID_ARG", "keys: expected x, got y"),
        (InferenceError(413, "large"), "INVALID_ARG", "large"),
        (UnknownModelError("no table"), "NOT_FOUND", "no table"),
        (TierUnavailable("down"), "UNAVAILABLE", "down"),
        (ClosedError("closed"), "UNAVAILABLE", "closed"),
        (HpsError("odd"), "INTERNAL", "odd"),
        (ZeroDivisionError("/secret/path"), "INTERNAL", "internal error: ZeroDivisionError; the log of the server says more"),
    ],
)
def test_errors(pb: Any, error: Exception, code: str, message: str) -> None:
    told = error_response(error).error
    assert (told.message, told.code) == (message, getattr(pb.TritonError, code))
