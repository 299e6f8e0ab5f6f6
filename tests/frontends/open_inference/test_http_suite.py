"""The suite of requests by HTTP against ``hps-numba serve``: JSON and binary tensors, by three clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.inference_endpoints import Endpoint, OwnClient, PlainHttp, TritonHttp
from support.inference_servers import serving
from support.inference_suite import CASES, Case, write_suite

from hps_numba import HPS

MAX_BYTES = 1 << 20
CLIENTS: dict[str, Callable[[str], Endpoint]] = {
    "tritonclient-binary": lambda url: TritonHttp(url, max_bytes=MAX_BYTES),
    "tritonclient-json": lambda url: TritonHttp(url, binary=False, max_bytes=MAX_BYTES),
    "plain-binary": lambda url: PlainHttp(url, binary=True, max_bytes=MAX_BYTES),
    "plain-json": lambda url: PlainHttp(url, max_bytes=MAX_BYTES),
    "own-client": lambda url: OwnClient(url, max_bytes=MAX_BYTES),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture(scope="module")
def reference(config: Path) -> Iterator[HPS]:
    with HPS(config) as server:
        yield server


@pytest.fixture(scope="module")
def url(config: Path) -> Iterator[str]:
    pytest.importorskip("uvicorn")
    with serving(config, "--max-body-mib", "1") as served:
        yield f"127.0.0.1:{served.port}"


@pytest.fixture(scope="module", params=CLIENTS)
def endpoint(request: pytest.FixtureRequest, url: str) -> Iterator[Endpoint]:
    made = CLIENTS[request.param](url)
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_suite(case: Case, endpoint: Endpoint, reference: HPS) -> None:
    case.run(endpoint, reference)
