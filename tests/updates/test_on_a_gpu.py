"""Updates reach a cache while lookups read it: of a GPU, and the same with a cache in host memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from support.oracles import assert_same_bits
from support.services import Service
from support.updates import fresh_bus, source_of, update_of, wait_for
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.updates import open_producer

DIM, ROWS, ROUNDS, THREADS = 8, 400, 40, 3
DEFAULT = -7.5


def full(keys: np.ndarray, value: float) -> np.ndarray:
    return np.full((len(keys), DIM), value, np.float32)


class Readers:
    """Threads that look up random keys where the cache is. Rows are the number of an update, over and over."""

    def __init__(self, service: Service, server: hps_numba.HPS) -> None:
        self.service, self.server = service, server
        self.stop, self.problems = threading.Event(), []  # type: ignore[var-annotated]
        self.seen = np.zeros(THREADS, np.int64)
        self.threads = [threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(THREADS)]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        random, published = np.random.default_rng(number), np.arange(ROUNDS + 1)
        try:
            while not self.stop.is_set():
                keys = random.permutation(ROWS)[:128]
                rows = self.service.lookup(self.server, keys)
                assert (rows == rows[:, :1]).all(), "a row of two updates"
                assert np.isin(rows[:, 0], published).all(), "a row that nobody published"
                self.seen[number] += 1
        except BaseException as problem:
            self.problems.append(problem)

    def end(self) -> None:
        """Each has looked up once more since now, and nothing was wrong."""
        before = self.seen.copy()
        wait_until(lambda: (self.seen > before).all() or self.problems)
        self.stop.set()
        join_all(*self.threads)
        assert not self.problems, self.problems[0]


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_rows_in_a_cache_follow_updates_beside_lookups(service: Service, share: float) -> None:  # U10
    bus, random = fresh_bus(), np.random.default_rng(0)
    entry = service.model((range(ROWS), DIM), gpucacheper=share, hit_rate_threshold=1.0)
    server = service.workshop.open(entry, update_source=source_of(bus, batch_interval_ms=0), cache_on_cpu=True)
    every = np.arange(ROWS)
    expected = full(every, 0)
    wait_for(server, bus.put(update_of(every, expected)))
    assert_same_bits(service.lookup(server, every), expected)
    readers = Readers(service, server)
    for number in range(1, ROUNDS + 1):
        keys = random.permutation(ROWS)[: ROWS // 4]
        expected[keys] = number
        offset = bus.put(update_of(keys, full(keys, number)))
        if number % 8 == 0:
            wait_for(server, offset)
            assert_same_bits(service.lookup(server, every), expected)
    wait_for(server, offset)
    readers.end()
    assert_same_bits(service.lookup(server, every), expected)


def test_deletions_and_new_keys_reach_a_cache(service: Service) -> None:  # U10, U11
    bus, keys = fresh_bus(), np.arange(ROWS)
    entry = service.model((range(ROWS), DIM), gpucacheper=1.0, hit_rate_threshold=1.0)
    server = service.workshop.open(entry, update_source=source_of(bus), cache_on_cpu=True)
    new = np.arange(ROWS, 2 * ROWS)
    both = np.concatenate([keys, new])
    assert (service.lookup(server, new) == DEFAULT).all()
    bus.put(update_of(new, full(new, 2)))
    wait_for(server, bus.put(update_of(keys[::2], None)))
    rows = service.lookup(server, both)
    assert (rows[:ROWS:2] == DEFAULT).all() and (rows[1:ROWS:2] != DEFAULT).all() and (rows[ROWS:] == 2).all()


def test_a_version_reaches_a_cache_as_a_whole(service: Service) -> None:  # U12
    bus, keys = fresh_bus(), np.arange(ROWS)
    entry = service.model((range(ROWS), DIM), gpucacheper=0.5, hit_rate_threshold=1.0)
    server = service.workshop.open(entry, update_source=source_of(bus), cache_on_cpu=True)
    with open_producer({"type": "in_process", "bus": bus.name, "linger_ms": 0}) as producer:
        for version in range(7, 12):
            path = service.workshop.folder / f"version-{version}.model"
            hps_numba.write_model(path, DIM, [(keys, full(keys, version))])
            producer.replace_model("m", version, {"sparse_embedding0": str(path)})
            producer.update("m", "sparse_embedding0", keys[:50], full(keys[:50], version + 0.5), version=version)
            producer.flush()
            wait_until(lambda: bus.behind(server.update_stats()[0].committed.get(0, -1) + 1) == 0)
            rows = service.lookup(server, keys)
            assert (rows[:50] == version + 0.5).all() and (rows[50:] == version).all()
            assert server.model_version("m") == version
