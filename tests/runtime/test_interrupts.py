"""Signal handlers wait for the end of a change, or for a place in it where they may run."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from hps_numba.runtime.interrupts import interrupts_held


def test_handlers_run_where_they_are_let_in_and_are_put_back() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    own = signal.getsignal(signal.SIGTERM)
    try:
        with interrupts_held() as let_in:
            signal.raise_signal(signal.SIGTERM)
            assert not came
            let_in()
            assert came == [signal.SIGTERM]
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # who asks twice is answered at once
            assert came == [signal.SIGTERM] * 2
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM] * 3 and signal.getsignal(signal.SIGTERM) is own
        with pytest.raises(KeyboardInterrupt), interrupts_held():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_hold_nothing() -> None:
    seen: list[Any] = []

    def work() -> None:
        with interrupts_held() as let_in:
            let_in()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
