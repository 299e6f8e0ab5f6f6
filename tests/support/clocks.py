"""Clocks that stand still unless a test moves them."""

from __future__ import annotations

import threading
import time

import pytest

__all__ = ["Clock", "stop_clock"]


class Clock:
    """In the place of a module's ``time``: stands still but for what a test adds to ``now``."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


def stop_clock(monkeypatch: pytest.MonkeyPatch, start: float) -> list[float]:
    """Let only ``time.sleep`` move ``time.monotonic`` on, for this thread; the others, of former tests too, have the real one.

    Returns the time, as the only element.
    """
    now, here, sleep, monotonic = [start], threading.get_ident(), time.sleep, time.monotonic

    def slept(seconds: float) -> None:
        if threading.get_ident() == here:
            now[0] += seconds
        else:
            sleep(seconds)

    monkeypatch.setattr(time, "sleep", slept)
    monkeypatch.setattr(time, "monotonic", lambda: now[0] if threading.get_ident() == here else monotonic())
    return now
