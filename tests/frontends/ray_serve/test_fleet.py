"""A fleet on Ray Serve: the client suite, versions, a replica that is killed, and an application for each model."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inference_endpoints import PlainHttp, Refused, Tensor
from support.inference_suite import CASES, write_suite
from support.ray_fleet import Fleet, ray_fleet
from support.waiting import join_all, wait_until

from hps_numba import HPS

KEYS = np.arange(20)
MAX_BYTES = 1 << 20
LACKS = {"statistics": "each replica counts its own"}
#: what a client sees of a replica that dies; the ingress answers 503 with a page of HTML
NOT_ANSWERED = (OSError, HTTPException, ValueError, Refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return write_suite(folder)


@pytest.fixture(scope="module")
def reference(config: Path) -> Iterator[HPS]:
    with HPS(config) as server:
        yield server


@pytest.fixture(scope="module")
def fleet(folder: Path, config: Path) -> Iterator[Fleet]:
    with ray_fleet(folder) as fleet:
        fleet.run(config, replicas=2, cpus=0.5, limits={"max_body_bytes": MAX_BYTES})
        yield fleet


@pytest.fixture(scope="module")
def endpoint(fleet: Fleet) -> Iterator[PlainHttp]:
    endpoint = PlainHttp(f"127.0.0.1:{fleet.port}", binary=True, max_bytes=MAX_BYTES, lacks=LACKS)
    yield endpoint
    endpoint.close()


@contextmanager
def asking(ask: Callable[[], None], stop: threading.Event, count: int = 1) -> Iterator[None]:
    """Threads that call ``ask`` for as long as the block lasts; what one of them raises is raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            ask()
        except BaseException as problem:
            raised.append(problem)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        join_all(*threads)
    assert not raised, raised


def asked(endpoint: PlainHttp, keys: Any = KEYS) -> tuple[np.ndarray, str]:
    """Rows of table ``user``, and the version that they are of."""
    answer = endpoint.ask({"user": Tensor(keys)})
    return answer.outputs["user"], answer.version


def uncut(endpoint: PlainHttp, ask: Callable[[], Any]) -> Any:
    """What ``ask`` is answered, on another connection if the ingress cuts one as replicas come and go."""
    answers: list[Any] = []

    def is_answered() -> bool:
        try:
            answers.append(ask())
        except (OSError, HTTPException):
            endpoint.close()
            return False
        return True

    wait_until(is_answered)
    return answers[-1]


def version_of(endpoint: PlainHttp) -> str:
    """That of an answer, or none: the ingress cuts connections as replicas come and go."""
    try:
        return asked(endpoint)[1]
    except NOT_ANSWERED:
        endpoint.close()
        return ""


def test_the_client_suite(endpoint: PlainHttp, reference: HPS) -> None:
    failed: dict[str, str] = {}
    ran = 0
    for case in CASES:  # in one test, so that workers of the suite do not start a fleet each
        endpoint.close()  # however long a case took, no connection is too old for the next one
        try:
            case.run(endpoint, reference)
            ran += 1
        except pytest.skip.Exception:
            continue
        except BaseException as problem:
            failed[case.name] = f"{type(problem).__name__}: {str(problem)[:300]}"
    assert not failed and ran >= 150


def test_a_killed_replica_is_replaced_and_others_answer_meanwhile(fleet: Fleet, endpoint: PlainHttp, reference: HPS) -> None:
    expected = reference.lookup(KEYS, "rows", "user")
    before = fleet.replicas()
    assert len(before) == 2
    stop = threading.Event()
    good: list[int] = []
    lost: list[list[str]] = []

    def ask() -> None:
        problems: list[str] = []  # one after the other
        with closing(PlainHttp(f"127.0.0.1:{fleet.port}")) as mine:
            while not stop.is_set():
                try:
                    rows = asked(mine)[0]
                except (
                    NOT_ANSWERED
                ) as problem:  # under way in the replica that died, or its connection was cut as others changed
                    problems.append(repr(problem))
                    mine.close()
                    if len(problems) > 3:
                        lost.append(problems)
                        break
                    continue
                problems.clear()
                assert np.array_equal(rows, expected)
                good.append(1)

    with asking(ask, stop, 4):
        wait_until(lambda: len(good) > 50 or lost)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(fleet.replicas()) == 2 and before[0] not in fleet.replicas())
        count = len(good)
        wait_until(lambda: len(good) > count + 50 or lost)
    assert not lost, lost


def test_a_version_reaches_every_replica(fleet: Fleet, config: Path, endpoint: PlainHttp, reference: HPS, folder: Path) -> None:
    other = folder / "new"
    other.mkdir()
    entry = json.loads(config.read_text())["models"][0]
    files = []
    for number, (file, dim) in enumerate(zip(entry["sparse_files"], entry["embedding_vecsize_per_table"], strict=True)):
        new = other / str(number)
        new.mkdir()
        keys = np.fromfile(Path(file) / "key", np.int64)
        keys.tofile(new / "key")
        np.full((len(keys), dim), 9.0, np.float32).tofile(new / "emb_vector")
        files.append(str(new))
    old = reference.lookup(KEYS, "rows", "user")
    stop = threading.Event()
    seen: set[str] = set()
    wrong: list[str] = []

    def ask() -> None:
        with closing(PlainHttp(f"127.0.0.1:{fleet.port}")) as mine:
            while not stop.is_set():
                try:
                    rows, version = asked(mine)
                except NOT_ANSWERED:  # the connection was to a replica that was taken down
                    mine.close()
                    continue
                seen.add(version)
                if not (np.array_equal(rows, old) if version == "1" else (rows == 9).all()):
                    wrong.append(version)

    with asking(ask, stop):
        wait_until(lambda: "1" in seen)
        fleet.run(config, replicas=2, cpus=0.5, versions={"rows": {"version": 7, "sparse_files": files}})
        wait_until(lambda: all(version_of(endpoint) == "7" for _ in range(8)))
        wait_until(lambda: "7" in seen)
    assert seen == {"1", "7"} and not wrong


def test_a_model_each(fleet: Fleet, config: Path, endpoint: PlainHttp, reference: HPS) -> None:
    fleet.tell("delete", name="hps")
    fleet.run(config, a_model_each=True, cpus=0.5)
    wait_until(lambda: len(fleet.replicas()) == 3)  # one a model, and the entrance
    wait_until(lambda: version_of(endpoint))  # the ingress takes a moment to know the new applications
    assert np.array_equal(uncut(endpoint, lambda: asked(endpoint))[0], reference.lookup(KEYS, "rows", "user"))
    answer = uncut(endpoint, lambda: endpoint.ask({"sparse_embedding0": Tensor(KEYS)}, model="other"))
    assert np.array_equal(answer.outputs["sparse_embedding0"], reference.lookup(KEYS, "other", 0))
    assert uncut(endpoint, lambda: endpoint.get("ready") and endpoint.get("live"))
    index = uncut(endpoint, lambda: endpoint.get("index"))
    assert {entry["name"]: entry["state"] for entry in index} == {"rows": "READY", "other": "READY"}
    with pytest.raises(Refused) as problem:
        uncut(endpoint, lambda: endpoint.ask({"user": Tensor(KEYS)}, model="nobody"))
    assert problem.value.statuses == {404}
