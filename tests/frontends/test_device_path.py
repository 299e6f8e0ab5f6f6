"""Bindings of requests to caches on a GPU, played by the cache in host memory and by stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hps_numba.arrays.encodings import KEY_ENCODINGS
from hps_numba.errors import ClosedError, UnknownModelError
from hps_numba.frontends._device_path import Bindings, can_pool, find_cache, find_fused
from hps_numba.frontends._queries import Query, TableQuery
from hps_numba.server.direct_access import DirectAccess
from hps_numba.server.registry import SERVERS


class Cache:
    """Answers with what it was asked, until it is closed."""

    dim = 4

    def __init__(self) -> None:
        self.closed = False
        self.asked: list[tuple[Any, ...]] = []

    def lookup(self, *arguments: Any, key_form: str) -> None:
        if self.closed:
            raise ClosedError("closed")
        self.asked.append((*arguments, key_form))

    lookup_stacked = lookup

    def pool(self, *arguments: Any, **options: Any) -> None:
        self.lookup(*arguments, key_form=options["key_form"])


@pytest.fixture
def text(workshop: Any) -> Iterator[str]:
    config = {"supportlonglong": True, "models": [workshop.model((range(20), 4), (range(20), 4), name="m")]}
    yield Query(config, (TableQuery("m", 0, 4),)).to_json()
    SERVERS.close()


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[Cache]:
    """The caches that were found."""
    found: list[Cache] = []

    def cache_on(direct: DirectAccess, device: int, model: str, table: Any) -> Cache | None:
        if device != 0:
            return None
        direct.table_spec(model, table)
        found.append(Cache())
        return found[-1]

    monkeypatch.setattr(DirectAccess, "cache_on", cache_on)
    return found


def test_a_request_is_bound_once(text: str, caches: list[Cache]) -> None:
    bindings = Bindings(find_cache, KEY_ENCODINGS)
    binding = bindings[text, 0]
    assert binding is not None and bindings[text, 0] is binding and len(caches) == 1
    assert binding.dim == 4 and binding.encodings["uint64"] == "int64"
    assert binding.lookup(1, 2, 3, 4, "int64") and caches[0].asked == [(1, 2, 3, 4, "int64")]
    assert binding.pool(1, 2, 3, 4, 5, 6, "int32", "sum", 0, 0) and caches[0].asked[1] == (1, 2, 3, 4, 5, 6, "int32")


def test_where_there_is_no_cache_nothing_is_bound(text: str, caches: list[Cache]) -> None:
    bindings = Bindings(find_cache, KEY_ENCODINGS)
    assert bindings[text, 1] is None and not bindings


def test_a_closed_cache_is_unbound_and_found_again(text: str, caches: list[Cache]) -> None:
    bindings = Bindings(find_cache, KEY_ENCODINGS)
    for call in ("lookup", "pool"):
        binding = bindings[text, 0]
        assert binding is not None
        caches[-1].closed = True
        arguments = (1, 2, 3, 4, "int64") if call == "lookup" else (1, 2, 3, 4, 5, 6, "int64", "sum", 0, 0)
        assert getattr(binding, call)(*arguments) is False and not bindings
        assert getattr(binding, call)(*arguments) is False  # another thread may still hold it
    assert len(caches) == 2


def test_keys_that_are_recorded_go_to_the_server(text: str, caches: list[Cache], tmp_path: Any) -> None:
    binding = Bindings(find_cache, KEY_ENCODINGS)[text, 0]
    assert binding is not None
    (server,) = SERVERS.opened
    with server.record_trace(tmp_path / "trace.npy", "m", 0):
        assert not binding.lookup(1, 2, 3, 4, "int64") and not binding.pool(1, 2, 3, 4, 5, 6, "int64", "sum", 0, 0)
    assert binding.lookup(1, 2, 3, 4, "int64") and len(caches[0].asked) == 1


def test_evenly_spaced_keys_of_several_tables(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    cache = Cache()
    monkeypatch.setattr(DirectAccess, "fused_lookup_on", lambda direct, *arguments: cache)
    bindings = Bindings(find_fused, KEY_ENCODINGS)
    binding = bindings[text, 0]
    assert binding is not None and binding.lookup_stacked(1, 2, 3, 4, 5, 6, "int64")
    assert cache.asked == [(1, 2, 3, 4, 5, 6, "int64")]
    (server,) = SERVERS.opened
    with server.record_trace(tmp_path / "trace.npy", "m", 0):
        assert not binding.lookup_stacked(1, 2, 3, 4, 5, 6, "int64")
    cache.closed = True
    assert not binding.lookup_stacked(1, 2, 3, 4, 5, 6, "int64") and not bindings


def test_tables_of_two_models_are_not_fused(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"supportlonglong": True, "models": [workshop.model((range(9), 4), (range(9), 4), name=name) for name in "ab"]}
    asked = []
    monkeypatch.setattr(DirectAccess, "fused_lookup_on", lambda direct, *arguments: asked.append(arguments) or Cache())
    bindings = Bindings(find_fused, KEY_ENCODINGS)
    one, two = TableQuery("a", 0, 4), TableQuery("a", 1, 4)
    assert bindings[Query(config, (one, two)).to_json(), 3] is not None and asked == [(3, "a", [0, 1])]
    assert bindings[Query(config, (one, TableQuery("b", 0, 4))).to_json(), 3] is None
    SERVERS.close()


def test_what_a_server_cannot_pool(text: str) -> None:
    assert not can_pool(text, 0, 5)  # no cache
    (server,) = SERVERS.opened
    with pytest.raises(UnknownModelError):
        server.direct.can_pool_on(0, "x", 0, 5)
    rows = np.empty((2, 4), np.float32)
    server.direct.lookup_into(np.arange(2), "m", 0, rows)
    assert np.array_equal(rows, server.lookup([0, 1], "m", 0))
