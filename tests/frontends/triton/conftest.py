"""One real Triton for all tests of this folder that a process runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.triton_models import Served, serving


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    pytest.importorskip("tritonclient.grpc")
    with serving(tmp_path_factory.mktemp("triton")) as made:
        yield made
