"""Caches whose missed rows threads of the host gather, also for the small batches of tests."""

from __future__ import annotations

import pytest
from support.waiting import HANG_SECONDS

from hps_numba.cache import gathering, index_mirror, launch_plan
from hps_numba.cache import lookup as cache_lookup
from hps_numba.cache.host_threads import host_threads
from hps_numba.cache.kept_rates import KeptRates
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.kernels.layouts.gathering import MAX_USERS, TABLE

__all__ = ["gather_small_batches", "users_of_threads"]


def gather_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every batch of a table of any size count as large, in several groups of chunks."""
    monkeypatch.setattr(cache_lookup, "GATHERED_FROM", 1)
    monkeypatch.setattr(gathering, "GATHERED_FROM", 1)
    monkeypatch.setattr(launch_plan, "LEAST_ROWS", 1)
    monkeypatch.setattr(gathering, "CHUNK_BYTES", 3 * 128)
    monkeypatch.setattr(gathering, "GROUP_BYTES", 2 * 3 * 128)  # so that there are several
    monkeypatch.setattr(gathering, "ROOM_BYTES", 500 * 128)  # and some batches want more
    monkeypatch.setattr(LaunchPlan, "needs_host", property(lambda plan: True))
    monkeypatch.setattr(gathering, "kept_rates", KeptRates(lambda: None))  # rates of such batches mislead users' processes
    monkeypatch.setattr(index_mirror, "_QUIET_SECONDS", 2 * HANG_SECONDS)  # an index is copied when a test says so


def users_of_threads() -> list[int]:
    """Addresses of those for whom threads of this process gather."""
    table = host_threads._control[TABLE // 8 : TABLE // 8 + MAX_USERS]
    return [int(word) for word in table if word]
