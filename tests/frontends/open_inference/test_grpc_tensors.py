"""Messages whose heads are the same: each has its own values, and nothing of another request is left in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import SharedRegions
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse

pytest.importorskip("google.protobuf")
from hps_numba.frontends.open_inference.grpc_schema import schema
from hps_numba.frontends.open_inference.grpc_tensors import decode_request, encode_response, parse

REGIONS = SharedRegions()


def message_of(values: Iterable[int], shape: list[int], *, raw: bool, model: str = "m") -> bytes:
    message = schema().messages["ModelInferRequest"](model_name=model)
    message.parameters["mode"].string_param = "sum"
    tensor = message.inputs.add(name="x", datatype="INT64", shape=shape)
    tensor.parameters["mode"].string_param = "mean"
    if raw:
        message.raw_input_contents.append(np.array([*values], np.int64).tobytes())
    else:
        tensor.contents.int64_contents.extend(values)
    data: bytes = message.SerializeToString()
    return data


def decoded(data: bytes) -> InferenceRequest:
    return decode_request(data, REGIONS, lambda size, values: None)[0]


@pytest.mark.parametrize("raw", [True, False])
def test_each_has_its_own_values_and_parameters(raw: bool) -> None:
    for start in (0, 7, 0):
        for model in ("m", "n"):
            request = decoded(message_of(range(start, start + 6), [2, 3], raw=raw, model=model))
            assert request.model == model
            assert request.inputs["x"].tolist() == np.arange(start, start + 6).reshape(2, 3).tolist()
            assert request.parameters == {"mode": "sum"}
            assert request.input_parameters == {"x": {"mode": "mean"}}
            request.inputs["x"][:] = -1
            request.parameters["mode"] = request.input_parameters["x"]["mode"] = "max"  # type: ignore[index]


def test_bytes_that_do_not_fit_are_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(InferenceError, match=r"inputs\[0\]: expected 48 bytes"):
            decoded(message_of(range(5), [2, 3], raw=True))
        assert decoded(message_of(range(6), [2, 3], raw=True)).inputs["x"].shape == (2, 3)


def test_answers_of_one_form_have_their_own_values() -> None:
    for shape in ((2, 3), (3, 2), (0, 3), (2, 3)):
        for dtype, datatype in ((np.float32, "FP32"), (np.float16, "FP16")):
            rows = np.random.default_rng(1).random(shape).astype(dtype)
            told: Any = parse("ModelInferResponse", encode_response(InferenceResponse("m", "1", {"x": rows}), {}, REGIONS))
            (output,) = told.outputs
            assert (told.model_name, told.model_version, told.id) == ("m", "1", "")
            assert (output.name, output.datatype, tuple(output.shape)) == ("x", datatype, shape)
            assert [*told.raw_output_contents] == [rows.tobytes()]
