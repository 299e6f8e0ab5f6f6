"""Filling one cache from its host store."""

from __future__ import annotations

import logging

import numpy as np

from hps_numba.cache.changes import Changes
from hps_numba.cache.index_mirror import IndexMirror
from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.lookup import Lookups
from hps_numba.cache.residency import Residency
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.store_link import StoreLink
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.errors import CapacityError
from hps_numba.kernels.cache.bulk_load import place_keys
from hps_numba.kernels.layouts.cache import BUSY, LINE_BYTES, META_AT, OCCUPIED, STATE_HOST, STATE_NOW, WAYS
from hps_numba.storage.host.store import HostStore

__all__ = ["Warming"]

log = logging.getLogger(__name__)
_BATCH = 8192


class Warming:
    """Fills one cache.   Thread safety: ``warm`` by any thread."""

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        kernels: KernelSet,
        residency: Residency,
        plan: LaunchPlan,
        changes: Changes,
        lookups: Lookups,
        store: HostStore | None,
        mirror: IndexMirror | None,
        link: StoreLink | None,
        workspaces: WorkspaceSet,
        switch: VersionSwitch,
    ) -> None:
        self._link, self._workspaces, self._switch = link, workspaces, switch
        self._geometry, self._state, self._lifecycle, self._kernels = geometry, state, lifecycle, kernels
        self._residency, self._plan, self._changes, self._lookups = residency, plan, changes, lookups
        self._store, self._mirror = store, mirror

    def warm(self) -> int:
        """``EmbeddingCache.warm``."""
        geometry = self._geometry
        with self._lifecycle.controlled():
            if self._store is None:
                return 0
            keys = self._store.keys(in_order=True)
            if geometry.kind == "static" and len(keys) > geometry.capacity:
                raise CapacityError(
                    f"{geometry.name}: expected at most {geometry.capacity} rows, as the static cache has to hold all, got "
                    f"{len(keys)}"
                )
            self._changes.clear()
            looked_up = self._lifecycle.in_use and self._switch.active is None
            if not geometry.fixed and (looked_up or self._workspaces.has_graphs):
                self._by_lookup(keys)
            else:
                self._at_once(self._store, keys[: geometry.capacity] if geometry.overflows else keys)
            resident = self._residency.check()
            if self._mirror is not None and self._kernels.backend.ordinal is not None and not self._residency.complete:
                self._mirror.make()
            return resident

    def take_new_version(self) -> None:
        """``EmbeddingCache.take_new_version``: no row may be seen beside the other version of the store, so they go first."""
        with self._lifecycle.controlled():
            self._changes.clear()
            if self._link is not None and not self._link.release():
                assert self._link.problem is not None
                raise self._link.problem
            self._changes.clear()  # what a graph inserted meanwhile

    def _at_once(self, store: HostStore, keys: np.ndarray) -> None:
        """Place the keys in lines that no reader looks into, then show each line when its rows are there.

        A write to the store meanwhile finds its key here as soon as the lines are, and updates the row once more.
        """
        state = self._state
        lines = state.read_lines()
        self._place(lines, keys)
        meta = lines.view(np.uint32).reshape(-1, LINE_BYTES // 4)[:, META_AT // 4]
        meta[(meta & OCCUPIED) != 0] |= BUSY
        try:
            state.write_lines(lines)
            self._changes.refresh(0, None, drop=True)
            if self._kernels.policy.takes_key and not self._geometry.fixed:
                self._plan.rescore()
        except BaseException:
            self._changes.clear()
            raise
        if state.word(STATE_HOST) == 0:  # the store was closed meanwhile, and gave no rows
            self._changes.clear()

    def _place(self, lines: np.ndarray, keys: np.ndarray) -> None:
        geometry, policy = self._geometry, self._kernels.policy
        now = self._state.word(STATE_NOW)
        score = 0 if geometry.fixed or policy.takes_key else policy.first(now, 1) & 0xFFFFFFFF
        address, keys_at = (array.__array_interface__["data"][0] for array in (lines, keys))
        placed = place_keys(address, geometry.sets, keys_at, len(keys), score, geometry.fixed, geometry.overflows)
        if placed < len(keys) and geometry.kind == "static":
            raise CapacityError(
                f"{geometry.name}: expected sets for {len(keys)} rows, got {geometry.sets} sets, which took {placed}"
            )
        log.debug("%s: %d of %d keys placed", geometry.name, placed, len(keys))

    def _by_lookup(self, keys: np.ndarray) -> None:
        geometry, state = self._geometry, self._state
        step = max(WAYS, min(geometry.sets, _BATCH))  # few rows to insert into a set in each batch
        keys = np.random.default_rng(0).permutation(keys)  # the store lists them by hash, and so by set
        for start in range(0, min(len(keys), geometry.capacity), step):
            some = keys[start : min(start + step, geometry.capacity)]
            with state.copies(some) as (address,):
                self._lookups.fill(address, len(some), state.stream)
                self._kernels.backend.synchronize(state.stream)
