"""Caches whose missed rows threads of the host gather, also for the small batches of tests."""

from __future__ import annotations

from typing import Any

import pytest
from support.waiting import HANG_SECONDS

from hps_numba.cache import gathering, index_mirror, launch_plan, shares
from hps_numba.cache import lookup as cache_lookup
from hps_numba.cache.host_threads import host_threads
from hps_numba.cache.kept_rates import KeptRates
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.kernels.layouts.gathering import MAX_USERS, TABLE

__all__ = ["gather_small_batches", "small_batches_are_gathered", "users_of_threads"]

_CHANGES: list[tuple[Any, str, object]] = [
    (cache_lookup, "GATHERED_FROM", 1),
    (gathering, "GATHERED_FROM", 1),
    (launch_plan, "LEAST_ROWS", 1),
    (shares, "_FEW_MISSED", 0),
    (gathering, "CHUNK_BYTES", 3 * 128),
    (gathering, "GROUP_BYTES", 2 * 3 * 128),  # so that there are several
    (gathering, "ROOM_BYTES", 500 * 128),  # and some batches want more
    (LaunchPlan, "needs_host", property(lambda plan: True)),
    (gathering, "kept_rates", KeptRates(lambda: None)),  # rates of such batches mislead users' processes
    (index_mirror, "_QUIET_SECONDS", 2 * HANG_SECONDS),  # an index is copied when a test says so
]


def gather_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch of a table of any size count as large, in several groups of chunks."""
    for place, name, value in _CHANGES:
        monkeypatch.setattr(place, name, value)


def small_batches_are_gathered() -> None:
    """``gather_small_batches`` for the rest of this process."""
    for place, name, value in _CHANGES:
        setattr(place, name, value)


def users_of_threads() -> list[int]:
    """Addresses of those for whom threads of this process gather."""
    table = host_threads._control[TABLE // 8 : TABLE // 8 + MAX_USERS]
    return [int(word) for word in table if word]
