"""The embedding cache of one table on one device, or on the CPU (the same kernels, on memory of the process).

A lookup is a few kernels on the caller's stream and nothing else: rows come from the cache, else over the bus from the host
store, else they are the default; another kernel inserts what was missing. Nothing waits on the host and nothing comes back to
Python, so a lookup can be captured by a graph. (Large batches may be staged instead: host threads gather what is missing,
``cache.staging``.) What is inserted is checked against the store under the lock of its set, and whoever changes the store calls
``update`` or ``erase`` afterwards: then no old row is left, whatever the order on the device.

*Kinds.* ``dynamic``: rows are inserted on a miss and evicted by the policy. ``static`` and ``uvm`` (fixed): the rows are those
of the warming, all of the store or as many as fit; other rows are answered from the host store and never inserted.

``EmbeddingCache`` is a facade: it says what the parts of a cache (``cache.parts``) do for callers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hps_numba.cache.backends import Backend
from hps_numba.cache.host_arrays import contiguous_keys
from hps_numba.cache.inspect import CacheCounters, CacheEntry
from hps_numba.cache.memory_use import CacheMemory
from hps_numba.cache.parts import CacheParts
from hps_numba.cache.policy_switch import PolicyChange
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.staging import MISS_PATHS
from hps_numba.cache.version_switch import VersionSwitch
from hps_numba.errors import ConfigError, HpsError
from hps_numba.kernels.policies._policy import Policy
from hps_numba.storage.host.store import HostStore

__all__ = ["CacheCounters", "CacheEntry", "EmbeddingCache"]

_FIXED_WORKSPACES = 64  # small ones: streams of a fixed cache need not wait for each other


class EmbeddingCache:
    """The embedding cache of one table.

    Args:
        dim: width of a row in elements.
        rows: rows to hold; a dynamic cache holds at least so many, a fixed one exactly.
        device: ordinal of a CUDA device, whose kernels must reach the memory of the store; None for the CPU.
        kind: ``dynamic``, ``static`` or ``uvm``.
        whole: the cache is to hold all rows of its table (``gpucacheper`` 1.0): more ways than rows, and warming places all.
        policy: which entry of a full set is evicted.
        row_type: how rows are stored: ``float32``, ``float16``, ``bfloat16``, ``int8``, ``float8_e4m3``.
        default: element of the rows of absent keys.
        store: the host store whose rows it caches.
        buffers: most batches of a dynamic cache that run at a time (worker buffers).
        pagelock: rows of a fixed cache on a device are in pinned host memory.
        set_count: number of sets, whatever ``rows`` says; for tests.
        miss_path: how missed rows come from the store: ``direct``, ``staged`` (``cache.staging``), or ``auto``: direct with a
            copy of the store's index on the device, where there is room (``cache.index_mirror``).
        switch: of the versions of its model, shared by the caches of the model; by default one of its own.
        keys: of the largest usual batch: a workspace has room for so many from its first batch on. Larger batches make it grow,
            which waits for the work with it.

    Attributes:
        name, dim, kind, row_type, sets: as given or derived.   fixed: not ``dynamic``.   capacity: rows that it has room for.
        calls: how long calls of ``lookup`` and ``pool`` took until they returned, of a sample; at first none is timed. A lookup
            with a list of absent keys is a part of one that goes on: who asked for the list times the whole.
        parts: what it is made of (``cache.parts``), for groups of caches, the simulator and tests.

    Raises:
        DeviceError: no such device.
        CapacityError: the memory is not there.
        ConfigError: an argument is out of range.

    Thread safety: every method from any number of threads. Lookups never wait for other calls, except for a first ``warm``.
    """

    def __init__(
        self,
        dim: int,
        rows: int,
        *,
        device: int | None,
        kind: str = "dynamic",
        whole: bool = False,
        policy: Policy,
        row_type: str = "float32",
        default: float = 0.0,
        store: HostStore | None = None,
        name: str = "table",
        buffers: int = 1,
        pagelock: bool = False,
        set_count: int | None = None,
        miss_path: str = "direct",
        switch: VersionSwitch | None = None,
        keys: int = 0,
    ) -> None:
        _check(name, dim, buffers, store, miss_path)
        geometry = CacheGeometry(name, dim, rows, kind, whole, row_type, np.float32(default), set_count)
        limit = _FIXED_WORKSPACES if geometry.fixed else buffers
        pinned, switch = pagelock and geometry.fixed, switch or VersionSwitch()
        parts = CacheParts(
            geometry, device, policy, store, pinned=pinned, limit=limit, miss_path=miss_path, switch=switch, keys=keys
        )
        self.name, self.dim, self.kind, self.row_type = name, dim, kind, row_type
        self.fixed, self.sets, self.capacity = geometry.fixed, geometry.sets, geometry.capacity
        self.parts, self._lookups, self._pooling, self.calls = parts, parts.lookups, parts.pooling, parts.calls

    # -- lookups in stream order, by addresses ------------------------------------------------------------------------------

    def lookup(
        self,
        keys: int,
        n: int,
        out: int,
        stream: int,
        *,
        key_form: str = "int64",
        out_type: str = "float32",
        capturing: bool | None = None,
        absent_list: int = 0,
    ) -> None:
        """Write the row of each key to ``out``, in stream order: from the cache, the host store, or the default.

        Args:
            keys: address of ``n`` keys where the cache lives: ``int64``; ``int32``, sign-extended; ``uint32``;
                ``checked32_in_int64`` (int64, of which only 0 to 2**32 - 1 are keys).
            out: address of ``n`` rows of ``out_type`` (``float32``, ``float16``, ``bfloat16``), or 0: only fill the cache.
            stream: of the device; its work is done when the stream gets there. On the CPU it is done on return. A batch that
                is staged (``cache.staging``) waits once for the stream before it returns.
            capturing: the stream is being captured by a graph: the call gets a workspace that lives as long as the cache. None:
                the stream is asked.
            absent_list: address of int64 ``[1 + n]``, or 0: the number of keys in no tier, then their positions, in no order.
                For at most ``kernels.layouts.cache.MAX_BATCH`` keys.

        Raises:
            ClosedError: the cache was closed.
            CapacityError: no memory for a batch of this size, or too many keys for an absent list.
            DeviceError: the driver refused.
        """
        self._lookups.lookup(keys, n, out, stream, key_form, out_type, capturing, absent_list)

    def pool(
        self,
        keys: int,
        n: int,
        offsets: int,
        bags: int,
        out: int,
        stream: int,
        *,
        combiner: str = "sum",
        weights: int = 0,
        options: int = 0,
        padding: int = 0,
        key_form: str = "int64",
        out_type: str = "float32",
        capturing: bool | None = None,
    ) -> None:
        """Write the pooled row of each bag to ``out``, in stream order, of rows as ``lookup`` finds them.

        Sums are float32, in the order of positions, each operation rounded: equal on CPU and device, bit for bit.

        Args:
            keys: address of ``n`` keys where the cache lives, as for ``lookup``; at most ``kernels.layouts.cache.MAX_BATCH``.
            offsets: address of int64 ``[bags + 1]``, ascending from 0 to ``n``: where bags begin, and the end of the last.
            out: address of ``bags`` rows of ``out_type``. A bag without keys gets 0.
            stream: of the device; its work is done when the stream gets there. On the CPU it is done on return.
            combiner: ``sum``; ``mean``, over the sum of weights; ``sqrtn``, over the root of the sum of their squares (0 if
                the divisor is 0); ``max``, whatever the weights.
            weights: address of float32 ``[n]``, or 0: all are 1.
            options: bits of ``kernels.cache.pooling``: ``PADDED``, skip keys equal to ``padding``; ``EMPTY_DEFAULT``, bags
                without keys get the default; ``OFFSETS32``, offsets are int32; ``OPEN_END``, without the last, which is ``n``;
                ``EQUAL``, every bag has as many keys, and ``offsets`` is their number.
            padding: the key that ``PADDED`` skips.
            capturing: as for ``lookup``.

        Raises:
            ClosedError: the cache was closed.
            ConfigError: an unknown combiner, key form or type.
            CapacityError: too many keys, too large a cache, or no memory for a batch of this size.
            DeviceError: the driver refused.
        """
        self._pooling.pool(
            keys, n, offsets, bags, out, stream, combiner, weights, options, padding, key_form, out_type, capturing
        )

    def scatter(self, positions: np.ndarray, rows: np.ndarray, out: int, stream: int, out_type: str = "float32") -> None:
        """Write rows float32 ``[m, dim]`` to the ``positions`` (int64 ``[m]``) of an answer at ``out``, in stream order.

        For rows that come from slower tiers after a lookup. Returns when they are there.
        """
        self._lookups.scatter(positions, rows, out, stream, out_type)

    # -- with arrays of the host, synchronous ---------------------------------------------------------------------------------

    def lookup_arrays(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``lookup`` for NumPy: float32 ``[n, dim]`` of int64 ``[n]``, written to ``out`` if given."""
        return self._lookups.lookup_arrays(keys, out)

    def pool_arrays(
        self, keys: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None = None, combiner: str = "sum"
    ) -> np.ndarray:
        """``pool`` for NumPy: float32 ``[bags, dim]`` of int64 ``[n]``. Done when this returns.

        Args:
            keys: int64 ``[n]``.
            offsets: int64 or int32 ``[bags + 1]``, ascending from 0 to ``n``: where bags begin, and the end of the last.
            weights: float32 ``[n]``, or None: all are 1.
            combiner: ``sum``, ``mean``, ``sqrtn`` or ``max``.

        Raises:
            KeyDtypeError: keys are not int64 ``[n]``.
            ConfigError: offsets or weights do not fit the keys, or an unknown combiner.
            ClosedError, CapacityError, DeviceError: as ``pool``.
        """
        return self._pooling.pool_arrays(keys, offsets, weights, combiner)

    def query(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the cache has, as if there were no store: rows float32 ``[n, dim]``, and the missing positions, ascending.

        Keys that it has are touched; the rows of others are 0, and nothing is inserted or counted.
        """
        return self.parts.without_store.query(keys)

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Insert keys that the cache lacks, with rows float32 ``[n, dim]``; those that it has are touched.

        The store is not asked: rows that may change meanwhile belong in the store, and come from there by ``lookup``.
        """
        self.parts.without_store.insert(keys, rows)

    def update(self, keys: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Overwrite the rows of those keys that the cache has; scores stay. Done when this returns.

        Args:
            keys: int64 ``[n]``.
            rows: float32 ``[n, dim]``, the last of equal keys wins; None: as the store has them, and keys that it no longer has
                are dropped.
        """
        self.parts.changes.update(keys, rows)

    def take_written(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """``update`` with the rows that the store was just given, and no other write since.

        Args:
            keys: distinct, int64 ``[n]``.   rows: float32 ``[n, dim]``, contiguous; read until this returns.
        """
        self.parts.changes.take_written(keys, rows)

    def erase(self, keys: np.ndarray) -> int:
        """Drop those keys that the cache has; returns how many. Done when this returns."""
        return self.parts.changes.erase(keys)

    def refresh(self, first_set: int = 0, stop_set: int | None = None, drop: bool = True) -> None:
        """Read all rows of a range of sets from the store again; ``drop`` keys that it no longer has.

        Raises:
            ConfigError: the range is not one of this cache's.
        """
        self.parts.changes.refresh(first_set, stop_set, drop=drop)

    def clear(self) -> None:
        """Drop all rows. Done when this returns."""
        self.parts.changes.clear()

    def warm(self) -> int:
        """Fill the cache from its store, in the store's order until it is full; returns how many rows it then has.

        Before the first lookup, and always in fixed caches, all keys get their ways at once and the device fetches the rows
        itself; a lookup that comes meanwhile waits (the first one) or is answered from the store (fixed caches). A dynamic
        cache in use is emptied and its keys are looked up instead, which counts as lookups and misses: it then holds a row
        for each key that found room in its own set.

        Raises:
            CapacityError: the store has more rows than a static cache.
            ClosedError: the cache or the store was closed.
        """
        return self.parts.warming.warm()

    # -- another version of all rows ------------------------------------------------------------------------------------------

    def stand_in(self, store: HostStore | None) -> CacheParts:
        """What answers instead of this cache while its rows are replaced: the same kernels and no rows, over another store.

        It takes memory for nothing but its state. Close it.

        Raises:
            CapacityError: no memory.
        """
        return self.parts.stand_in(store)

    def hold(self) -> None:
        """Stay at the version of the store that is in force now, whatever the store does, until ``take_new_version``."""
        if self.parts.link is not None:
            self.parts.link.hold()

    def let_go(self) -> None:
        """Undo ``hold``: follow the store again."""
        if self.parts.link is not None:
            self.parts.link.release()

    def fail(self, problem: HpsError) -> None:
        """Refuse further lookups with this error: what the cache holds may not be what its store has."""
        if self.parts.link is not None:
            self.parts.link.problem = problem

    def drain(self) -> None:
        """Wait for all lookups that have begun, and for their work on the device; no other lookup waits meanwhile."""
        self.parts.workspaces.drain()

    def take_new_version(self) -> None:
        """Undo ``hold``: drop all rows and follow the store again.

        Nobody looks up meanwhile, except replays of graphs that were not announced.

        Raises:
            DeviceError: the device refused.
        """
        self.parts.warming.take_new_version()

    @property
    def has_graphs(self) -> bool:
        """A graph has captured a lookup, and may be replayed at any time."""
        return self.parts.workspaces.has_graphs

    # -- the policy -----------------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self.parts.kernels.policy

    def compile_policy(self) -> None:
        """Compile what insertion by the policy needs now, rather than when a lookup first misses.

        Raises:
            PolicyError: a function of the policy does not compile here.
        """
        self.parts.kernels.compile_policy()

    def set_policy(self, policy: Policy) -> None:
        """Let another policy decide from now on which entry is evicted; done when this returns.

        Rows stay where they are, each with the score of a row inserted now; the state of sets and the sketch start again.
        Lookups wait for the switch, which takes about as long as a pass over the index, not for compilers. Graphs captured
        before go on with the policy before; capture them again.

        Raises:
            ConfigError: a fixed cache, which evicts nothing.
            PolicyError: a function does not compile here.   CapacityError: no memory for what the policy remembers. In
            either case the policy before stays.
        """
        self.adopt_policy(self.prepare_policy(policy))

    def prepare_policy(self, policy: Policy) -> PolicyChange:
        """Compile and allocate what ``adopt_policy`` needs. Raises as ``set_policy``."""
        return self.parts.policy_switch.prepare(policy)

    def adopt_policy(self, change: PolicyChange) -> None:
        """Put a policy that was prepared in force."""
        self.parts.policy_switch.adopt(change)

    # -- what there is --------------------------------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        """Where the cache lives: its memory, streams and events."""
        return self.parts.backend

    @property
    def device(self) -> int | None:
        """CUDA ordinal, None for the CPU."""
        return self.parts.backend.ordinal

    @property
    def memory(self) -> CacheMemory:
        """Bytes that it takes now, by what they are for; those of groups of caches are not its own."""
        return self.parts.memory

    @property
    def bytes(self) -> int:
        """Bytes where it lives: all of ``memory`` but what is in pinned host memory."""
        return self.parts.memory.bytes

    @property
    def index_mirror_bytes(self) -> int:
        """Bytes of the copy of the host store's index that lookups read now; 0: they read that in host memory."""
        mirror = self.parts.mirror
        return 0 if mirror is None or not mirror.is_used else mirror.bytes

    @property
    def large_batch(self) -> int:
        """Keys of the smallest batch whose lookup has a lane, and not a tile, search for each key."""
        return self.parts.kernels.large_batch

    @property
    def fusion_key(self) -> tuple[Any, ...]:
        """Caches for which this is the same can be looked up by one kernel (``cache.group``)."""
        return self.parts.kernels.fusion_key

    @property
    def single_kernel(self) -> bool:
        """A lookup is one kernel: all rows are here, and there is nothing to count."""
        return self.parts.residency.single_kernel

    def resident(self) -> int:
        """Rows that the cache holds; reads its whole index."""
        return self.parts.inspection.resident()

    def entries(self) -> list[CacheEntry]:
        """All that the cache holds, in the order of sets, lines and ways; for tests."""
        return self.parts.inspection.entries()

    def counters(self) -> CacheCounters:
        """What happened so far; reads the device."""
        return self.parts.inspection.counters()

    def dump(self, first_set: int = 0, stop_set: int | None = None) -> np.ndarray:
        """The keys in a range of sets, int64 ``[n]``, in no order.

        Raises:
            ConfigError: the range is not one of this cache's.
        """
        return self.parts.inspection.dump(first_set, stop_set)

    def check_fully_resident(self) -> int:
        """See whether all rows of the store are here, which makes lookups cheaper; returns how many are. Reads the index."""
        with self.parts.lifecycle.controlled():
            return self.parts.residency.check()

    def mirror_index(self) -> bool:
        """With ``miss_path`` auto: copy the index of the host store to where the cache lives, unless the copy is there already.

        On a device that happens by itself, after a warming and when the store was not changed for a while
        (``cache.index_mirror``). Returns whether lookups read a copy now.
        """
        self.parts.lifecycle.check_open()
        return self.parts.mirror is not None and self.parts.mirror.make()

    def keys_of(self, keys: np.ndarray) -> np.ndarray:
        """Contiguous keys, int64 ``[n]``.

        Raises:
            KeyDtypeError: another dtype or rank.
        """
        return contiguous_keys(self.name, keys)

    def close(self) -> None:
        """Wait for the lookups at work and free all memory. No graph that captured a lookup may run any more."""
        self.parts.close()


def _check(name: str, dim: int, buffers: int, store: HostStore | None, miss_path: str) -> None:
    if buffers < 1:
        raise ConfigError(f"{name}: buffers of the cache: expected 1 or more, got {buffers}")
    if store is not None and store.dim != dim:
        raise ConfigError(f"{name}: width of the cache: expected {store.dim}, as of its host store, got {dim}")
    if miss_path not in MISS_PATHS:
        raise ConfigError(f"{name}: miss_path: expected one of {', '.join(MISS_PATHS)}, got {miss_path!r}")
