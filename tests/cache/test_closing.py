"""Calls for arrays of the host that are not over when their cache is closed: their stream outlives it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.cache_bench import Bench
from support.oracles import assert_same_bits, rows_of
from support.waiting import join_all

from hps_numba.cache.backends import CpuBackend
from hps_numba.cache.group import CacheGroup
from hps_numba.errors import ClosedError

DIM, KEYS = 4, np.arange(50)


class Streams:
    """Streams of the CPU that can be told apart, and must be there when they are used; a call at the end of a copy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = {0}
        self.before_copy: Callable[[], object] | None = None
        numbers = itertools.count(1)
        to_host, from_host = CpuBackend.to_host, CpuBackend.from_host

        def new(backend: CpuBackend) -> int:
            self.there.add(number := next(numbers))
            return number

        def destroy(backend: CpuBackend, stream: int) -> None:
            self.there.remove(stream)

        def copy_to_host(backend: CpuBackend, array: np.ndarray, address: int, stream: int) -> None:
            call, self.before_copy = self.before_copy, None
            if call is not None:
                call()
            assert stream in self.there, "the stream was destroyed before"
            to_host(backend, array, address, stream)

        def copy_from_host(backend: CpuBackend, address: int, array: np.ndarray, stream: int) -> None:
            assert stream in self.there, "the stream was destroyed before"
            from_host(backend, address, array, stream)

        for name, function in {
            "new_stream": new,
            "destroy_stream": destroy,
            "to_host": copy_to_host,
            "from_host": copy_from_host,
        }.items():
            monkeypatch.setattr(CpuBackend, name, function)


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    join_all(thread)


def calls_of(kind: str, bench: Bench) -> tuple[Callable[[], Any], Callable[[], None]]:
    """A call that returns the rows of KEYS, and how what answers it is closed."""
    stores = [bench.store(KEYS, dim=DIM) for _ in range(2)]
    caches = [bench.cache(store, 20) for store in stores]
    if kind == "lookup":
        return lambda: caches[0].lookup_arrays(KEYS), caches[0].close
    if kind == "pool":
        return lambda: caches[0].pool_arrays(KEYS, np.arange(len(KEYS) + 1)), caches[0].close
    group = CacheGroup(caches, buffers=2)

    def close() -> None:
        group.close()
        for cache in caches:
            cache.close()

    return lambda: group.lookup_arrays([KEYS, KEYS])[1], close


@pytest.mark.parametrize("kind", ["lookup", "pool", "group"])
def test_a_call_whose_cache_is_closed_before_it_has_copied_its_rows_returns_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams, bench = Streams(monkeypatch), Bench(None)
    call, close = calls_of(kind, bench)
    streams.before_copy = lambda: in_a_thread(close)
    assert_same_bits(call(), rows_of(KEYS, DIM))
    assert streams.before_copy is None
    bench.close()
    assert streams.there == {0}
    with pytest.raises(ClosedError, match="closed"):
        call()
