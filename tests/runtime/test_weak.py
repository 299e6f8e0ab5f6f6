"""Members of a WeakSet are listed while other threads add theirs, and while they go."""

from __future__ import annotations

import sys
import threading
from weakref import WeakSet

from support.waiting import Span, join_all

from hps_numba.runtime.weak import members


class Thing:
    """Something to refer to."""


def test_members_are_listed_while_others_come_and_go() -> None:
    kept, weak, rounds, ended = [Thing() for _ in range(50)], WeakSet[Thing](), [0], threading.Event()
    for thing in kept:
        weak.add(thing)

    def come_and_go() -> None:
        while not ended.is_set():
            some = [Thing() for _ in range(20)]
            for thing in some:
                weak.add(thing)
            rounds[0] += 1

    thread, before = threading.Thread(target=come_and_go), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        span = Span(0.3, lambda: rounds[0] > 100)
        while span.goes_on():
            assert set(kept) <= set(members(weak))
    finally:
        ended.set()
        sys.setswitchinterval(before)
        join_all(thread)
    assert rounds[0] > 100
