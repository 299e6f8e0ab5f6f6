"""Several caches of one backend and one width, looked up together: one launch for all tables, one for what they insert.

A model with 26 tables would start 52 kernels, and the time to start them is most of the time of a small batch. What each cache
and its workspace hold is written to the device when a workspace is made; the addresses of keys and answers and the number of
keys are arguments of the kernels (``kernels/cache/multi_table.py``).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np

from hps_numba.cache.backends import LOOKUP_THREADS, OTHER_THREADS, Kernel, OwnStream
from hps_numba.cache.cache import EmbeddingCache
from hps_numba.cache.call_times import CallTimes
from hps_numba.cache.group_workspace import GroupWorkspace
from hps_numba.cache.kernel_set import FINISHING_TABLES
from hps_numba.cache.launch_plan import Launch, start
from hps_numba.cache.version_switch import StandIns
from hps_numba.cache.workspace_pool import WorkspacePool
from hps_numba.errors import CapacityError, ClosedError, ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH, MAX_TABLES, TABLE_WORDS

if TYPE_CHECKING:
    from hps_numba.cache.backends import CudaBackend
    from hps_numba.kernels.compiler.launch import PreparedTables

__all__ = ["CacheGroup"]

Shape = tuple[str, str, bool, bool]
"""Form of the keys, type of the answers, whether these are 16-byte aligned, and whether the batch is small."""


class CacheGroup:
    """Caches that are looked up together.

    Args:
        caches: 1 to ``MAX_TABLES`` of one ``EmbeddingCache.fusion_key``, each once, that switch versions together.
        buffers: most lookups of the group that run at a time; each takes as much memory as one of each cache.

    Raises:
        ConfigError: caches that cannot be looked up by one kernel.

    Close it before the caches.

    Thread safety: all methods.
    """

    def __init__(self, caches: Sequence[EmbeddingCache], *, buffers: int = 1) -> None:
        if not 1 <= len(caches) <= MAX_TABLES or len(set(caches)) < len(caches):
            raise ConfigError(f"group of caches: expected 1 to {MAX_TABLES} different ones, got {len(caches)}")
        if len({cache.fusion_key for cache in caches}) > 1:
            names = ", ".join(cache.name for cache in caches)
            raise ConfigError(f"group of caches: expected caches of one fusion_key, got {names}")
        self._caches = tuple(caches)
        first = self._caches[0]
        self.name = f"{first.name} and {len(caches) - 1} more"
        self._backend, self._context, self._kernels = first.backend, first.backend.context, first.parts.kernels
        self._begins = [cache.parts.lifecycle.begin for cache in caches]
        self._residencies = [cache.parts.residency for cache in caches]
        self._switch = first.parts.switch
        self._states = [cache.parts.state.address for cache in caches]
        self._times = CallTimes.of_all([cache.calls for cache in caches])
        self._dim, self._large_batch = first.dim, first.large_batch
        self._fixed, self._counted = first.fixed, first.parts.kernels.counted
        self._sets = max(cache.sets for cache in caches)
        self._captured: list[GroupWorkspace] = []
        self._built: dict[Shape, tuple[list[Kernel], int]] = {}  # the kernels of lookups on a device that have been started
        self._capturing = threading.Lock()
        self._closed = False
        with self._backend.current():
            stream = self._backend.new_stream()
            self._own_stream: OwnStream | None = OwnStream(stream, self._backend.destroy_stream, self._backend.current)
        self._new_workspace = partial(GroupWorkspace, self._backend, self._caches, self.name)
        self._pool = WorkspacePool(self._new_workspace, buffers, self.name)

    @property
    def caches(self) -> tuple[EmbeddingCache, ...]:
        """In the order of the arguments of ``lookup``."""
        return self._caches

    @property
    def bytes(self) -> int:
        """Bytes of the buffers of batches so far."""
        return self._pool.bytes + sum(workspace.bytes for workspace in tuple(self._captured))

    def bytes_for(self, cache: EmbeddingCache) -> tuple[int, int]:
        """Of the bytes of buffers, those for one of the caches: of lookups, and of those that graphs captured."""
        i = self._caches.index(cache)
        of_lookups, of_graphs = (
            sum(kept.bytes_of(i) for kept in some) for some in (self._pool.workspaces, tuple(self._captured))
        )
        return of_lookups, of_graphs

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

        Of a sample of calls, how long each took counts for one of the caches, in turn.
        """
        since = self._times.begin()
        self._begin()
        longest = max(counts)
        if longest > MAX_BATCH:
            raise CapacityError(f"{self.name}: lookup of several tables: expected at most {MAX_BATCH} keys each, got {longest}")
        if longest == 0:
            return
        words: list[int] = [0] * (TABLE_WORDS * len(counts))
        words[0::TABLE_WORDS], words[1::TABLE_WORDS], words[2::TABLE_WORDS] = keys, counts, outs
        aligned = not any(map((15).__and__, outs))
        shape = (key_form, out_type, aligned, sum(counts) < self._large_batch)
        given = array("q", words) if shape in self._built else None
        if given is None or not self._pool.reuse(
            stream, longest, self._start_prepared, shape, stream, given.buffer_info()[0], longest
        ):
            self._start_unprepared(shape, longest, words, stream)
        if since:
            self._times.end(since)

    def _start_unprepared(self, shape: Shape, longest: int, words: list[int], stream: int) -> None:
        """Start the kernels one after the other; during a switch of versions, ask the stand-ins."""
        keys, counts, outs = (words[first::TABLE_WORDS] for first in range(3))
        words = words + [0] * (TABLE_WORDS * MAX_TABLES - len(words))
        with self._backend.current():
            if self._backend.is_capturing(stream):
                self._capture(shape, longest, words, stream)
                return

            def ask(stand_ins: StandIns) -> None:
                for state, some, count, out in zip(self._states, keys, counts, outs, strict=True):
                    stand_ins[state].lookups.lookup(some, count, out, stream, shape[0], shape[1], False)

            while not self._switch.answer(ask) and not self._start(shape, longest, words, stream):
                pass

    def lookup_stacked(
        self,
        keys: int,
        key_step: int,
        n: int,
        out: int,
        out_step: int,
        stream: int,
        *,
        key_form: str = "int64",
        out_type: str = "float32",
    ) -> None:
        """``lookup`` of ``n`` keys of each cache, which are evenly spaced, as are the answers.

        Args:
            keys, out: addresses for the first cache.   key_step, out_step: bytes from one cache to the next.
        """
        tables = len(self._caches)
        shape = (key_form, out_type, (out | out_step) & 15 == 0, tables * n < self._large_batch)
        if shape in self._built and 0 < n <= MAX_BATCH:
            since = self._times.begin()
            self._begin()
            how = shape, stream, 0, n, keys, key_step, out, out_step
            if self._pool.reuse(stream, n, self._start_prepared, *how):
                if since:
                    self._times.end(since)
                return
        every_keys = [keys + key_step * i for i in range(tables)]
        outs = [out + out_step * i for i in range(tables)]
        self.lookup(every_keys, [n] * tables, outs, stream, key_form=key_form, out_type=out_type)

    def _start_prepared(self, workspace: GroupWorkspace, shape: Shape, stream: int, words: int, *others: int) -> bool:
        """Start a lookup in one step; ``words`` and others as ``PreparedTables.start`` takes them."""
        if self._switch.active is not None:
            return False
        single = self._inserts_nothing
        prepared = workspace.prepared.get((shape, single))
        if prepared is None:
            prepared = workspace.prepared[shape, single] = self._prepare(workspace, shape, single, stream)
        started: bool = prepared.start(words, *others)
        return started

    def _prepare(self, workspace: GroupWorkspace, shape: Shape, single: bool, stream: int) -> PreparedTables:
        """Lookups of a shape with a workspace, on the stream that has it; ``single``: nothing follows the answer."""
        kernels, group = self._built[shape]
        nothing = [0] * (TABLE_WORDS * MAX_TABLES)
        if single:
            kernels, launches = kernels[:1], [self._lookup(workspace.without_lists, group, 1, nothing)]
        else:
            launches = self._launches(workspace, group, 1, nothing)
        last = len(launches) - 1
        return cast("CudaBackend", self._backend).prepared_tables(
            kernels,
            launches,
            stream,
            workspace.event,
            group=group,
            tables=len(self._caches),
            sets=self._sets,
            touch_at=1 if last == 2 else 0,
            insert_at=last,
        )

    def _capture(self, shape: Shape, longest: int, words: list[int], stream: int) -> None:
        """Start the kernels with a workspace for the graph that captures the stream."""
        with self._backend.relaxed(), self._capturing:  # a change of a policy waits for the capture in ``retire``
            self._check_open()
            kept = self._new_workspace(captured=True)
            self._captured.append(kept)
            for cache in self._caches:
                with cache.parts.lifecycle.lock:  # not while it is filled as if there were no graphs
                    cache.parts.workspaces.in_graphs = True
            kernels, group = self._kernels_of(shape)
            self._batch(kept, kernels, group, longest, words, stream)

    def _start(self, shape: Shape, longest: int, words: list[int], stream: int) -> bool:
        """Start the kernels one after the other; from now on lookups of this shape are started in one step.

        False: nothing was started, as a switch of versions began before the workspace was claimed.
        """
        groups: list[tuple[list[Kernel], int]] = []
        self._pool.lend(stream, self._start_with, groups, shape, longest, words, stream)
        if not groups:
            return False
        if self._backend.ordinal is not None:
            self._built[shape] = groups[0]
        return True

    def _start_with(
        self,
        workspace: GroupWorkspace,
        groups: list[tuple[list[Kernel], int]],
        shape: Shape,
        longest: int,
        words: list[int],
        stream: int,
    ) -> None:
        if self._switch.active is not None:
            return
        kernels, group = self._kernels_of(shape)  # a change of a policy waits for the workspace in ``retire``
        with ExitStack() as stores:
            for cache in self._caches if self._backend.ordinal is None else ():
                stores.enter_context(cache.parts.reading())
            self._batch(workspace, kernels, group, longest, words, stream, alone=self._inserts_nothing)
        groups.append((kernels, group))

    @property
    def _inserts_nothing(self) -> bool:
        """All rows are in every cache: an insertion must not follow an answer (``lookup._answer_alone``)."""
        return False not in [residency.single_kernel for residency in self._residencies]

    def _kernels_of(self, shape: Shape) -> tuple[list[Kernel], int]:
        """The kernels of a lookup in their order, and how many keys a warp of the first takes."""
        kernel, group = self._kernels.built(("lookup_tables_kernel", *shape))
        names = () if self._fixed else FINISHING_TABLES if self._counted else FINISHING_TABLES[1:]
        return [kernel, *(self._kernels.built((name,))[0] for name in names)], group

    def _launches(self, workspace: GroupWorkspace, group: int, longest: int, words: list[int]) -> list[Launch]:
        """The launch of each kernel of ``_kernels_of``."""
        backend, count, tables = self._backend, len(self._caches), workspace.address
        launches = [self._lookup(tables, group, longest, words)]
        if self._counted:
            launches.append((backend.blocks_after(count * longest, longest, count), count, OTHER_THREADS, (tables, count)))
        if not self._fixed:
            blocks = backend.blocks_after(count * longest, min(longest, self._sets), count)
            launches.append((blocks, count, OTHER_THREADS, (tables, count, *words)))
        return launches

    def _lookup(self, tables: int, group: int, longest: int, words: list[int]) -> Launch:
        """The first of ``_launches``."""
        count = len(self._caches)
        return self._backend.lookup_blocks(longest, group), count, LOOKUP_THREADS, (tables, count, *words)

    def _batch(
        self,
        workspace: GroupWorkspace,
        kernels: Sequence[Kernel],
        group: int,
        longest: int,
        words: list[int],
        stream: int,
        *,
        alone: bool = False,
    ) -> None:
        workspace.reserve(longest, False, self._held_stream().handle)
        if alone:
            start(kernels[:1], [self._lookup(workspace.without_lists, group, longest, words)], stream)
        else:
            start(kernels, self._launches(workspace, group, longest, words), stream)

    def lookup_arrays(self, keys: Sequence[np.ndarray]) -> list[np.ndarray]:
        """``lookup`` for NumPy: float32 ``[n, dim]`` of int64 ``[n]`` for each cache. Done when this returns.

        Raises:
            KeyDtypeError: keys are not int64 ``[n]``.   Otherwise as ``lookup``.
        """
        self._begin()
        given = [cache.keys_of(some) for cache, some in zip(self._caches, keys, strict=True)]
        outs = [np.empty((len(some), self._dim), np.float32) for some in given]
        of_group = self._held_stream()  # until this returns, also if the group is closed meanwhile
        stream = of_group.handle
        with ExitStack() as held:
            held.enter_context(self._backend.current())
            copies = [self._backend.copy_of(some, stream) for some in given]
            rooms = [self._backend.allocate(max(1, out.nbytes), f"{self.name}: results of a call") for out in outs]
            for memory in (*copies, *rooms):
                held.callback(memory.release)
            counts = [len(some) for some in given]
            self.lookup([copy.address for copy in copies], counts, [room.address for room in rooms], stream)
            for out, room in zip(outs, rooms):
                self._backend.to_host(out, room.address, stream)
        return outs

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: the group of caches is closed")

    def _held_stream(self) -> OwnStream:
        held = self._own_stream
        if held is None:
            raise ClosedError(f"{self.name}: the group of caches is closed")
        return held

    def _begin(self) -> None:
        self._check_open()
        for begin in self._begins:
            begin()

    def drain(self) -> None:
        """Wait for all lookups that have begun, and for their work on the device; no other lookup waits meanwhile."""
        with self._backend.current():
            if not self._closed:
                self._pool.drain(self._held_stream().handle)

    def retire(self) -> None:
        """Take no more lookups, and wait for those at work; graphs that captured one go on."""
        with self._capturing:
            self._closed = True
            held = self._own_stream
        if held is not None:  # also in a second call, which finishes what an interrupted one left
            with self._backend.current():
                self._pool.close(held.handle)

    def close(self) -> None:
        """``retire``, and free all memory. No graph that captured a lookup may run any more."""
        self.retire()
        with self._capturing, self._backend.current():
            if self._own_stream is None:
                return
            while self._captured:
                self._captured[-1].release(self._own_stream.handle)
                self._captured.pop()
            self._own_stream = None
