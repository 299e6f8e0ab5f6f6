"""The suite of requests by gRPC: tensors as bytes by tritonclient, and as typed contents."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.inference_endpoints import Endpoint, PlainGrpc, TritonGrpc
from support.inference_suite import CASES, Case, write_suite

from hps_numba import HPS
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.open_inference.grpc_server import start_grpc
from hps_numba.frontends.open_inference.limits import Limits

MAX_BYTES = 1 << 20


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HPS]:
    with HPS(write_suite(tmp_path_factory.mktemp("suite"))) as server:
        yield server


@pytest.fixture(scope="module", params=[TritonGrpc, PlainGrpc], ids=lambda kind: kind.kind)
def endpoint(request: pytest.FixtureRequest, reference: HPS) -> Iterator[Endpoint]:
    pytest.importorskip("grpc")
    with start_grpc(Repository(reference), Limits(max_body_bytes=MAX_BYTES)) as running:
        made = request.param(f"127.0.0.1:{running.port}", max_bytes=MAX_BYTES)
        yield made
        made.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_suite(case: Case, endpoint: Endpoint, reference: HPS) -> None:
    case.run(endpoint, reference)
