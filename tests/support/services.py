"""Servers with caches of one device or of host memory, and what tests read of their stats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.internals import slower_tier, wait_for_background

import hps_numba
from hps_numba.device import driver

DIM = 17  # as in tests/cache, so that kernels are compiled once for both
DEFAULT = np.float32(-7.5)
KEYS = range(9)


class Service:
    """Opens servers with caches on one device, or in host memory, and looks up with keys that are there.

    Attributes:
        device: CUDA ordinal, or None for host memory.
    """

    def __init__(self, workshop: Workshop, device: int | None) -> None:
        self.workshop, self.device = workshop, device

    def open(
        self, *tables: tuple[Any, int], volatile: Any = None, allow_code: bool | None = None, **entry: Any
    ) -> hps_numba.HPS:
        """A server of one model ``m`` with tables given as (keys, dim); the server has ``persistent``, ``wide``, ``fuse``."""
        top: dict[str, Any] = {"cache_on_cpu": True, "supportlonglong": entry.pop("wide", True)}
        top["volatile_db"] = volatile or {"type": "hash_map"}
        if "persistent" in entry:
            top["persistent_db"] = {"type": entry.pop("persistent")}
        top["fuse_embedding_table"] = entry.pop("fuse", False)
        model = self.model(*tables, **entry)
        return self.workshop.open(model, allow_code=allow_code, **top)

    def model(self, *tables: tuple[Any, int], **entry: Any) -> dict[str, Any]:
        """An entry of ``models`` that is deployed on the device."""
        return self.workshop.model(*tables, **{"deployed_device_list": [self.device or 0], **entry})

    def open_cold(
        self, tier: str = "support.fakes:CountedDictTier", keys: Any = KEYS, volatile: Any = COLD, **entry: Any
    ) -> tuple[hps_numba.HPS, Any]:
        """A server whose rows are all in a slower tier; and that tier."""
        server = self.open((keys, DIM), volatile=volatile, persistent=tier, **entry)
        return server, slower_tier(server)

    def keys(self, keys: Any, dtype: Any = np.int64) -> Any:
        """Keys in the memory of the device: NumPy's or CuPy's."""
        if self.device is None:
            return np.asarray(keys, dtype)
        import cupy

        with cupy.cuda.Device(self.device):
            return cupy.asarray(np.asarray(keys, dtype))

    def lookup(self, server: hps_numba.HPS, keys: Any, table: int | str = 0, model: str = "m") -> np.ndarray:
        """Rows of keys that are on the device, copied to NumPy."""
        return self.on_host(server.lookup(self.keys(keys), model, table, self.device or 0))

    @staticmethod
    def on_host(rows: Any) -> np.ndarray:
        """Rows as NumPy's."""
        return rows if isinstance(rows, np.ndarray) else rows.get()

    def settle(self, server: hps_numba.HPS) -> None:
        """Wait until every background job has run."""
        wait_for_background(server)


def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the machine one without a GPU."""
    monkeypatch.setattr(driver, "device_count", lambda: 0)
    monkeypatch.setattr(driver, "why_no_device", lambda: "none for this test")


def stats_of(server: hps_numba.HPS, table: int = 0) -> Any:
    """``TableStats`` of a table of model ``m``."""
    return server.stats()["m"][f"sparse_embedding{table}"]


def cache_of(server: hps_numba.HPS, table: int = 0) -> Any:
    """``CacheStats`` of the only cache of a table."""
    (cache,) = stats_of(server, table).caches
    return cache


def defaults(n: int, value: float = -7.5) -> np.ndarray:
    """Rows of ``n`` absent keys."""
    return np.full((n, DIM), value, np.float32)


def assert_adds_up(server: hps_numba.HPS) -> None:
    """Every key that was asked for is counted where it was answered."""
    stats = stats_of(server)
    assert stats.keys == stats.cache_hits + stats.host_hits + stats.tier_hits + stats.absent + stats.unanswered
