"""One table as it is served: which part answers a lookup, and the default value for keys that no tier has.

A lookup with keys in host memory: ``HPS.lookup`` (lookups.py) -> ``ServedTable.lookup`` (here) -> ``HostStore.lookup``
(storage/host/store.py) -> the compiled kernel (kernels/host/lookup.py). Tables with slower tiers go through ``SlowPath``
(slow_path.py) -> ``TierStack.fetch`` (storage/tier_stack.py). Writes are in ``TableWrites`` (table_writes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from hps_numba.arrays.bags import DeviceBags
from hps_numba.arrays.cuda import DeviceKeys
from hps_numba.arrays.host import NUMPY
from hps_numba.arrays.plain_tensors import PlainHostTensors, PlainTensors, is_tensor
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.call_times import CallTimes
from hps_numba.config import TableSpec
from hps_numba.kernels.layouts.cache import MAX_BATCH
from hps_numba.kernels.layouts.host_store import COUNTER_ABSENT
from hps_numba.metrics.histogram import HistogramSnapshot
from hps_numba.server.slow_path import Background, SlowPath, SlowPathOptions
from hps_numba.server.stats import Counters, TableStats
from hps_numba.server.table_caches import GroupBytes, TableCaches
from hps_numba.server.table_writes import TableWrites
from hps_numba.storage.host.content import address_of, apart
from hps_numba.storage.host.plain import PlainLookups
from hps_numba.storage.host.pooling import Bags, pool_bags
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.host.store_bytes import StoreBytes
from hps_numba.storage.tier_stack import TierStack

__all__ = ["PlainLookup", "ServedTable"]

PlainLookup = Callable[[Any, Any, Any], Any]
"""From keys, ``out`` and stream to the answer, or to None, with nothing done, if the call is not plain."""


class ServedTable:
    """One table as it is served.

    Args:
        spec: the table.
        store: its rows in host memory, or None if the config has no volatile database.
        tiers: the slower tiers, perhaps none.
        background: runs a job on the model's background threads.
        options: when lookups wait for slower tiers.
        output_type: element type of answers: float32, float16 or bfloat16.

    Attributes:
        writes: what changes the rows.
        slow_path: lookups that may go on to slower tiers, or None if there are none.
        caches: the caches of the table, or None.
        cached_lookups: how long whole lookups took, of a sample of them, if a cache in host memory answers them.

    Thread safety: every method.
    """

    def __init__(
        self,
        spec: TableSpec,
        store: HostStore | None,
        tiers: TierStack,
        background: Background,
        options: SlowPathOptions,
        *,
        output_type: str = "float32",
    ) -> None:
        self.spec = spec
        self.output_type = output_type
        self.store = store
        self.caches: TableCaches | None = None
        self.cached_lookups = CallTimes()
        self.writes = TableWrites(spec, store, tiers)
        self._counters = Counters()
        self.slow_path: SlowPath | None = None
        if tiers:
            self.slow_path = SlowPath(spec, store, tiers, self.writes, self._counters, background, options)
        self._in_host_memory: PlainLookups | None = None
        if store is not None and not tiers and output_type == "float32":
            self._in_host_memory = store.plain_lookups(spec.default_value, self._counters.address)
        self._on_gpus: dict[int, PlainTensors] = {}

    def attach_caches(self, caches: TableCaches) -> None:
        """Serve lookups from these caches, and bring every write to them."""
        self.caches = self.writes.caches = caches
        if caches.on(None) is not None:
            self._in_host_memory = None
            self.cached_lookups.switch(True)

    @property
    def parts(self) -> tuple[object, ...]:
        """The objects in whose methods a thread is while it looks up or writes."""
        return self, self.writes, self.slow_path, self._in_host_memory, *self._on_gpus.values()

    def plain_lookup(self, kind: type, device: int | None, key_bits: int) -> PlainLookup | None:
        """What looks up batches of plain arrays in one step; None if a lookup takes more than host memory or one cache.

        Args:
            kind: the class of the keys.   device: the GPU that has them, or None.   key_bits: 64 or 32.
        """
        if device is None:
            if self._in_host_memory is None or key_bits == 32:
                return None
            if kind is np.ndarray:
                return self._in_host_memory
            return PlainHostTensors(self._in_host_memory) if is_tensor(kind) else None
        cache = self.cache_on(device)
        if cache is None or self.slow_path is not None or not is_tensor(kind):
            return None
        if device not in self._on_gpus:
            look_up = cache.parts.lookups.lookup
            self._on_gpus[device] = PlainTensors(look_up, self.spec.dim, self.output_type, key_bits, device)
        return self._on_gpus[device]

    # -- keys in host memory ---------------------------------------------------------------------

    def lookup(self, keys: np.ndarray, out: np.ndarray) -> None:
        """Write the row of each key to ``out``.

        Args:
            keys: int64 ``[n]``, contiguous; may share memory with ``out``.
            out: float32 ``[n, dim]``, contiguous; all of it is written.
        """
        if not len(keys):
            return
        cache = self.cache_on(None)
        if cache is not None:
            keys = apart(keys, out)
            batch = DeviceKeys(address_of(keys), len(keys), keys.shape, "int64", NUMPY, 0, keys)
            self.lookup_cached(cache, batch, address_of(out), 0)
        elif self.slow_path is not None:
            self.slow_path.lookup(apart(keys, out), out)
        elif self.store is not None:
            absent = self.store.lookup(keys, out, self.spec.default_value, counters=self._counters.address)
            if absent:
                self._counters.add(COUNTER_ABSENT, absent)
        else:
            out[:] = self.spec.default_value
            self._counters.add_missed_call(len(keys))
            self._counters.add(COUNTER_ABSENT, len(keys))

    def lookup_pooled(self, bags: Bags, out: np.ndarray) -> None:
        """Write the pooled row of each bag to ``out``, from host memory and slower tiers, past the caches.

        Args:
            out: float32 ``[bags, dim]``, contiguous; a bag without keys gets 0.
        """
        pool = partial(pool_bags, 0, None) if self.store is None else self.store.pool
        if self.slow_path is not None:
            self.slow_path.lookup_pooled(pool, bags, out)
            return
        absent = pool(bags, out, self.spec.default_value, counters=self._counters.address)
        self._counters.add(COUNTER_ABSENT, absent)

    # -- through a cache ---------------------------------------------------------------------

    def cache_on(self, device: int | None) -> EmbeddingCache | None:
        """The cache of the table on a device, by CUDA ordinal, or in host memory for None; None if there is none."""
        return None if self.caches is None else self.caches.on(device)

    def lookup_cached(self, cache: EmbeddingCache, keys: DeviceKeys, out: int, stream: int) -> None:
        """Write the row of each key to ``out``, in the order of a stream of the cache's device.

        Args:
            keys: in the memory of the cache's device.
            out: address of rows, of ``output_type`` on a device and float32 on the CPU.

        Without slower tiers nothing waits for the device, except for batches whose rows host threads gather (``miss_path``).
        With slower tiers, the keys that neither cache nor host memory has are fetched before the call returns if fewer than
        ``hit_rate_threshold`` of the batch were found; otherwise they are answered with the default now, counted as
        unanswered, and fetched in the background.

        Raises:
            DeviceError: the stream is captured by a graph, which cannot wait for slower tiers.
        """
        out_type = "float32" if cache.device is None else self.output_type
        if self.slow_path is None:
            cache.lookup(keys.address, keys.n, out, stream, key_form=keys.form, out_type=out_type)
        else:
            self.slow_path.lookup_cached(cache, keys, out, stream, out_type)

    def pools_on(self, cache: EmbeddingCache | None, n: int) -> bool:
        """Whether ``pool_cached`` can take ``n`` keys: there is a cache, and no slower tier to wait for."""
        return cache is not None and self.slow_path is None and n <= MAX_BATCH

    def pool_cached(self, cache: EmbeddingCache, bags: DeviceBags, out: int, stream: int) -> None:
        """Write the pooled row of each bag to ``out``, in the order of a stream of the cache's device.

        Args:
            bags: in the memory of the cache's device.   out: address of rows of ``output_type`` on a device.
        """
        cache.pool(
            bags.keys.address,
            bags.keys.n,
            bags.offsets,
            bags.count,
            out,
            stream,
            combiner=bags.combiner,
            weights=bags.weights,
            options=bags.options,
            padding=bags.padding,
            key_form=bags.keys.form,
            out_type="float32" if cache.device is None else self.output_type,
        )

    @property
    def latency(self) -> HistogramSnapshot:
        """Nanoseconds that lookups spent in host memory, of a sample of them."""
        return self._counters.latency.snapshot()

    def time_lookups(self, timed: bool) -> None:
        """Whether a sample of lookups is timed from now on, while nobody looks up; at first it is."""
        self._counters.time_lookups(timed)
        for cache in self.caches or ():
            (self.cached_lookups if cache.device is None else cache.calls).switch(timed)

    def stats(self, version: int, group_bytes: GroupBytes) -> TableStats:
        """Counts since the server started; ``version`` is that of the model's content.

        ``group_bytes``: what its lookups of several tables take for a cache.
        """
        store = self.store
        return self._counters.read(
            model=self.spec.model,
            table=self.spec.name,
            rows=0 if store is None else len(store),
            size=0 if store is None else store.bytes,
            memory=StoreBytes() if store is None else store.sizes,
            evicted=0 if store is None else store.evicted,
            version=version,
            caches=() if self.caches is None else self.caches.stats(group_bytes),
            has_slower_tiers=self.slow_path is not None,
        )
