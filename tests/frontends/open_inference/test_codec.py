"""Requests and answers as bodies: what one side encodes the other decodes, bit for bit; errors name their place."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import DATATYPES, InferenceRequest, InferenceResponse
from hps_numba.frontends.open_inference.codec import Body, decode_request, decode_response, encode_request, encode_response
from hps_numba.frontends.open_inference.heads import AnswerForm

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
PARAMETERS = st.dictionaries(
    NAMES.filter(lambda name: not name.startswith(("binary_data", "shared_memory", "classification"))),
    st.one_of(st.text(max_size=5), st.booleans(), st.integers(-(2**63), 2**63), st.floats(-1e300, 1e300)),
    max_size=3,
)


def tensors(finite: bool) -> st.SearchStrategy[dict[str, np.ndarray]]:
    shapes = arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    elements = {"allow_nan": False, "allow_infinity": False} if finite else None
    one = st.sampled_from(list(DATATYPES.values())).flatmap(
        lambda dtype: arrays_of.arrays(dtype, shapes, elements=arrays_of.from_dtype(dtype, **(elements or {})))
    )
    return st.dictionaries(NAMES, one, max_size=4)


def joined(body: Body) -> bytes:
    return b"".join(body.parts)


def assert_same_tensors(got: Any, expected: Any) -> None:
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape
        assert got[name].tobytes() == array.tobytes()
        assert got[name].flags.aligned


@settings(deadline=None)
@given(st.data(), st.booleans(), PARAMETERS, st.text(max_size=5))
def test_a_request_comes_through(data: st.DataObject, binary: bool, parameters: dict[str, Any], id_: str) -> None:
    inputs = data.draw(tensors(finite=not binary))
    own = {name: data.draw(PARAMETERS) for name in inputs}
    by_output = data.draw(st.dictionaries(NAMES, st.booleans(), max_size=3))
    form = AnswerForm(data.draw(st.booleans()), by_output)
    sent = InferenceRequest("m", inputs, "3", id_, parameters, own, tuple(by_output))
    body = encode_request(sent, form, binary=binary)
    got, wanted = decode_request(joined(body), "m", "3", body.json_size)
    assert_same_tensors(got.inputs, inputs)
    assert (got.model, got.version, got.id, got.parameters) == ("m", "3", id_, parameters)
    assert got.input_parameters == {name: one for name, one in own.items() if one}
    assert (got.outputs, wanted) == (tuple(by_output), form)
    assert body.size == len(joined(body))


@settings(deadline=None)
@given(st.data(), PARAMETERS, st.text(max_size=5))
def test_an_answer_comes_through(data: st.DataObject, parameters: dict[str, Any], id_: str) -> None:
    binary = data.draw(st.booleans())
    outputs = data.draw(tensors(finite=True))
    form = AnswerForm(binary, {name: data.draw(st.booleans()) for name in list(outputs)[:2]})
    body = encode_response(InferenceResponse("m", "9", outputs, id_, parameters), form)
    got = decode_response(joined(body), body.json_size)
    assert_same_tensors(got.outputs, outputs)
    assert (got.model, got.version, got.id, got.parameters) == ("m", "9", id_, parameters)


def test_bytes_are_neither_copied_in_nor_out() -> None:
    keys = np.arange(1000)
    body = encode_request(InferenceRequest("m", {"k": keys}), AnswerForm(True))
    assert np.shares_memory(np.frombuffer(body.parts[1], np.uint8), keys)
    padding = b" " * (-len(body.parts[0]) % 8)
    text = joined(Body((padding, *body.parts), None))
    request, _ = decode_request(text, "m", "", len(text) - keys.nbytes)
    assert np.shares_memory(request.inputs["k"], np.frombuffer(text, np.uint8))


def test_few_keys_can_be_written_to_and_leave_the_body_as_it_is() -> None:
    keys = np.arange(32)
    body = encode_request(InferenceRequest("m", {"k": keys}), AnswerForm(True))
    text = joined(body)
    request, _ = decode_request(text, "m", "", body.json_size)
    request.inputs["k"][:] = 7
    again, _ = decode_request(text, "m", "", body.json_size)
    assert again.inputs["k"].tolist() == keys.tolist()


def test_a_request_may_change_its_parameters_and_the_next_of_the_same_text_has_its_own() -> None:
    asked = InferenceRequest("m", {"k": np.arange(3)}, parameters={"mode": "sum"}, input_parameters={"k": {"mode": "mean"}})
    body = encode_request(asked, AnswerForm(True))
    for model in ("m", "n"):
        request, form = decode_request(joined(body), model, "", body.json_size)
        assert (request.model, request.parameters, request.input_parameters) == (
            model,
            {"mode": "sum"},
            {"k": {"mode": "mean"}},
        )
        assert form.binary
        request.parameters["mode"] = "max"  # type: ignore[index]
        request.input_parameters["k"]["mode"] = "max"  # type: ignore[index]


def test_answers_of_one_form_have_their_own_values_and_shapes() -> None:
    for shape in ((2, 3), (3, 2), (2, 3), (0, 3)):
        for dtype in (np.float32, np.float16):
            rows = np.random.default_rng(1).random(shape).astype(dtype)
            body = encode_response(InferenceResponse("m", "1", {"t": rows}), AnswerForm(True))
            got = decode_response(joined(body), body.json_size)
            assert got.outputs["t"].dtype == dtype
            assert got.outputs["t"].shape == shape
            assert np.array_equal(got.outputs["t"], rows)
            assert (got.model, got.version, got.id) == ("m", "1", "")


def test_heads_that_are_wrong_are_refused_each_time() -> None:
    text = b'{"inputs": [{"name": "k", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 4}}]}'
    for _ in range(2):
        with pytest.raises(InferenceError, match="expected 8 bytes"):
            decode_request(text + b"1234", "m", "", len(text))


@pytest.mark.parametrize("data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]])
def test_lists_may_be_flat_or_nested(data: list[Any]) -> None:
    text = {"inputs": [{"name": "k", "datatype": "INT32", "shape": [2, 3], "data": data}]}
    request, form = decode_request(json.dumps(text).encode(), "m")
    assert request.inputs["k"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert form == AnswerForm()


def tensor(**changes: Any) -> dict[str, Any]:
    entry = {"name": "k", "datatype": "INT64", "shape": [2], "data": [1, 2], **changes}
    return {name: value for name, value in entry.items() if value is not ...}


BINARY = {"data": ..., "parameters": {"binary_data_size": 16}}


@pytest.mark.parametrize(
    ("head", "tail", "match"),
    [
        ("", b"", "body: expected JSON"),
        ("[1]", b"", "body: expected an object in JSON, got list"),
        ('{"inputs": [NaN]}', b"", "NaN is not JSON"),
        ("[" * 100_000, b"", "body: expected JSON"),
        ('{"id": ' + "9" * 5000 + "}", b"", "body: expected JSON"),
        ({}, b"", "inputs: expected a list"),
        ({"inputs": {}}, b"", "inputs: expected a list"),
        ({"inputs": [3]}, b"", r"inputs\[0\]: expected an object, got int"),
        ({"id": 3, "inputs": []}, b"", "id: expected a string"),
        ({"parameters": [], "inputs": []}, b"", "request.parameters: expected an object"),
        ({"parameters": {"a": [1]}, "inputs": []}, b"", "request.parameters.a: expected a string"),
        ({"parameters": {"binary_data_output": 1}, "inputs": []}, b"", "binary_data_output: expected true or false"),
        ({"inputs": [], "outputs": 3}, b"", "outputs: expected a list"),
        ({"inputs": [], "outputs": [{}]}, b"", r"outputs\[0\].name: expected a name"),
        ({"inputs": [], "outputs": [{"name": "a"}, {"name": "a"}]}, b"", r"outputs\[1\].name: expected another"),
        ({"inputs": [], "outputs": [{"name": "a", "parameters": {"classification": 3}}]}, b"", "classification"),
        ({"inputs": [tensor(name="")]}, b"", r"inputs\[0\].name"),
        ({"inputs": [tensor(), tensor()]}, b"", r"inputs\[1\].name: expected another than 'k'"),
        ({"inputs": [tensor(datatype="BYTES")]}, b"", r"inputs\[0\].datatype: expected one of BOOL, .* got 'BYTES'"),
        ({"inputs": [tensor(datatype=...)]}, b"", r"inputs\[0\].datatype"),
        ({"inputs": [tensor(shape=2)]}, b"", r"inputs\[0\].shape: expected a list"),
        ({"inputs": [tensor(shape=[-1])]}, b"", r"inputs\[0\].shape"),
        ({"inputs": [tensor(shape=[True, 2])]}, b"", r"inputs\[0\].shape"),
        ({"inputs": [tensor(shape=[2**41])]}, b"", r"inputs\[0\].shape"),
        ({"inputs": [tensor(shape=[1] * 17)]}, b"", r"inputs\[0\].shape"),
        ({"inputs": [tensor(shape=[2**40] * 16)]}, b"", r"inputs\[0\].data: expected \d+ values for shape"),
        ({"inputs": [tensor(data=...)]}, b"", r"inputs\[0\].data: expected a list"),
        ({"inputs": [tensor(data=[1])]}, b"", r"inputs\[0\].data: expected 2 values for shape \[2\], got 1"),
        ({"inputs": [tensor(data=[1, 2.0])]}, b"", r"inputs\[0\].data: expected values of int64, got 2.0"),
        ({"inputs": [tensor(data=[1, True])]}, b"", "expected values of int64, got True"),
        ({"inputs": [tensor(data=[1, "2"])]}, b"", "expected values of int64, got '2'"),
        ({"inputs": [tensor(data=[1, 2**63])]}, b"", "one out of its range"),
        ({"inputs": [tensor(datatype="UINT8", data=[-1, 2])]}, b"", "one out of its range"),
        ({"inputs": [tensor(datatype="FP32", data=[1e300, 2])]}, b"", "one out of its range"),
        ({"inputs": [tensor(datatype="BOOL", data=[1, 0])]}, b"", "expected values of bool, got 1"),
        ({"inputs": [tensor(data=[[1], [2]])]}, b"", "expected values of int64|nested as shape"),
        ({"inputs": [tensor(shape=[2, 2], data=[[1, 2], [3]])]}, b"", "expected lists nested as shape"),
        ({"inputs": [tensor(shape=[2, 2], data=[[1, 2]])]}, b"", "expected lists nested as shape"),
        ({"inputs": [tensor(parameters=3)]}, b"", r"inputs\[0\].parameters: expected an object"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "r"})]}, b"", "shared_memory_byte_size"),
        ({"inputs": [tensor(parameters={"shared_memory_region": "r", "shared_memory_byte_size": 8})]}, b"", "two of them"),
        ({"inputs": [tensor(**BINARY)]}, b"12345678", r"inputs\[0\]: expected 16 bytes, got 8"),
        ({"inputs": [tensor(**BINARY)]}, b"1" * 24, r"body: expected \d+ bytes, JSON and tensors together, got \d+"),
        ({"inputs": [tensor(**BINARY, shape=[3])]}, b"1" * 16, r"expected 24 bytes for shape \[3\] of int64, got 16"),
        ({"inputs": [tensor(parameters={"binary_data_size": 16})]}, b"1" * 16, "either data or binary_data_size, got both"),
        ({"inputs": [tensor(data=..., parameters={"binary_data_size": -8})]}, b"", "binary_data_size: expected a number"),
        ({"inputs": [tensor(data=..., parameters={"binary_data_size": 1.5})]}, b"", "binary_data_size: expected a number"),
        (
            {"inputs": [tensor(datatype="BOOL", data=..., parameters={"binary_data_size": 2})]},
            b"\x00\x02",
            "bytes 0 or 1",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(head: Any, tail: bytes, match: str) -> None:
    text = head.encode() if isinstance(head, str) else json.dumps(head).encode()
    with pytest.raises(InferenceError, match=match) as failed:
        decode_request(text + tail, "m", "", len(text) if tail else None)
    assert failed.value.status == 400 and len(str(failed.value)) < 500


@pytest.mark.parametrize("json_size", [0, -1, 11])
def test_the_size_of_the_json_is_checked(json_size: int) -> None:
    with pytest.raises(InferenceError, match="Inference-Header-Content-Length: expected 1 to 10"):
        decode_request(b"0123456789", "m", "", json_size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_json_cannot_say_is_refused_and_goes_as_bytes(value: float) -> None:
    answer = InferenceResponse("m", "1", {"o": np.array([value], np.float32)})
    with pytest.raises(InferenceError, match="o: has values that JSON cannot say"):
        encode_response(answer, AnswerForm())
    body = encode_response(answer, AnswerForm(True))
    assert decode_response(joined(body), body.json_size).outputs["o"].tobytes() == answer.outputs["o"].tobytes()


def test_an_answer_of_another_kind_is_refused() -> None:
    with pytest.raises(InferenceError, match="answer: expected strings as model_name"):
        decode_response(b'{"model_name": 3, "outputs": []}')
    with pytest.raises(InferenceError, match="outputs: expected a list"):
        decode_response(b'{"error": "no"}')
