"""The suite of requests against a real Triton 2.51: by tritonclient and plain HTTP, over two instances with shared rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.inference_endpoints import Answer, Endpoint, PlainHttp, TritonGrpc, TritonHttp
from support.inference_suite import CASES, Case
from support.triton_models import Served

from hps_numba import HPS

pytestmark = pytest.mark.xdist_group("triton")

LACKS = {
    "flat 1": "Triton fixes the dimensions of an input: KEYS are [1, n], as clients of HugeCTR send them",
    "shapes": "Triton fixes the dimensions of an input: keys of a table are [n]",
    "key types": "Triton fixes the datatype of an input: keys are INT64",
    "errors": "Triton itself refuses what does not fit the model's config, in its own words",
    "response parameters": "Triton 2.51 has none",
    "input parameters": "Triton does not hand them to the Python backend",
    "max bytes": "Triton 2.51 has no such limit",
    "statistics": "Triton counts a request some time after it was answered",
    "odd tensors": "Triton itself refuses them, in its own words",
}
#: of these, what has to be a typed error: keys that are cast or cut would be other rows
REFUSES = ("flat 1", "shapes", "key types")


def in_order(kind: type[Endpoint]) -> type[Any]:
    """The same endpoint, but outputs are in the order in which they were asked for, which Triton does not tell its models."""

    class InOrder(kind):  # type: ignore[misc, valid-type]
        def _infer(self, inputs: Any, model: str, version: str, id: str, parameters: Any, outputs: Sequence[str]) -> Answer:
            answer: Answer = super()._infer(inputs, model, version, id, parameters, list(outputs))
            names = list(outputs) or [name for name in inputs if name in answer.outputs] or list(answer.outputs)
            assert set(names) >= set(answer.outputs)
            answer.outputs = {name: answer.outputs[name] for name in names if name in answer.outputs}
            return answer

    return InOrder


NO_HALF = {"fp16": "Triton sends no FP16 as JSON"}
CLIENTS: dict[str, Callable[[Served], Endpoint]] = {
    "tritonclient-grpc": lambda served: in_order(TritonGrpc)(served.server.grpc, lacks=LACKS, refuses=REFUSES),
    "tritonclient-binary": lambda served: in_order(TritonHttp)(served.server.http, lacks=LACKS, refuses=REFUSES),
    "plain-json": lambda served: in_order(PlainHttp)(served.server.http, lacks=LACKS | NO_HALF, refuses=REFUSES),
}


@pytest.fixture(scope="module")
def reference(served: Served) -> Iterator[HPS]:
    """Attaches to the rows that Triton's instances share."""
    with HPS(served.suite) as server:
        yield server


@pytest.fixture(scope="module", params=CLIENTS)
def endpoint(request: pytest.FixtureRequest, served: Served) -> Iterator[Endpoint]:
    made = CLIENTS[request.param](served)
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_suite(case: Case, endpoint: Endpoint, reference: HPS) -> None:
    case.run(endpoint, reference)
