"""Joined requests behind the HTTP application: they need no thread each, so a batch may be larger than their number."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.asgi import Reply, ask
from support.factories import Workshop
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.repository import Repository
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, TensorSpec
from hps_numba.frontends.open_inference.app import InferenceApp
from hps_numba.frontends.open_inference.limits import Limits

CLIENTS = 12


class Negating(InferenceModel):
    """``y = -x`` for each sample, once ``gate`` is open; a sample of 13 is an error. ``calls``: rows of each call."""

    name, platform, max_batch_size = "negating", "test", 64
    inputs, outputs = (TensorSpec("x", "INT64", (-1,)),), (TensorSpec("y", "INT64", (-1,)),)

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls: list[int] = []

    def versions(self) -> tuple[str, ...]:
        return ("1",)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        x = request.inputs["x"]
        self.calls.append(len(x))
        assert self.gate.wait(HANG_SECONDS)
        if (x == 13).any():
            raise InferenceError(400, "x: expected another than 13")
        return InferenceResponse(self.name, "1", {"y": -x}, request.id)


def sample_of(value: int) -> InferenceRequest:
    return InferenceRequest("negating", {"x": np.array([value])})


class Rig:
    """An application whose only other model joins requests, one call at a time."""

    def __init__(self, workshop: Workshop, limits: Limits, **options: Any) -> None:
        self.server = workshop.open(workshop.model((range(3), 4)))
        self.model = Negating()
        self.batched = BatchedModel(self.model, max_calls=1, max_delay=0, **options)
        repository = Repository(self.server)
        repository.add(self.batched)
        self.app = InferenceApp(repository, limits)
        self.model.gate.set()
        self.batched.infer(sample_of(1))  # it learns that there is a row for each sample
        self.model.gate.clear()
        self.model.calls.clear()

    def hold(self) -> None:
        """Let a call of the model begin and wait until the gate is open: there is only one at a time."""
        self.held = self.batched.submit(sample_of(0))
        wait_until(lambda: self.model.calls)

    def ask_all(self, samples: list[int], meanwhile: Callable[[list[Any]], Awaitable[object]]) -> list[tuple[int, Any]]:
        """Status and values of the replies to a request for each sample; the gate is opened when ``meanwhile`` returns."""

        async def run() -> list[Reply | None]:
            tasks = [asyncio.create_task(self._ask(sample)) for sample in samples]
            await meanwhile(tasks)
            self.model.gate.set()
            return list(await asyncio.gather(*tasks))

        replies = [reply for reply in asyncio.run(run()) if reply is not None]
        return [(reply.status, reply.json().get("outputs", [{}])[0].get("data")) for reply in replies]

    async def _ask(self, sample: int) -> Reply | None:
        body = b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[%d]}]}' % sample
        return await ask(self.app, "POST", "/v2/models/negating/infer", body=body)

    async def until_queued(self, count: int) -> None:
        while self.batched.stats().queued < count:
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.model.gate.set()
        self.app.close()
        self.batched.close()


@pytest.fixture
def rigs(workshop: Workshop) -> Iterator[Any]:
    made: list[Rig] = []

    def make(**limits: Any) -> Rig:
        made.append(Rig(workshop, Limits(**limits)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def queued(rig: Rig) -> str:
    prefix = 'hps_queued_requests{frontend="open_inference",protocol="http"} '
    return next(line for line in rig.server.metrics_text().splitlines() if line.startswith(prefix)).removeprefix(prefix)


def test_more_requests_than_threads_are_one_call(rigs: Any) -> None:
    rig = rigs(max_concurrent=2)
    rig.hold()

    async def all_wait(tasks: list[Any]) -> None:
        await rig.until_queued(CLIENTS)
        assert queued(rig) == str(CLIENTS)

    assert rig.ask_all([*range(CLIENTS)], all_wait) == [(200, [-sample]) for sample in range(CLIENTS)]
    assert rig.model.calls == [1, CLIENTS]
    assert rig.app.admission.requests == rig.app.admission.held_bytes == 0
    assert queued(rig) == "0"
    statistics = rig.app.statistics.to_json("negating", "1")["inference_stats"]
    assert statistics["queue"]["ns"] > 0
    assert statistics["success"]["count"] == CLIENTS


def test_an_error_is_of_its_own_request(rigs: Any) -> None:
    rig = rigs()
    rig.hold()

    async def all_wait(tasks: list[Any]) -> None:
        await rig.until_queued(3)

    assert rig.ask_all([12, 13, 14], all_wait) == [(200, [-12]), (400, None), (200, [-14])]


def test_more_than_may_wait_are_refused(rigs: Any) -> None:
    rig = rigs(max_concurrent=1, max_queue=4)
    rig.hold()

    async def some_are_refused(tasks: list[Any]) -> None:
        while sum(task.done() for task in tasks) < CLIENTS - 5:
            await asyncio.sleep(0.001)

    statuses = sorted(status for status, _ in rig.ask_all([*range(CLIENTS)], some_are_refused))
    assert statuses == [200] * 5 + [429] * (CLIENTS - 5)
    assert rig.app.admission.requests == 0
    assert queued(rig) == "0"


def test_those_that_wait_for_too_long_are_told_and_never_begin(rigs: Any) -> None:
    rig = rigs(request_seconds=0.05)
    rig.hold()

    async def all_are_late(tasks: list[Any]) -> None:
        await asyncio.wait(tasks)

    assert rig.ask_all([1, 2, 3], all_are_late) == [(503, None)] * 3
    wait_until(lambda: rig.app.admission.requests == 0)
    assert rig.held.result(HANG_SECONDS).outputs["y"].tolist() == [0]
    assert rig.model.calls == [1]
    assert queued(rig) == "0"


def test_large_answers_are_encoded_elsewhere(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs()
    monkeypatch.setattr("hps_numba.frontends.open_inference.threads._SMALL", 4)
    used: list[Any] = []
    submit = rig.app._threads._threads.submit
    monkeypatch.setattr(rig.app._threads._threads, "submit", lambda work: used.append(work) or submit(work))

    async def nothing(tasks: list[Any]) -> None:
        assert used == []

    assert rig.ask_all([7], nothing) == [(200, [-7])]
    assert len(used) == 1
