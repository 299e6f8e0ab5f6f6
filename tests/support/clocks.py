"""A clock that stands still unless the test sleeps."""

from __future__ import annotations

import threading
import time

import pytest

__all__ = ["stop_clock"]


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
