"""A Redis server that the tests of one module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.redis_servers import Server, one_server


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with one_server(tmp_path_factory.mktemp("redis")) as server:
        yield server
