"""What tests look at inside a server, in one place: users have no public name for it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
from support.waiting import wait_until

import hps_numba
from hps_numba.kernels.host.write import STATE_FREE, STATE_WRITES
from hps_numba.kernels.layouts.host_store import HEADER_BYTES, SLOT_BITS, SLOT_MASK
from hps_numba.server.model import ServedModel
from hps_numba.server.table import ServedTable
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tiers.hash_map import HashMapTier


def served_model(server: hps_numba.HPS, model: str = "m") -> ServedModel:
    return server._catalog.models[model]


def served_table(server: hps_numba.HPS, table: int = 0, model: str = "m") -> ServedTable:
    return served_model(server, model).table(table)


def slower_tier(server: hps_numba.HPS) -> Any:
    """The first slower tier."""
    return server._loader.slower.tiers[0]


def host_memory(server: hps_numba.HPS) -> HashMapTier:
    """The tier in host memory."""
    assert server._loader.host is not None
    return server._loader.host


def bytes_in_use(server: hps_numba.HPS) -> int:
    """Bytes of host memory that the allocator of a server has handed out."""
    return server._loader.allocator.in_use


def bytes_held(server: hps_numba.HPS) -> int:
    """Bytes of host memory in use, without headers of stores that are garbage."""
    gc.collect()
    return bytes_in_use(server)


def wait_for_release(server: hps_numba.HPS, at_most: int, *, headers: int = 0) -> None:
    """Wait until no more host memory is in use: the thread that did the work may not have let go of it yet.

    Args:
        headers: of so many closed stores may be left, 64 bytes each: whoever refers to a store finds there that it is closed.
    """
    limit = at_most + headers * HEADER_BYTES
    wait_until(lambda: bytes_in_use(server) <= limit or bytes_held(server) <= limit)


def set_uses(store: HostStore, uses: int) -> None:
    """Let the free slots of a store count as used so many times."""
    content = store.versions.current
    store.erase(np.empty(0, np.int64))  # collects what is free
    free = content.free[: content.state[STATE_FREE]]
    free[:] = (free & SLOT_MASK) | (uses << SLOT_BITS)


def renew_generation(store: HostStore) -> None:
    """Give the rows of a store another generation, as those of another version have."""
    content = store.versions.current
    content.renew_generation()
    store._header.notify(content.block)


def set_writes(store: HostStore, writes: int) -> None:
    """Let a store have been written so many times."""
    store.versions.current.state[STATE_WRITES] = writes


def due_refreshes(server: hps_numba.HPS) -> list[str]:
    """Names of the models that the timer is going to refresh."""
    return list(server._loader.timer._due)


def wait_for_background(server: hps_numba.HPS) -> None:
    """Wait until every background job of every model has run."""
    for model in server._catalog.models.values():
        for jobs in (model._jobs, model.prefetches.jobs):
            wait_until(lambda jobs=jobs: not jobs.waiting)
