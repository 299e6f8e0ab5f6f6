"""The circuit breaker of a node, with a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hps_numba.storage.redis import breaker
from hps_numba.storage.redis.breaker import CircuitBreaker, Verdict


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(breaker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_failure_opens_it_and_one_caller_probes_after_a_pause(clock: list[float]) -> None:
    node = CircuitBreaker(0.5, 4.0)
    assert node.verdict() is Verdict.ASK and not node.is_open
    node.failed()
    assert node.is_open and node.verdict() is Verdict.REFUSE
    clock[0] += 0.5
    assert [node.verdict() for _ in range(3)] == [Verdict.PROBE, Verdict.REFUSE, Verdict.REFUSE]
    node.answered()
    assert [node.verdict() for _ in range(2)] == [Verdict.ASK] * 2


def test_pauses_double_up_to_the_longest(clock: list[float]) -> None:
    node = CircuitBreaker(0.5, 4.0)
    pauses = []
    for _ in range(6):
        node.failed()
        began = clock[0]
        while node.verdict() is Verdict.REFUSE:
            clock[0] += 0.25
        pauses.append(clock[0] - began)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    node.answered()
    node.failed()
    clock[0] += 0.5
    assert node.verdict() is Verdict.PROBE


def test_a_prober_that_never_reports_is_followed_by_another(clock: list[float]) -> None:
    node = CircuitBreaker(0.5, 4.0)
    node.failed()
    clock[0] += 0.5
    assert node.verdict() is Verdict.PROBE
    clock[0] += 0.5
    assert node.verdict() is Verdict.PROBE


def test_late_answers_in_a_row_count_as_a_failure(clock: list[float]) -> None:
    node = CircuitBreaker(0.5, 4.0)
    for _ in range(2):
        node.late()
    node.answered()
    for _ in range(2):
        node.late()
    assert not node.is_open
    node.late()
    assert node.is_open
