"""Several caches of one place and one width, looked up together: one launch for all tables, one for what they insert.

A model with 26 tables would start 52 kernels, and the time to start them is most of the time of a small batch. What each cache
and its workspace hold is written to the device when a workspace is made; keys, their numbers and the places of answers are
arguments of the kernels (``kernels/cache/multi_table.py``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.cache.backends import LOOKUP_THREADS, OTHER_THREADS, Backend, CudaBackend, Kernel, Memory
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.staging import NEVER
from hps_numba.cache.workspace import Workspace, WorkspacePool
from hps_numba.errors import CapacityError, ClosedError, ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH, MAX_TABLES, TABLE_BYTES, TABLE_WORDS

if TYPE_CHECKING:
    from hps_numba.kernels.compiler.launch import LaunchChain

__all__ = ["CacheGroup"]


class CacheGroup:
    """Caches that are looked up together.

    Args:
        caches: 1 to ``MAX_TABLES`` of one ``EmbeddingCache.kin``, each once.
        buffers: most lookups of the group that run at a time; each takes as much memory as one of each cache.

    Raises:
        ConfigError: caches that do not go together.

    Close it before the caches. **Threads:** ``lookup`` from any.
    """

    def __init__(self, caches: Sequence[EmbeddingCache], *, buffers: int = 1) -> None:
        if not 1 <= len(caches) <= MAX_TABLES or len(set(caches)) < len(caches):
            raise ConfigError(f"a group of {len(caches)} caches, wanted 1 to {MAX_TABLES} different ones")
        if len({cache.fusion_key for cache in caches}) > 1:
            raise ConfigError(f"a group of caches of several kinds: {', '.join(cache.name for cache in caches)}")
        self._caches = tuple(caches)
        first = self._caches[0]
        self.name = f"{first.name} and {len(caches) - 1} more"
        self._backend = first.backend
        self._fixed, self._counted, self._dim = first.fixed, first.policy.needs_count and not first.fixed, first.dim
        self._sets = max(cache.sets for cache in caches)
        self._captured: list[_GroupWorkspace] = []
        self._chains: dict[tuple[str, str, bool, bool], tuple[LaunchChain, LaunchChain, int]] = {}
        self._capturing = threading.Lock()
        self._closed = False
        with self._backend.current():
            self._stream: Any = self._backend.new_stream()
        self._new_workspace = partial(_GroupWorkspace, self._backend, self._caches, self.name)
        self._pool = WorkspacePool(self._backend, self._new_workspace, buffers, self.name)

    @property
    def caches(self) -> tuple[EmbeddingCache, ...]:
        """In the order of the arguments of ``lookup``."""
        return self._caches

    @property
    def bytes(self) -> int:
        """Bytes of the buffers of batches so far."""
        return self._pool.bytes + sum(workspace.bytes for workspace in self._captured)

    def lookup(
        self,
        keys: Sequence[int],
        counts: Sequence[int],
        outs: Sequence[int],
        stream: int,
        *,
        key_form: str = "int64",
        out_type: str = "float32",
    ) -> None:
        """``EmbeddingCache.lookup`` for each cache: the same answers, and the same content of the caches afterwards.

        Args:
            keys, counts, outs: for each cache the address of its keys, their number (0 or more, at most ``MAX_BATCH``), and the
                address of its answer, where the caches live.
            stream, key_form, out_type: as for ``EmbeddingCache.lookup``.

        Raises:
            ClosedError: a cache or the group was closed.   CapacityError: no memory for batches of this size, or too many keys.
            DeviceError: the driver refused.
        """
        self._begin()
        most = max(counts)
        if most > MAX_BATCH:
            raise CapacityError(f"{self.name}: {most} keys of one table in a lookup of several, wanted at most {MAX_BATCH}")
        if most == 0:
            return
        words: list[int] = [0] * (MAX_TABLES * TABLE_WORDS)
        end = TABLE_WORDS * len(counts)
        words[0:end:TABLE_WORDS], words[1:end:TABLE_WORDS], words[2:end:TABLE_WORDS] = keys, counts, outs
        aligned = not any(map((15).__and__, outs))
        shape = (key_form, out_type, aligned, sum(counts) < self._caches[0].large_batch)
        chains = self._chains.get(shape)
        if chains is not None and self._pool.reuse(stream, most, self._start, chains, most, words, stream):
            return
        with self._backend.current():
            if self._backend.is_capturing(stream):
                with self._backend.relaxed(), self._capturing:  # a change of a policy waits for the capture in ``retire``
                    self._check_open()
                    kept = self._new_workspace()
                    self._captured.append(kept)
                    for cache in self._caches:
                        cache.in_graphs = True
                    kernels, group = self._kernels(*shape)
                    self._batch(kept, kernels, group, most, words, stream)
                return
            kernels, group = self._kernels(*shape)
            workspace = self._pool.acquire(stream)
            done = False
            try:
                with ExitStack() as stores:
                    for cache in self._caches if self._backend.ordinal is None else ():
                        stores.enter_context(cache.reading())
                    self._batch(workspace, kernels, group, most, words, stream)
                done = True
            finally:
                self._pool.release(workspace, stream, invalid=not done)
            if isinstance(self._backend, CudaBackend) and shape not in self._chains:
                self._chains[shape] = self._backend.launch_chain(kernels), self._backend.launch_chain(kernels[:1]), group

    def _start(
        self, workspace: _GroupWorkspace, chains: tuple[LaunchChain, LaunchChain, int], most: int, words: list[int], stream: int
    ) -> bool:
        chain, lookup_alone, group = chains
        if all(cache.single_kernel for cache in self._caches):
            chain, launches = lookup_alone, [self._lookup(workspace.without_lists, group, most, words)]
        else:
            launches = self._launches(workspace, group, most, words)
        return chain.start(self._backend.context, stream, workspace.event, *launches)

    def _kernels(self, *shape: Any) -> tuple[list[Kernel], int]:
        """The kernels of a lookup in their order, and how many keys a warp of the first takes."""
        first = self._caches[0]
        kernel, group = first.tables_lookup_kernel(*shape)
        names = [] if self._fixed else ["insert_tables_kernel"]
        if self._counted:
            names.insert(0, "touch_tables_kernel")
        return [kernel, *map(first.tables_kernel, names)], group

    def _launches(self, workspace: Workspace, group: int, most: int, words: list[int]) -> list[tuple[Any, ...]]:
        """Blocks, rows, threads and arguments of each kernel."""
        backend, count, tables = self._backend, len(self._caches), workspace.address
        launches = [self._lookup(tables, group, most, words)]
        if self._counted:
            launches.append((backend.blocks_after(count * most, most, count), count, OTHER_THREADS, (tables, count)))
        if not self._fixed:
            blocks = backend.blocks_after(count * most, min(most, self._sets), count)
            launches.append((blocks, count, OTHER_THREADS, (tables, count, *words)))
        return launches

    def _lookup(self, tables: int, group: int, most: int, words: list[int]) -> tuple[Any, ...]:
        """The first of ``_launches``."""
        count = len(self._caches)
        return self._backend.lookup_blocks(most, group), count, LOOKUP_THREADS, (tables, count, *words)

    def _batch(
        self, workspace: Workspace, kernels: Sequence[Kernel], group: int, most: int, words: list[int], stream: int
    ) -> None:
        workspace.reserve(most, False, self._stream)
        for kernel, (blocks, rows, threads, args) in zip(kernels, self._launches(workspace, group, most, words), strict=True):
            kernel.launch(blocks, stream, *args, threads=threads, rows=rows)

    def lookup_arrays(self, keys: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``lookup`` for NumPy: float32 ``[n, dim]`` of int64 ``[n]`` for each cache. Done when this returns.

        Raises:
            KeyDtypeError: keys are no int64 ``[n]``.   Otherwise as ``lookup``.
        """
        self._begin()
        given = [cache.keys_of(some) for cache, some in zip(self._caches, keys, strict=True)]
        outs = [np.empty((len(some), self._dim), np.float32) for some in given]
        with ExitStack() as held:
            held.enter_context(self._backend.current())
            copies = [self._backend.copy_of(some, self._stream) for some in given]
            rooms = [self._backend.allocate(max(1, out.nbytes), f"{self.name}: results of a call") for out in outs]
            for memory in (*copies, *rooms):
                held.callback(memory.release)
            counts = [len(some) for some in given]
            self.lookup([copy.address for copy in copies], counts, [room.address for room in rooms], self._stream)
            for out, room in zip(outs, rooms):
                self._backend.to_host(out, room.address, self._stream)
        return outs

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: the group of caches is closed")

    def _begin(self) -> None:
        self._check_open()
        for cache in self._caches:
            cache.begin()

    def retire(self) -> None:
        """Wait for the lookups at work and take no more; graphs that captured one go on."""
        with self._capturing:
            if self._closed:
                return
            self._closed = True
        with self._backend.current():
            self._pool.close(self._stream)

    def close(self) -> None:
        """``retire``, and give all memory back. No graph that captured a lookup may run any more."""
        self.retire()
        with self._capturing, self._backend.current():
            if self._stream is None:
                return
            for workspace in self._captured:
                workspace.release(self._stream)
            self._captured.clear()
            self._backend.destroy_stream(self._stream)
            self._stream = None


