"""What an embedding cache is made of: each part in a module of its own, put together here.

Parts are given those that they need and use their public names only, so each can be read and tested by itself:

* memory: ``state``, ``workspaces``, ``misses`` (staged rows), ``mirror`` (of the store's index);
* what is known: ``geometry``, ``lifecycle``, ``residency``, ``link`` (to the store), ``calls`` (how long they took);
* kernels: ``kernels`` (which), ``plan`` (in which order and how large);
* calls: ``lookups``, ``pooling``, ``without_store``, ``changes``, ``warming``, ``policy_switch``, ``inspection``.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import nullcontext

from hps_numba.cache.backends import backend_for
from hps_numba.cache.call_times import CallTimes
from hps_numba.cache.changes import Changes
from hps_numba.cache.gathering import GatheredMisses, listed_from
from hps_numba.cache.index_mirror import IndexMirror, may_mirror
from hps_numba.cache.inspect import CacheCounters, Inspection
from hps_numba.cache.kernel_set import KernelSet
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.lookup import Lookups
from hps_numba.cache.memory_use import CacheMemory, with_pinned
from hps_numba.cache.policy_memory import PolicyMemory
from hps_numba.cache.policy_switch import PolicySwitch
from hps_numba.cache.pooling import Pooling
from hps_numba.cache.promised import withdraw
from hps_numba.cache.residency import Residency, listing_from
from hps_numba.cache.shares import forced_share
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.staging import StagedMisses
from hps_numba.cache.state import CacheState
from hps_numba.cache.store_link import StoreLink
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.cache.warming import Warming
from hps_numba.cache.without_store import WithoutStore
from hps_numba.cache.workspace import WorkspaceShape
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.kernels.policies._policy import Policy
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.store import HostStore

__all__ = ["CacheParts"]


class CacheParts:
    """The parts of one cache.

    Args:
        device: CUDA ordinal, None for the CPU.   store: whose rows are cached.
        pinned: rows are in pinned host memory.   limit: most batches at a time.   miss_path: one of ``staging.MISS_PATHS``.
        switch: of the versions of its model.   inserts: false: it never gets a row, and its batches need no memory.
        keys: as for ``EmbeddingCache``.

    Raises:
        As ``EmbeddingCache``.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        device: int | None,
        policy: Policy,
        store: HostStore | None,
        *,
        pinned: bool,
        limit: int,
        miss_path: str,
        switch: VersionSwitch,
        inserts: bool = True,
        keys: int = 0,
    ) -> None:
        forced = forced_share()
        self.geometry, self.store, self.backend, self.switch = geometry, store, backend_for(device), switch
        self._limit, self.calls = limit, CallTimes()
        # kernels of the CPU keep the store from freeing what they read, as its other readers do; those of a device count
        # themselves
        self.reading = store.reading if store is not None and device is None else nullcontext
        own = store is not None and not store.memory.shared  # a mirror has to know of every write before it happens
        mirrors = own and may_mirror(geometry.kind, geometry.whole, miss_path)
        lists_from = listing_from(device, mirrors)
        self.kernels = KernelSet(self.backend, geometry, policy)
        with self.backend.current():
            self.state = CacheState(self.backend, geometry, pinned=pinned)
            try:
                memory = self._policy_memory(policy)
            except BaseException:
                self.state.release()
                raise
        self.link: StoreLink | None = None
        self.mirror: IndexMirror | None = None
        try:
            self._connect(memory, lists_from, forced, miss_path, inserts=inserts, mirrors=mirrors, keys=keys)
        except BaseException:
            with self.backend.current():
                memory.release()
                for part in (self.mirror, self.link):
                    if part is not None:
                        part.close()  # else the store would tell a cache that is not there of its changes
                self.state.release()
            raise
        self._closed = False
        self._last_counters: CacheCounters | None = None
        self.reset_after_fork()
        register_fork_reset(self)
        self._build_calls()

    def _connect(
        self,
        memory: PolicyMemory,
        lists_from: int,
        forced: float | None,
        miss_path: str,
        *,
        inserts: bool,
        mirrors: bool,
        keys: int,
    ) -> None:
        """Make what knows of the store, and workspaces: ``memory`` is of the policy, the others are as the class has them."""
        geometry, store = self.geometry, self.store
        if store is not None:
            self.link = StoreLink(self.backend, self.state.address, store)
        self.lifecycle = Lifecycle(self.backend, self.link, self.switch, geometry.name)
        self.residency = Residency(self.state, self.kernels, store, fixed=geometry.fixed, listing_from=lists_from)
        if mirrors:
            self.mirror = self._mirror_of(self.link, store)
        listed = listed_from(lists_from, mirrors)
        shape = WorkspaceShape.of(geometry, listed, inserts=inserts, counts=self.kernels.counted, keys=keys)
        self.workspaces = WorkspaceSet(
            self.backend,
            self.lifecycle,
            self.state.stream,
            shape,
            memory,
            limit=self._limit,
            reading=self.reading,
            name=geometry.name,
        )
        self.misses: StagedMisses | None = None
        if store is not None and miss_path == "staged":
            assert self.link is not None
            self.misses = StagedMisses(geometry, self.state, self.kernels, store, self.link.in_force)
        self.gathered: GatheredMisses | None = None
        if self.mirror is not None and store is not None:
            self.gathered = GatheredMisses(self.backend, store, geometry.name, forced)

    def _policy_memory(self, policy: Policy) -> PolicyMemory:
        if self.kernels.counted:
            self.state.allocate_hits()
        geometry = self.geometry
        return PolicyMemory(self.backend, None if geometry.fixed else policy, geometry.sets, geometry.name)

    def _mirror_of(self, link: StoreLink | None, store: HostStore | None) -> IndexMirror:
        assert link is not None and store is not None
        residency = weakref.ref(self.residency)

        def needed() -> bool:
            known = residency()
            return known is not None and not known.complete

        mirror = IndexMirror(self.backend, link, store, self.geometry.name, needed)
        self.residency.on_loss = mirror.make_later
        return mirror

    def _build_calls(self) -> None:
        geometry, state, lifecycle, kernels = self.geometry, self.state, self.lifecycle, self.kernels
        residency, workspaces = self.residency, self.workspaces
        self.plan = plan = LaunchPlan(geometry, state, kernels, residency, self.mirror)
        misses = self.misses, self.gathered
        self.lookups = Lookups(
            geometry, state, lifecycle, kernels, residency, plan, workspaces, *misses, self.switch, self.reading, self.calls
        )
        self.pooling = Pooling(geometry, state, lifecycle, kernels, residency, plan, workspaces, self.switch, self.calls)
        self.without_store = WithoutStore(geometry, state, lifecycle, residency, plan, workspaces, self.backend)
        self.changes = Changes(geometry, state, lifecycle, kernels, residency, self.reading)
        self.warming = Warming(
            geometry,
            state,
            lifecycle,
            kernels,
            residency,
            plan,
            self.changes,
            self.lookups,
            self.store,
            self.mirror,
            self.link,
            workspaces,
            self.switch,
        )
        self.policy_switch = PolicySwitch(geometry, state, lifecycle, kernels, residency, plan, workspaces)
        self.inspection = Inspection(geometry, state, lifecycle, kernels, self.misses, self.gathered)

    def stand_in(self, store: HostStore | None) -> CacheParts:
        """``EmbeddingCache.stand_in``. It has the kernels of this cache, so that nothing is compiled then."""
        own = self.geometry
        geometry = CacheGeometry(own.name, own.dim, 1, own.kind, False, own.row_type, own.default, 1)
        kernels = self.kernels
        parts = CacheParts(
            geometry,
            self.backend.ordinal,
            kernels.policy,
            store,
            pinned=False,
            limit=self._limit,
            miss_path="direct",
            switch=VersionSwitch(),
            inserts=False,
        )
        parts.kernels.made.update(kernels.made)
        return parts

    @property
    def memory(self) -> CacheMemory:
        """What the cache takes now, without lookups of several tables in one launch, whose memory is the group's."""
        state, workspaces, rows = self.state, self.workspaces, self.geometry.row_bytes
        memory = CacheMemory(
            index=state.bytes - rows - state.hits_bytes,
            rows=0 if state.pinned_bytes else rows,
            policy=state.hits_bytes + workspaces.policy_memory.bytes,
            index_mirror=0 if self.mirror is None else self.mirror.bytes,
            workspaces=workspaces.bytes + state.kept_bytes,
            graphs=workspaces.captured_bytes,
            staging=workspaces.gathering_bytes + (0 if self.misses is None else self.misses.bytes),
            pinned_rows=state.pinned_bytes,
            pinned_staging=self.backend.pinned_bytes - state.pinned_bytes,
        )
        return with_pinned(memory, on_device=self.backend.ordinal is not None)

    @property
    def needed_bytes(self) -> int:
        """``CacheMemory.needed_bytes`` of ``memory``."""
        return self.memory.needed_bytes

    def close(self) -> CacheCounters | None:
        """Wait for the lookups at work and free all memory; returns the last counts, once.

        Again finishes what an interrupted call left, or does nothing.
        """
        self.lifecycle.close()
        withdraw(self)
        with self._closing:
            if self._closed:
                return None
            with self.backend.current():
                self.workspaces.close()
                if self._last_counters is None:  # of a state that is there: an interrupted call may have released it
                    self._last_counters = self.inspection.last_counters()
                for part in (self.misses, self.gathered, self.mirror, self.link):
                    if part is not None:
                        part.close()
                self.workspaces.release_policies()
                self.state.release()
            self.backend.close()
            self._closed = True
            return self._last_counters

    def reset_after_fork(self) -> None:
        """A new lock, as a forked child needs it."""
        self._closing = threading.RLock()
