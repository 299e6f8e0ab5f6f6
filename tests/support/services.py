"""Shared by tests: Service, assert_adds_up, cache_of, defaults, stats_of, without_devices, DEFAULT, on_cpu, service."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop

import hps_numba
from hps_numba.device import driver

DIM = 17  # as in test_cache.py, so that kernels are compiled once for both


DEFAULT = np.float32(-7.5)


KEYS = range(9)


class Service:
    """Opens servers with caches on one kind of place, and asks them from there."""

    def __init__(self, workshop: Workshop, device: int | None) -> None:
        self.workshop, self.device = workshop, device

    def open(self, *tables: tuple[Any, int], volatile: Any = None, allow_code: bool = False, **entry: Any) -> hps_numba.HPS:
        """A server of one model ``m``; ``persistent``, ``wide`` and ``fuse`` are for the whole server."""
        top: dict[str, Any] = {"cache_on_cpu": True, "supportlonglong": entry.pop("wide", True)}
        top["volatile_db"] = volatile or {"type": "hash_map"}
        if "persistent" in entry:
            top["persistent_db"] = {"type": entry.pop("persistent")}
        top["fuse_embedding_table"] = entry.pop("fuse", False)
        model = self.model(*tables, **entry)
        return self.workshop.open(model, allow_code=allow_code, **top)

    def model(self, *tables: tuple[Any, int], **entry: Any) -> dict[str, Any]:
        return self.workshop.model(*tables, **{"deployed_device_list": [self.device or 0], **entry})

    def open_cold(
        self, tier: str = "support.fakes:CountedDictTier", keys: Any = KEYS, volatile: Any = COLD, **entry: Any
    ) -> tuple[hps_numba.HPS, Any]:
        """A server whose rows are all in the tier behind host memory; and that tier."""
        server = self.open((keys, DIM), volatile=volatile, persistent=tier, **entry)
        return server, self.workshop.behind_host(server)

    def keys(self, keys: Any, dtype: Any = np.int64) -> Any:
        if self.device is None:
            return np.asarray(keys, dtype)
        import cupy

        with cupy.cuda.Device(self.device):
            return cupy.asarray(np.asarray(keys, dtype))

    def lookup(self, server: hps_numba.HPS, keys: Any, table: int | str = 0, model: str = "m") -> np.ndarray:
        return self.on_host(server.lookup(self.keys(keys), model, table, self.device or 0))

    @staticmethod
    def on_host(rows: Any) -> np.ndarray:
        return rows if isinstance(rows, np.ndarray) else rows.get()

    def settle(self, server: hps_numba.HPS) -> None:
        self.workshop.let_background_finish(server)


def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "device_count", lambda: 0)
    monkeypatch.setattr(driver, "why_no_device", lambda: "none for this test")


def stats_of(server: hps_numba.HPS, table: int = 0) -> Any:
    return server.stats()["m"][f"sparse_embedding{table}"]


def cache_of(server: hps_numba.HPS, table: int = 0) -> Any:
    (cache,) = stats_of(server, table).caches
    return cache


def defaults(n: int, value: float = -7.5) -> np.ndarray:
    return np.full((n, DIM), value, np.float32)


def assert_adds_up(server: hps_numba.HPS) -> None:
    """Every key that was asked for is counted where it was answered."""
    s = stats_of(server)
    assert s.keys == s.cache_hits + s.host_hits + s.tier_hits + s.absent + s.unanswered
