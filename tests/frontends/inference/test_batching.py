"""Joined requests: each gets its own rows, and only its own errors; nobody waits without need, and nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.clocks import Clock
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import ClosedError, ConfigError, TierError
from hps_numba.frontends.inference import batching
from hps_numba.frontends.inference.batching import BatchedModel
from hps_numba.frontends.inference.joining import ALONE, form_of, joined, split
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import InferenceRequest, InferenceResponse, TensorSpec


class Doubling(InferenceModel):
    """``y = 2 x`` for each sample; calls wait while ``gate`` is closed, and fail for samples below 0.

    Attributes:
        calls: rows of each call.   most: calls at the same time.
    """

    name, platform, max_batch_size = "double", "test", 16

    def __init__(self, answer: Callable[[np.ndarray], np.ndarray] = lambda x: 2 * x) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[int] = []
        self.threads: list[threading.Thread] = []
        self.at_work = self.most = 0
        self.closed = 0
        self._answer, self._lock = answer, threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("x", "INT64", (-1,)),)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (TensorSpec("y", "INT64", (-1,)),)

    def versions(self) -> tuple[str, ...]:
        return ("3",)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        x = request.inputs["x"]
        with self._lock:
            self.calls.append(len(x))
            self.threads.append(threading.current_thread())
            self.at_work += 1
            self.most = max(self.most, self.at_work)
        assert self.gate.wait(HANG_SECONDS)
        with self._lock:
            self.at_work -= 1
        if (x < 0).any():
            raise InferenceError(400, f"x: expected numbers from 0 on, got {x.min()}")
        return InferenceResponse(self.name, "3", {"y": self._answer(x)}, request.id, {"seen": len(x)})

    def close(self) -> None:
        self.closed += 1


def ask(*values: int, dtype: Any = np.int64, **more: Any) -> InferenceRequest:
    return InferenceRequest("double", {"x": np.array(values, dtype)}, **more)


@pytest.fixture
def model() -> Doubling:
    return Doubling()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(batching, "time", made)
    return made


def batched_model(model: Doubling, **options: Any) -> BatchedModel:
    """Requests to it do not expire, however busy the machine is."""
    return BatchedModel(model, **{"timeout": HANG_SECONDS, **options})


def learned(model: Doubling, **options: Any) -> BatchedModel:
    """A batched model that knows that its model has a row for each sample, and whose call waits at the gate."""
    batched = batched_model(model, **{"max_calls": 1, "max_delay": 0, **options})
    batched.infer(ask(1))
    model.calls.clear()
    model.threads.clear()
    return batched


def held(batched: BatchedModel, model: Doubling) -> Any:
    """A request whose call waits at the gate."""
    model.gate.clear()
    first = batched.submit(ask(0))
    wait_until(lambda: model.calls)
    return first


def test_requests_that_come_while_a_call_is_at_work_share_the_next(model: Doubling) -> None:
    told: list[int] = []
    batched = learned(model, on_call=told.append)
    first = held(batched, model)
    others = [batched.submit(ask(*range(n), id=str(n))) for n in (1, 3, 2)]
    assert batched.stats().queued == 3
    model.gate.set()
    assert first.result(HANG_SECONDS).outputs["y"].tolist() == [0]
    for n, other in zip((1, 3, 2), others):
        answer = other.result(HANG_SECONDS)
        assert (answer.outputs["y"].tolist(), answer.id, answer.version) == ([2 * i for i in range(n)], str(n), "3")
        assert answer.outputs["y"].flags.c_contiguous
    assert model.calls == [1, 6]
    assert told == [1, 1, 3]
    assert batched.stats().calls == 3 and batched.stats().requests == 5 and batched.stats().rows == 8
    batched.close()


def test_a_client_alone_is_answered_on_its_own_thread_and_never_waits(model: Doubling, clock: Clock) -> None:
    batched = batched_model(model, max_delay=60)  # whoever waited would wait for ever
    for n in range(5):
        assert batched.infer(ask(n)).outputs["y"].tolist() == [2 * n]
    assert set(model.threads) == {threading.current_thread()}
    for n in range(5):
        assert batched.submit(ask(n)).result(HANG_SECONDS).outputs["y"].tolist() == [2 * n]
    assert model.calls == [1] * 10
    batched.close()


def test_the_next_call_waits_for_as_many_as_there_were(model: Doubling, clock: Clock) -> None:
    batched = learned(model, max_delay=60)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(3)]
    assert not wait([*others], timeout=0.01).done
    others += [batched.submit(ask(9))]
    model.gate.set()
    first.result(HANG_SECONDS)  # five were there, so the four that are left wait for one more
    last = batched.submit(ask(8))
    assert [one.result(HANG_SECONDS).outputs["y"].tolist() for one in (*others, last)] == [[0], [2], [4], [18], [16]]
    assert model.calls == [1, 5]
    batched.close()


def test_a_full_batch_waits_for_nobody_and_is_not_exceeded(model: Doubling) -> None:
    batched = learned(model, max_batch_size=4, max_delay=0)
    first = held(batched, model)
    sizes = (2, 1, 3, 1, 4, 2)
    others = [batched.submit(ask(*range(n))) for n in sizes]
    model.gate.set()
    wait([first, *others], timeout=HANG_SECONDS)
    assert [len(one.result().outputs["y"]) for one in others] == list(sizes)
    assert model.calls == [1, 4, 3, 4, 2]  # 2+1+1, 3, 4 (alone), 2
    batched.close()


def test_a_request_that_has_waited_for_the_delay_gets_a_call_of_its_own(model: Doubling) -> None:
    batched = learned(model, max_calls=2, max_delay=0.001)
    first = held(batched, model)
    other = batched.submit(ask(5))
    wait_until(lambda: len(model.calls) == 2)  # though the first is still at work
    third = batched.submit(ask(6))
    assert model.most == 2 and batched.stats().queued == 1
    model.gate.set()
    wait([first, other, third], timeout=HANG_SECONDS)
    assert third.result().outputs["y"].tolist() == [12]
    batched.close()


def test_an_error_is_only_of_the_request_that_has_it(model: Doubling) -> None:
    batched = learned(model)
    first = held(batched, model)
    good, bad, also_good = (batched.submit(ask(n)) for n in (4, -1, 5))
    model.gate.set()
    assert [one.result(HANG_SECONDS).outputs["y"].tolist() for one in (first, good, also_good)] == [[0], [8], [10]]
    with pytest.raises(InferenceError, match="got -1"):
        bad.result(HANG_SECONDS)
    assert model.calls == [1, 3, 1, 1, 1]
    batched.close()


@pytest.mark.parametrize(
    "other",
    [
        ask(1, dtype=np.int32),
        InferenceRequest("double", {"x": np.array([[1, 2]])}),
        InferenceRequest("double", {"x": np.array([1]), "more": np.array([1])}),
        ask(1, parameters={"mode": 1}),
        ask(1, version="3"),
        ask(1, outputs=("y",)),
        ask(1, input_parameters={"x": {"mode": "sum"}}),
    ],
    ids=["dtype", "shape", "inputs", "parameters", "version", "outputs", "input parameters"],
)
def test_requests_that_differ_are_not_joined(model: Doubling, other: InferenceRequest) -> None:
    batched = learned(model)
    first = held(batched, model)
    several = [batched.submit(one) for one in (ask(1), other, ask(2))]
    model.gate.set()
    wait([first, *several], timeout=HANG_SECONDS)
    assert model.calls == [1, 2, 1]
    assert several[2].result().outputs["y"].tolist() == [4]
    batched.close()


def test_parameters_that_are_equal_but_of_another_type_differ() -> None:
    forms = {form_of(ask(1, parameters={"a": value}))[0] for value in (1, 1.0, True, "1")}
    assert len(forms) == 4
    assert form_of(ask(1, id="a")) == form_of(ask(2, id="b"))
    assert form_of(InferenceRequest("m", {})) == (ALONE, 1)
    assert form_of(InferenceRequest("m", {"a": np.zeros(2), "b": np.zeros(3)})) == (ALONE, 1)
    assert form_of(InferenceRequest("m", {"a": np.array(2)})) == (ALONE, 1)


@pytest.mark.parametrize("answer", [lambda x: x[:-1], lambda x: x.sum(), lambda x: np.array([x.sum()])])
def test_a_model_without_a_row_for_each_sample_is_asked_one_by_one(answer: Callable[[np.ndarray], np.ndarray]) -> None:
    model = Doubling(answer)
    batched = learned(model)
    first = held(batched, model)
    others = [batched.submit(ask(n, n)) for n in range(4)]
    model.gate.set()
    for n, other in enumerate(others):
        assert np.array_equal(other.result(HANG_SECONDS).outputs["y"], answer(np.array([n, n])))
    first.result(HANG_SECONDS)
    assert sum(model.calls) in (9, 17)  # joined once at most, by whose answer it was seen
    later = [batched.submit(ask(n, n)) for n in range(4)]
    assert [np.array_equal(one.result(HANG_SECONDS).outputs["y"], answer(np.array([n, n]))) for n, one in enumerate(later)]
    assert model.calls[-4:] == [2] * 4
    batched.close()


def test_a_full_queue_refuses(model: Doubling) -> None:
    batched = learned(model, max_queue=2)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(2)]
    for ask_again in (batched.submit, batched.infer):
        with pytest.raises(InferenceError, match="expected at most 2 waiting requests") as told:
            ask_again(ask(7))
        assert told.value.status == 429
    model.gate.set()
    wait([first, *others], timeout=HANG_SECONDS)
    assert [one.result().outputs["y"].tolist() for one in others] == [[0], [2]] and batched.stats().refused == 2
    batched.close()


def test_a_request_that_waits_for_too_long_is_told_while_the_call_goes_on(model: Doubling, clock: Clock) -> None:
    batched = learned(model, timeout=0.01)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(3)]
    assert batched.stats().queued == 3
    clock.now += 0.01
    for other in others:
        with pytest.raises(InferenceError, match=r"expected a free call within 0\.01 s") as told:
            other.result(HANG_SECONDS)
        assert told.value.status == 503
    assert not first.done() and batched.stats().expired == 3
    model.gate.set()
    assert first.result(HANG_SECONDS).outputs["y"].tolist() == [0] and model.calls == [1]
    batched.close()


def test_a_cancelled_request_is_dropped(model: Doubling) -> None:
    batched = learned(model)
    first = held(batched, model)
    gone, there = batched.submit(ask(-1)), batched.submit(ask(3))
    assert gone.cancel()
    model.gate.set()
    assert there.result(HANG_SECONDS).outputs["y"].tolist() == [6]
    first.result(HANG_SECONDS)
    assert model.calls == [1, 1]
    batched.close()


def test_close_answers_those_that_wait_and_refuses_others(model: Doubling, clock: Clock) -> None:
    before = set(threading.enumerate())
    batched = learned(model, max_delay=60)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(5)]
    closing = threading.Thread(target=batched.close)
    closing.start()
    wait_until(lambda: not batched.versions())
    for ask_again in (batched.submit, batched.infer):
        with pytest.raises(ClosedError):
            ask_again(ask(1))
    assert model.closed == 0
    model.gate.set()
    join_all(closing)
    assert model.closed == 1 and first.done()
    assert [one.result(HANG_SECONDS).outputs["y"].tolist() for one in others] == [[2 * n] for n in range(5)]
    assert not [one for one in set(threading.enumerate()) - before if one.name.startswith("hps_numba_batches")]


def test_a_closed_server_is_not_asked_again_for_each(model: Doubling) -> None:
    batched = learned(model)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(3)]

    def closed(x: np.ndarray) -> np.ndarray:
        raise ClosedError("the server is closed")

    model._answer = closed
    model.gate.set()
    for other in (first, *others):
        with pytest.raises(ClosedError):
            other.result(HANG_SECONDS)
    assert model.calls == [1, 3]
    batched.close()


def test_an_answer_may_ask_again(model: Doubling, clock: Clock) -> None:
    """What is called when a future is done runs on a thread of the model, which must not hold its lock."""
    batched = learned(model, timeout=0.01)
    first = held(batched, model)
    again: list[Any] = []
    other = batched.submit(ask(1))
    other.add_done_callback(lambda _: again.append(batched.submit(ask(2))))
    clock.now += 0.01
    wait_until(lambda: again)  # other has expired
    model.gate.set()
    wait([first, *again], timeout=HANG_SECONDS)
    batched.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_batch_size", -1), ("max_delay", -1), ("max_delay", 61), ("max_calls", 0), ("max_queue", 0), ("timeout", 0)],
)
def test_options_are_checked(model: Doubling, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        BatchedModel(model, **{name: value})


def test_it_is_what_the_model_is(model: Doubling) -> None:
    batched = BatchedModel(model)
    told = batched.name, batched.platform, batched.inputs, batched.outputs, batched.versions(), batched.max_batch_size
    assert told == ("double", "test", model.inputs, model.outputs, ("3",), 16)
    batched.close()
    assert not batched.ready()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    largest=st.integers(1, 16),
    calls=st.integers(1, 3),
    delay=st.sampled_from([0.0, 0.0005]),
    data=st.data(),
)
def test_whatever_comes_whenever_gets_its_own_rows(sizes: list[int], largest: int, calls: int, delay: float, data: Any) -> None:
    model = Doubling()
    batched = batched_model(model, max_batch_size=largest, max_calls=calls, max_delay=delay)
    requests, futures = [], []
    for number, size in enumerate(sizes):
        bad = data.draw(st.booleans()) and size > 0 and number % 3 == 0
        values = [100 * number + i for i in range(size)] if not bad else [-number - 1] * size
        requests.append(ask(*values, dtype=data.draw(st.sampled_from([np.int64, np.int32])), id=str(number)))
        futures.append(batched.submit(requests[-1]))
        if data.draw(st.booleans()):
            wait([futures[-1]], timeout=HANG_SECONDS)
    for request, future in zip(requests, futures):
        x = request.inputs["x"]
        if (x < 0).any():
            with pytest.raises(InferenceError, match=f"got {x.min()}"):
                future.result(HANG_SECONDS)
            continue
        answer = future.result(HANG_SECONDS)
        assert answer.outputs["y"].tolist() == (2 * x).tolist() and answer.outputs["y"].dtype == x.dtype
        assert answer.id == request.id
    assert model.most <= calls
    batched.close()


def test_many_threads_get_their_own_rows(model: Doubling) -> None:
    batched = batched_model(model, max_delay=0.0002)
    model.gate.clear()

    def client(number: int) -> int:
        random = np.random.default_rng(number)
        for _ in range(150):
            values = random.integers(0, 1 << 40, random.integers(1, 4)).tolist()
            if random.random() < 0.05:
                with pytest.raises(InferenceError):
                    batched.infer(ask(*values, -1))
                continue
            how = batched.infer if random.random() < 0.5 else lambda request: batched.submit(request).result(HANG_SECONDS)
            assert how(ask(*values)).outputs["y"].tolist() == [2 * value for value in values]
        return number

    with ThreadPoolExecutor(12) as clients:
        works = [clients.submit(client, number) for number in range(12)]
        try:
            wait_until(lambda: batched.stats().queued == 10)  # two are at work
        finally:
            model.gate.set()
        assert [work.result(HANG_SECONDS) for work in works] == list(range(12))
    stats = batched.stats()
    assert stats.requests == 12 * 150 and stats.queued == 0
    assert model.most == 2 and max(model.calls) > 4, "a request has at most four rows: some were joined"
    batched.close()


def test_joining_and_splitting_are_inverse() -> None:
    requests = [ask(1, 2, id="a"), ask(id="b"), ask(3, id="c")]
    together = joined(requests)
    assert together.inputs["x"].tolist() == [1, 2, 3] and together.id == ""
    parts = split(InferenceResponse("double", "1", {"y": together.inputs["x"]}), requests)
    assert [(part.outputs["y"].tolist(), part.id) for part in parts] == [([1, 2], "a"), ([], "b"), ([3], "c")]
    assert split(InferenceResponse("double", "1", {"y": np.zeros(4)}), requests) == []


def test_tier_errors_reach_each_request(model: Doubling) -> None:
    def down(x: np.ndarray) -> np.ndarray:
        raise TierError("redis: down")

    batched = learned(model)
    first = held(batched, model)
    others = [batched.submit(ask(n)) for n in range(2)]
    model._answer = down
    model.gate.set()
    for other in (first, *others):
        with pytest.raises(TierError, match="redis: down"):
            other.result(HANG_SECONDS)
    batched.close()
