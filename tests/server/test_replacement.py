"""Replacements of a model in service: every answer is of one version, no lookup waits, and nothing is left half done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from support.internals import HANG_SECONDS, served_model
from support.services import DIM, Service

import hps_numba

ROWS = 3000
KINDS: dict[str, dict[str, Any]] = {
    "dynamic": {"gpucacheper": 0.3},
    "whole": {"gpucacheper": 1.0},
    "cold": {"gpucacheper": 0.3, "init_ec": False},
    "static": {"embedding_cache_type": "static"},
    "uvm": {"embedding_cache_type": "uvm", "gpucacheper": 0.4},
    "staged": {"gpucacheper": 0.3, "miss_path": "staged"},
    "counting": {"gpucacheper": 0.3, "cache_policy": "tinylfu"},
    "none": {"gpucache": False},
}


def versioned(folder: Any, version: int, tables: int, rows: int = ROWS) -> list[str]:
    """Sparse models in which every element of every row is the number of the version."""
    paths = []
    for table in range(tables):
        path = folder / f"v{version}_{table}"
        if not path.exists():
            hps_numba.write_model(path, DIM, [(np.arange(rows), np.full((rows, DIM), version, np.float32))])
        paths.append(str(path))
    return paths


def opened(service: Service, tables: int = 1, **entry: Any) -> hps_numba.HPS:
    server = service.open(*[(range(ROWS), DIM)] * tables, max_batch_size=ROWS, **entry)
    server.replace_model("m", versioned(service.workshop.folder, 1, tables))
    return server


def versions_in(rows: Any) -> set[float]:
    return set(np.unique(rows).tolist())


@contextmanager
def in_threads(*works: Callable[[], object]) -> Iterator[threading.Event]:
    """Each ``work`` over and over on a thread of its own, until the block ends; what one raises fails the test."""
    stop, problems = threading.Event(), []

    def run(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except BaseException as problem:
            problems.append(problem)
            stop.set()

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join(HANG_SECONDS)
    assert not problems, problems[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


# --- one version ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_during_replacements_is_of_one_version(service: Service, kind: str) -> None:
    server = opened(service, **KINDS[kind])
    files = [versioned(service.workshop.folder, version, 1) for version in (1, 2)]
    random = [np.random.default_rng(number) for number in range(3)]
    offsets = np.array([0, 700, 1500])
    answers = [0, 0, 0]

    def look_up(number: int) -> None:
        keys = service.keys(random[number].integers(0, ROWS, 1500))
        if number == 2:
            rows = service.on_host(
                server.lookup_pooled(keys, service.keys(offsets), "m", 0, service.device or 0, combiner="mean")
            )
        else:
            rows = service.on_host(server.lookup(keys, "m", 0, service.device or 0))
        assert len(versions_in(rows)) == 1, versions_in(rows)
        answers[number] += 1

    with in_threads(*(lambda number=number: look_up(number) for number in range(3))) as stop:  # type: ignore[misc]
        for number in range(1, 41):
            if stop.is_set():
                break
            server.replace_model("m", files[number % 2])
            now = 1.0 + number % 2
            rows = service.on_host(server.lookup(service.keys(range(ROWS)), "m", 0, service.device or 0))
            assert versions_in(rows) == {now}
    assert min(answers) > 0


@pytest.mark.parametrize("kind", ["dynamic", "whole", "none"])
def test_lookup_many_during_replacements_is_of_one_version(service: Service, kind: str) -> None:
    server = opened(service, 4, **KINDS[kind])
    files = [versioned(service.workshop.folder, version, 4) for version in (1, 2)]
    random = [np.random.default_rng(number) for number in range(2)]

    def look_up(number: int) -> None:
        keys = [service.keys(random[number].integers(0, ROWS, 700)) for _ in range(4)]
        rows = [service.on_host(some) for some in server.lookup_many(keys, "m", service.device or 0)]
        assert len(versions_in(np.concatenate(rows))) == 1

    with in_threads(lambda: look_up(0), lambda: look_up(1)) as stop:
        for number in range(1, 31):
            if stop.is_set():
                break
            server.replace_model("m", files[number % 2])
    assert served_model(server).version == 32


def test_counts_add_up_after_replacements_beside_lookups(service: Service) -> None:
    server = opened(service, **KINDS["dynamic"])
    files = [versioned(service.workshop.folder, version, 1) for version in (1, 2)]
    asked = [0]
    before = server.stats()["m"]["sparse_embedding0"].keys

    def look_up() -> None:
        server.lookup(service.keys(range(0, ROWS, 3)), "m", 0, service.device or 0)
        asked[0] += len(range(0, ROWS, 3))

    with in_threads(look_up):
        for number in range(1, 11):
            server.replace_model("m", files[number % 2])
    stats = server.stats()["m"]["sparse_embedding0"]
    assert stats.keys - before == asked[0]
    assert stats.keys == stats.cache_hits + stats.host_hits + stats.absent


# --- nobody waits -----------------------------------------------------------------------------------------------------


class Stopped:
    """Stops a thread where it calls a method, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.reached, self.go = threading.Event(), threading.Event()
        original = getattr(owner, name)

        def stopped(*args: Any, **named: Any) -> Any:
            self.reached.set()
            assert self.go.wait(HANG_SECONDS)
            return original(*args, **named)

        monkeypatch.setattr(owner, name, stopped)


@contextmanager
def replacing(server: hps_numba.HPS, files: list[str]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=server.replace_model, args=("m", files), daemon=True)
    thread.start()
    yield thread
    thread.join(HANG_SECONDS)
    assert not thread.is_alive()


STEPS = {
    "loading": ("hps_numba.server.replacement.new_version", False),
    "waiting for lookups": ("hps_numba.cache.workspace_set.WorkspaceSet.drain", True),
    "filling the caches": ("hps_numba.cache.warming.Warming.warm", True),
    "releasing old rows": ("hps_numba.storage.host.store.HostStore.retire", True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_lookup_waits_for_a_replacement(service: Service, monkeypatch: pytest.MonkeyPatch, kind: str, step: str) -> None:
    server = opened(service, 2, **KINDS[kind])
    path, turned = STEPS[step]
    owner, _, name = path.rpartition(".")
    stop = Stopped(monkeypatch, _resolve(owner), name)
    expected = {2.0 if turned else 1.0}
    keys = service.keys(range(ROWS))
    with replacing(server, versioned(service.workshop.folder, 2, 2)):
        assert stop.reached.wait(HANG_SECONDS)
        for _ in range(2):
            assert versions_in(service.on_host(server.lookup(keys, "m", 0, service.device or 0))) == expected
            many = server.lookup_many([keys, keys], "m", service.device or 0)
            assert versions_in(np.concatenate([service.on_host(rows) for rows in many])) == expected
            offsets = service.keys([0, 10, ROWS])
            pooled = server.lookup_pooled(keys, offsets, "m", 1, service.device or 0, combiner="mean")
            assert versions_in(service.on_host(pooled)) == expected
            assert server.lookup([1], "m", 0)[0, 0] in expected
        stop.go.set()


def _resolve(path: str) -> Any:
    import importlib

    module, name = path, ""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)
