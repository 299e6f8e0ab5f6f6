"""The circuit breaker of a node, with a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from hps_numba.storage.redis.breaker import CircuitBreaker, Verdict


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_failure_opens_it_and_one_caller_probes_after_a_pause(clock: list[float]) -> None:
    breaker = CircuitBreaker(0.5, 4.0)
    assert breaker.verdict() is Verdict.ASK and not breaker.is_open
    breaker.failed()
    assert breaker.is_open and breaker.verdict() is Verdict.REFUSE
    clock[0] += 0.5
    assert [breaker.verdict() for _ in range(3)] == [Verdict.PROBE, Verdict.REFUSE, Verdict.REFUSE]
    breaker.answered()
    assert [breaker.verdict() for _ in range(2)] == [Verdict.ASK] * 2


def test_pauses_double_up_to_the_longest(clock: list[float]) -> None:
    breaker = CircuitBreaker(0.5, 4.0)
    pauses = []
    for _ in range(6):
        breaker.failed()
        began = clock[0]
        while breaker.verdict() is Verdict.REFUSE:
            clock[0] += 0.25
        pauses.append(clock[0] - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    breaker.answered()
    breaker.failed()
    clock[0] += 0.5
    assert breaker.verdict() is Verdict.PROBE


def test_a_prober_that_never_reports_is_followed_by_another(clock: list[float]) -> None:
    breaker = CircuitBreaker(0.5, 4.0)
    breaker.failed()
    clock[0] += 0.5
    assert breaker.verdict() is Verdict.PROBE
    clock[0] += 0.5
    assert breaker.verdict() is Verdict.PROBE


def test_late_answers_in_a_row_count_as_a_failure(clock: list[float]) -> None:
    breaker = CircuitBreaker(0.5, 4.0)
    for _ in range(2):
        breaker.late()
    breaker.answered()
    for _ in range(2):
        breaker.late()
    assert not breaker.is_open
    breaker.late()
    assert breaker.is_open
