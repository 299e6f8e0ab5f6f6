"""The model of the Python backend, played: both ways to ask, errors beside answers, load and unload, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import played_triton
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.played_triton import PlayedRequest, arguments

from hps_numba.errors import ClosedError, UnknownModelError
from hps_numba.frontends.triton.model import TritonPythonModel

OUTPUTS = ("OUTPUT0", "user", "item")
FLAT = {"KEYS": [[3, 1, 4, 99, 5]], "NUMKEYS": np.array([[2, 3]], np.int32)}


@pytest.fixture(autouse=True)
def pb(monkeypatch: pytest.MonkeyPatch) -> Any:
    return played_triton.play(monkeypatch)


@pytest.fixture
def ps(workshop: Workshop) -> str:
    model = workshop.model((range(20), 4), (range(20), 8), embedding_table_names=["user", "item"])
    workshop.open_file(model).close()
    return str(workshop.folder / "ps.json")


@pytest.fixture
def model(ps: str) -> Iterator[TritonPythonModel]:
    made = TritonPythonModel()
    made.initialize(arguments("m", ps=ps, metrics_interval="0"))
    yield made
    made.finalize()


def ask(model: TritonPythonModel, inputs: dict[str, Any], *outputs: str, **parameters: Any) -> Any:
    (response,) = model.execute([PlayedRequest(inputs, OUTPUTS, outputs or None, **parameters)])
    return response


def test_flat(model: TritonPythonModel) -> None:
    expected = np.concatenate([rows_of([3, 1], 4).ravel(), rows_of([4], 8).ravel(), [-8.5] * 8, rows_of([5], 8).ravel()])
    answer = ask(model, FLAT)
    assert list(answer.outputs) == ["OUTPUT0"]
    assert_same_bits(answer.outputs["OUTPUT0"], expected.astype(np.float32)[None])


def test_named(model: TritonPythonModel) -> None:
    answer = ask(model, {"item": [[1, 2], [3, 4]], "user": [7]})
    assert_same_bits(answer.outputs["item"], rows_of([[1, 2], [3, 4]], 8))
    assert_same_bits(answer.outputs["user"], rows_of([7], 4))


def test_pooled_by_a_parameter(model: TritonPythonModel) -> None:
    answer = ask(model, {"item": [1, 2, 3], "item.offsets": [0, 2, 3]}, mode="max", output_dtype="FP16")
    expected = np.maximum.reduceat(rows_of([1, 2, 3], 8), [0, 2], axis=0).astype(np.float16)
    np.testing.assert_array_equal(answer.outputs["item"], expected, strict=True)


def test_no_keys(model: TritonPythonModel) -> None:
    assert ask(model, {"item": np.empty(0, np.int64)}).outputs["item"].shape == (0, 8)


def test_a_wrong_request_leaves_others_their_rows(model: TritonPythonModel, pb: Any) -> None:
    good, bad = PlayedRequest({"user": [1]}, OUTPUTS), PlayedRequest({"users": [1]}, OUTPUTS)
    first, second, third = model.execute([good, bad, good])
    assert second.error.code == pb.TritonError.INVALID_ARG
    assert second.error.message == "inputs: expected tables of user, item, got 'users'"
    for answer in (first, third):
        assert_same_bits(answer.outputs["user"], rows_of([1], 4))


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({}, (), "inputs: expected KEYS and NUMKEYS, or tables of user, item, got none"),
        ({"KEYS": [[1]]}, (), "inputs: expected tables of user, item, got 'KEYS'"),
        ({"user": [1.5]}, (), "user: expected integers, got float64"),
        ({"user": [1]}, ("OUTPUT0",), "outputs: expected some of user, got OUTPUT0"),
        (FLAT, ("item", "user"), "outputs: expected some of OUTPUT0, got item, user"),
    ],
)
def test_what_is_wrong_is_named(model: TritonPythonModel, pb: Any, inputs: Any, outputs: Any, message: str) -> None:
    told = ask(model, inputs, *outputs).error
    assert (told.message, told.code) == (message, pb.TritonError.INVALID_ARG)


def test_a_defect_is_logged_and_not_told(
    model: TritonPythonModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Any) -> str:
        raise ZeroDivisionError("/secret/path")

    monkeypatch.setattr(PlayedRequest, "parameters", broken)
    assert "secret" not in ask(model, FLAT).error.message
    assert "ZeroDivisionError: /secret/path" in caplog.text


def test_unloading_closes_the_server(ps: str) -> None:
    model = TritonPythonModel()
    model.initialize(arguments("m", ps=ps))
    server = model._server
    model.finalize()
    with pytest.raises(ClosedError):
        server.lookup([1], "m", 0)
    assert ask(model, FLAT).error is not None


def test_triton_may_call_it_otherwise(ps: str) -> None:
    model = TritonPythonModel()
    model.initialize(arguments("shown", ps=ps, model="m"))
    assert_same_bits(ask(model, {"user": [1]}).outputs["user"], rows_of([1], 4))
    model.finalize()
    with pytest.raises(UnknownModelError):
        TritonPythonModel().initialize(arguments("shown", ps=ps))


def test_a_relative_config_lies_beside_the_model(ps: str) -> None:
    model = TritonPythonModel()
    model.initialize(arguments("m", str(Path(ps).parent), ps="ps.json"))
    assert ask(model, FLAT).error is None
    model.finalize()
