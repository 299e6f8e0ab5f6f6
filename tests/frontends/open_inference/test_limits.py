"""Bounds: each one holds, says what it is, and frees what was held."""

from __future__ import annotations

import threading
from dataclasses import fields

import numpy as np
import pytest
from support.factories import Workshop
from support.waiting import join_all

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tables import TableSetModel
from hps_numba.frontends.inference.tensors import InferenceRequest
from hps_numba.frontends.open_inference.limits import Admission, Limits


@pytest.mark.parametrize("name", [one.name for one in fields(Limits)])
def test_bounds_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected more than 0, got -1"):
        Limits(**{name: -1})
    if name != "max_queue":
        with pytest.raises(ConfigError, match=name):
            Limits(**{name: 0})


def test_bodies() -> None:
    limits = Limits(max_body_bytes=100, max_json_bytes=10)
    limits.check_body(10, None)
    limits.check_body(100, 10)
    for size, json_size, match in [
        (101, 1, "at most 100 bytes, got 101"),
        (11, None, "10 bytes of JSON, got 11"),
        (99, 11, "JSON"),
    ]:
        with pytest.raises(InferenceError, match=match) as refused:
            limits.check_body(size, json_size)
        assert refused.value.status == 413


def test_answers(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((range(20), 4), embedding_table_names=["user"]))
    model = TableSetModel(server, "m")
    limits = Limits(max_keys=10, max_answer_bytes=1000)

    def ask(n: int, binary: bool = True) -> int:
        return limits.answer_bytes(model, InferenceRequest("m", {"user": np.zeros(n, np.int64)}), binary=binary)

    assert ask(10) == 160
    assert ask(3, binary=False) == 768
    with pytest.raises(InferenceError, match="at most 10 elements together, got 11") as refused:
        ask(11)
    assert refused.value.status == 413
    with pytest.raises(InferenceError, match="at most 1000 bytes, got 1024 in JSON; ask for outputs as bytes"):
        ask(4, binary=False)


def test_bytes_under_way() -> None:
    admission = Admission(Limits(max_held_bytes=100))
    with admission.holding(60):
        assert admission.hold(40) == 40
        with pytest.raises(InferenceError, match="at most 100 bytes under way, try again") as refused:
            admission.hold(1)
        assert refused.value.status == 429
        admission.release(40)
    assert admission.held_bytes == 0


def test_requests_for_threads() -> None:
    admission = Admission(Limits(max_concurrent=2, max_queue=1))
    for _ in range(3):
        admission.enter()
    with pytest.raises(InferenceError, match="1 requests wait already") as refused:
        admission.enter()
    assert refused.value.status == 429
    admission.leave()
    admission.enter()
    assert admission.requests == 3


def test_counts_are_exact_with_many_threads() -> None:
    admission = Admission(Limits(max_held_bytes=1 << 60, max_queue=1 << 30))

    def work() -> None:
        for _ in range(2000):
            admission.hold(7)
            admission.enter()
            admission.leave()
            admission.release(7)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    join_all(*threads)
    assert (admission.held_bytes, admission.requests) == (0, 0)