class _GroupWorkspace(Workspace):
    """A workspace of each cache, and at ``address`` the description of all tables; at ``without_lists`` one whose workspaces
    leave nothing to do.   **Threads:** one at a time.
    """

    def __init__(self, backend: Backend, caches: Sequence[EmbeddingCache], name: str) -> None:
        super().__init__(backend, caches[0].workspace_shape, name)
        self._caches = caches
        # launches of several tables list nothing
        shapes = [replace(cache.workspace_shape, lists_missed_from=NEVER) for cache in caches]
        self._parts = [Workspace(backend, shape, cache.name) for cache, shape in zip(caches, shapes)]
        self._tables: Memory | None = None
        self.without_lists = 0

    def reserve(self, n: int, absent: bool, stream: int) -> None:
        """Have room for ``n`` keys of each table; ``stream`` is free to be waited for."""
        if n <= self.limit:
            return
        self._settle(stream)
        wanted, self.limit = max(n, self.limit), 0  # until all have it: what is described may be gone by then
        for part in self._parts:
            part.reserve(wanted, absent, stream)
        if self._tables is None:
            self._tables = self._backend.allocate(self._tables_bytes, f"{self._name}: tables of a group")
        descriptions = np.zeros((2, len(self._parts), TABLE_BYTES // 8), np.int64)
        for i, (cache, part) in enumerate(zip(self._caches, self._parts)):
            for description, of_part in zip(descriptions, (part, None)):
                words = cache.described(of_part)
                description[i, : len(words)] = words
        self._backend.from_host(self._tables.address, descriptions.reshape(-1), stream)
        self.address, self.limit = self._tables.address, min(part.limit for part in self._parts)
        self.without_lists = self.address + TABLE_BYTES * len(self._parts)
        self.bytes = self._tables_bytes + sum(part.bytes for part in self._parts)

    @property
    def _tables_bytes(self) -> int:
        return 2 * TABLE_BYTES * len(self._parts)

    def _settle(self, stream: int) -> None:
        """Wait for the work that was done with it: growing is rare, and what it had is given back at once."""
        if self._event is not None:
            self._backend.wait(stream, self._event)
            self._backend.synchronize(stream)

    def invalidate(self) -> None:
        """Begin anew with the next ``reserve``: a batch stopped in its midst."""
        self.limit = self.bytes = 0
        for part in self._parts:
            part.invalidate()

    def release(self, stream: int) -> None:
        """Give the memory back after all work with it; ``stream`` is used for the wait."""
        self._settle(stream)
        self._backend.synchronize(stream)
        for part in self._parts:
            part.release(stream)
        if self._tables is not None:
            self._tables.release()
            self._tables = None
        if self._event is not None:
            self._backend.destroy_event(self._event)
            self._event = None
        self.limit = self.bytes = 0
