"""Tables as an inference model: both ways to ask, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of

from hps_numba import HPS
from hps_numba.errors import ClosedError, HpsError, UnknownModelError, VersionError
from hps_numba.frontends.inference.problems import InferenceError, message_of, status_of
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.frontends.inference.tensors import InferenceRequest

KEYS = np.array([3, 1, 4, 99, 5])


@pytest.fixture
def server(workshop: Workshop) -> HPS:
    return workshop.open(workshop.model((range(20), 4), (range(20), 8), embedding_table_names=["user", "item"]))


def ask(server: HPS, inputs: dict[str, Any], **more: Any) -> Any:
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return TableSetModel(server, "m").infer(InferenceRequest("m", arrays, **more))


@pytest.mark.parametrize("dims", [1, 2])
def test_flat_rows_are_those_of_each_table_in_turn(server: HPS, dims: int) -> None:
    keys = np.array([3, 1, 4, 99, 5]) if dims == 1 else np.array([[3, 1, 4, 99, 5]])
    counts = np.array([2, 3], np.int32) if dims == 1 else np.array([[2, 3]], np.int32)
    answer = ask(server, {"KEYS": keys, "NUMKEYS": counts}, id="7")
    expected = np.concatenate([server.lookup([3, 1], "m", 0).ravel(), server.lookup([4, 99, 5], "m", 1).ravel()])
    assert_same_bits(answer.outputs["OUTPUT0"], expected if dims == 1 else expected[None])
    assert (answer.model, answer.version, answer.id) == ("m", "1", "7")
    assert answer.parameters == {"NumSample": 5, "DeviceID": -1}


def test_a_flat_request_may_leave_tables_out(server: HPS) -> None:
    answer = ask(server, {"KEYS": [7], "NUMKEYS": np.array([0, 1], np.int32)})
    assert_same_bits(answer.outputs["OUTPUT0"], rows_of([7], 8).ravel())
    assert ask(server, {"KEYS": np.empty(0, np.int64), "NUMKEYS": np.zeros(2, np.int32)}).outputs["OUTPUT0"].shape == (0,)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 2, 3), (0,), (0, 3), ()])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "uint64"])
def test_named_rows_have_the_shape_of_their_keys(server: HPS, shape: tuple[int, ...], dtype: str) -> None:
    keys = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    answer = ask(server, {"item": keys})
    assert_same_bits(answer.outputs["item"], server.lookup(keys, "m", "item"))


@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_bags_are_pooled(server: HPS, mode: str, weighted: bool) -> None:
    offsets, weights = np.array([0, 2, 2, 5]), np.array([1, 2, 0.5, 1, 3], np.float32) if weighted else None
    inputs = {"user": KEYS, "user.offsets": offsets, "item": KEYS} | ({"user.weights": weights} if weighted else {})
    expected = server.lookup_pooled(KEYS, offsets, "m", "user", weights=weights, combiner=mode)
    for more in ({"parameters": {"mode": mode}}, {"input_parameters": {"user": {"mode": mode}}}):
        answer = ask(server, inputs, **more)
        assert_same_bits(answer.outputs["user"], expected)
        assert_same_bits(answer.outputs["item"], server.lookup(KEYS, "m", "item"))


def test_rows_in_half_precision_and_chosen_outputs(server: HPS) -> None:
    answer = ask(server, {"user": KEYS, "item": KEYS}, parameters={"output_dtype": "FP16"}, outputs=("item",))
    assert list(answer.outputs) == ["item"]
    rows = answer.outputs["item"]
    assert rows.dtype == np.float16 and np.array_equal(rows, server.lookup(KEYS, "m", "item").astype(np.float16))


@pytest.mark.parametrize(
    ("inputs", "more", "match"),
    [
        ({}, {}, "got none"),
        ({"KEYS": [1]}, {}, "'KEYS'"),
        ({"KEYS": [1], "NUMKEYS": [1]}, {}, "NUMKEYS: expected 2 counts"),
        ({"KEYS": [1], "NUMKEYS": [1, 1]}, {}, "sum is 1"),
        ({"KEYS": [1], "NUMKEYS": [2, -1]}, {}, "sum is 1"),
        ({"KEYS": [[1], [2]], "NUMKEYS": [1, 1]}, {}, r"\[n\] or \[1, n\]"),
        ({"KEYS": [1.0], "NUMKEYS": [1, 0]}, {}, "KEYS: expected integers"),
        ({"KEYS": [1], "NUMKEYS": [1.0, 0]}, {}, "NUMKEYS: expected integers"),
        ({"KEYS": [1], "NUMKEYS": [1, 0], "user": [1]}, {}, "alone, got user"),
        ({"nobody": [1]}, {}, "'nobody'"),
        ({"user.offsets": [0]}, {}, "'user.offsets'"),
        ({"user": [1.5]}, {}, "user: expected integers"),
        ({"user": [1], "user.weights": np.ones(1, np.float32)}, {}, "user.offsets: expected offsets"),
        ({"user": [1], "user.offsets": [0.0, 1.0]}, {}, "user.offsets: expected integers"),
        ({"user": [1], "user.offsets": [0, 1]}, {"parameters": {"mode": "median"}}, "'median'"),
        ({"user": [1]}, {"parameters": {"output_dtype": "INT8"}}, "'INT8'"),
        ({"user": [1]}, {"outputs": ("item",)}, "'item'"),
    ],
)
def test_a_wrong_request_is_refused(server: HPS, inputs: dict[str, Any], more: dict[str, Any], match: str) -> None:
    with pytest.raises(InferenceError, match=match) as problem:
        ask(server, inputs, **more)
    assert status_of(problem.value) == 400


def test_a_version_that_is_not_in_force_is_not_found(server: HPS) -> None:
    assert ask(server, {"user": KEYS}, version="1").version == "1"
    for version in ("2", "-1", "one", "1.0", "9" * 40):
        with pytest.raises(VersionError) as problem:
            ask(server, {"user": KEYS}, version=version)
        assert status_of(problem.value) == 404
    server.replace_model("m", version=5)
    assert ask(server, {"user": KEYS}, version="5").version == "5"


def test_the_size_of_an_answer_is_told_before_it_is_made(server: HPS) -> None:
    model = TableSetModel(server, "m")
    for inputs, most in (
        ({"user": KEYS, "item": KEYS}, 5 * 12 * 4),
        ({"user": KEYS, "user.offsets": np.array([0, 5])}, 2 * 4 * 4),
        ({"KEYS": KEYS, "NUMKEYS": np.array([2, 3])}, 5 * 8 * 4),
    ):
        request = InferenceRequest("m", inputs)
        assert sum(rows.nbytes for rows in model.infer(request).outputs.values()) <= model.output_bytes(request) == most


def test_small_batches_in_host_memory_do_not_wait(workshop: Workshop, server: HPS) -> None:
    model = TableSetModel(server, "m")
    assert not model.may_wait(InferenceRequest("m", {"user": KEYS}))
    assert model.may_wait(InferenceRequest("m", {"user": np.zeros(1_000_000, np.int64)}))
    cold, _ = workshop.open_cold()
    assert TableSetModel(cold, "m").may_wait(InferenceRequest("m", {"sparse_embedding0": KEYS}))


def test_metadata_lists_both_ways(server: HPS) -> None:
    model = TableSetModel(server, "m")
    assert [spec.name for spec in model.inputs][:4] == ["KEYS", "NUMKEYS", "user", "user.offsets"]
    assert {spec.name: spec.shape for spec in model.outputs} == {"OUTPUT0": (-1,), "user": (-1, 4), "item": (-1, 8)}
    assert all(spec.optional for spec in model.inputs) and model.ready() and model.versions() == ("1",)


def test_a_repository_serves_loads_and_unloads(server: HPS) -> None:
    closed = Repository(server)
    for change in (closed.load, closed.unload):
        with pytest.raises(InferenceError, match="--allow-control") as problem:
            change("m")
        assert status_of(problem.value) == 403
    models = Repository(server, may_change=True)
    assert models.model("m") is models.model("m") and models.ready() and models.names() == ("m",)
    models.load("m")
    assert [(entry.name, entry.version, entry.state) for entry in models.index()] == [("m", "2", "READY")]
    models.unload("m")
    assert [(entry.version, entry.state, entry.reason) for entry in models.index()] == [("", "UNAVAILABLE", "unloaded")]
    with pytest.raises(UnknownModelError, match=r"'m' is not served, served are none$"):
        models.model("m")
    with pytest.raises(UnknownModelError, match=r"'m' is not deployed, deployed are none$"):
        server.lookup(KEYS, "m", 0)
    for missing in (
        lambda: models.model("m"),
        lambda: models.unload("m"),
        lambda: models.load("../m"),
        lambda: models.model("x"),
    ):
        with pytest.raises(UnknownModelError):
            missing()
    models.load("m")
    request = InferenceRequest("m", {"user": KEYS})
    assert_same_bits(models.model("m").infer(request).outputs["user"], server.lookup(KEYS, "m", 0))
    server.close()
    assert not models.ready()
    with pytest.raises(ClosedError):
        models.model("m")


def test_a_load_that_fails_says_why(server: HPS, workshop: Workshop) -> None:
    models = Repository(server, may_change=True)
    models.unload("m")
    for file in workshop.folder.glob("*.model/key"):
        file.unlink()
    with pytest.raises(HpsError):
        models.load("m")
    assert "key" in models.index()[0].reason


def test_a_client_is_not_told_of_faults_of_others() -> None:
    assert message_of(ZeroDivisionError("secret")) == "internal error: ZeroDivisionError; the log of the server says more"
    assert status_of(ZeroDivisionError()) == 500 and status_of(ClosedError("x")) == 503
