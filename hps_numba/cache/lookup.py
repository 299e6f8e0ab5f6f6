"""Memory, kernels and lookups of an embedding cache: the hot path. Raw addresses and streams; ``cache`` is for callers."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hps_numba.cache.backends import LOOKUP_THREADS, OTHER_THREADS, CudaBackend, Kernel, Memory, backend_for
from hps_numba.cache.index_mirror import IndexMirror, may_mirror
from hps_numba.cache.policy_memory import PolicyMemory
from hps_numba.cache.sizing import index_sets
from hps_numba.cache.staging import MISS_PATHS, NEVER, StagedMisses, min_staged
from hps_numba.cache.store_link import StoreLink
from hps_numba.cache.workspace import Workspace, WorkspacePool, WorkspaceShape
from hps_numba.errors import CapacityError, ClosedError, ConfigError, KeyDtypeError
from hps_numba.kernels.compiler.specialize import KernelSpec
from hps_numba.kernels.dtypes import ELEMENT_BYTES, row_stride
from hps_numba.kernels.layouts.cache import (
    MAX_BATCH,
    NO_LISTS,
    SET_BYTES,
    STATE_BYTES,
    STATE_CAPACITY,
    STATE_CHANGES,
    STATE_PENDING,
    WAYS,
    WORKSPACE_ABSENT,
)
from hps_numba.kernels.policies._load import for_hits, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.host.store import HostStore

if TYPE_CHECKING:
    from hps_numba.kernels.compiler.launch import LaunchChain, PreparedLookup

__all__ = ["BY_POLICY", "KINDS", "CacheLookup"]

log = logging.getLogger(__name__)
KINDS = ("dynamic", "static", "uvm")
KEY_BYTES = {"int64": 8, "int32": 4, "uint32": 4, "checked32_in_int64": 8}
#: kernels that decide by the policy, besides those that count hits
BY_POLICY = ("insert_kernel", "insert_tables_kernel", "touch_kernel", "touch_tables_kernel", "rescore_kernel")
# from here on each lane of a warp searches for a key, below a tile does: by bytes of a row, at most 128 or more
_LARGE_BATCH, _LARGE_BATCH_OF_WIDE = 24_576, 32_768
STATE_WORDS = 13
_FIXED_WORKSPACES = 64  # small ones: streams of a fixed cache need not wait for each other


def _listing_from(device: int | None, copies: bool) -> int:
    """Keys of the smallest batch that only lists what it misses, for kernels of their own (``kernels.cache.miss_sorted``).

    ``copies``: there may be a copy of the index, which tells where rows are.
    """
    return NEVER if device is None or not copies else 131_072


def _may_miss(cache: CacheLookup | None) -> bool:
    """The cache is still there, and not known to have all rows of its store."""
    return cache is not None and not cache._fully_resident


class CacheLookup:
    """Memory of the cache of one table, its kernels, and lookups; what changes a cache stands in ``cache.EmbeddingCache``."""

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
    ) -> None:
        self._check(dim, rows, kind, row_type, buffers, store, name)
        if miss_path not in MISS_PATHS:
            raise ConfigError(f"{name}: miss_path {miss_path!r}, wanted one of {', '.join(MISS_PATHS)}")
        self.name, self.dim, self.row_type = name, dim, row_type
        self.fixed = kind != "dynamic"
        self.kind = kind
        self.large_batch = _LARGE_BATCH if 4 * dim <= 128 else _LARGE_BATCH_OF_WIDE
        self.sets = set_count or index_sets(rows, fixed=self.fixed, whole=whole)
        self.capacity = rows if self.fixed else self.sets * WAYS
        self._overflows = whole or self.fixed
        self._default = np.float32(default)
        self._store = store
        self._backend = backend_for(device)
        self._pending = 0  # address of counts of hits
        self._kernels: dict[Any, Any] = {}
        self._chains: dict[tuple[Any, ...], LaunchChain] = {}  # of pooled lookups
        self._repeats = False  # lookups can be started in one step
        self._fully_resident = False  # every row of the store is here
        self._index_mirror: IndexMirror | None = None  # where all rows are resident nothing is missed
        copies = store is not None and may_mirror(kind, whole, miss_path)
        self._may_list_from = _listing_from(device, copies)
        self._lists_missed_from = NEVER  # keys of the smallest batch that lists what it misses
        self._seen = 0, 0  # keys that had come into the store, and rows evicted here, when that was last looked at
        self.single_kernel = False  # lookups are one kernel: there is nothing that an insertion would do
        self._ready = False  # lookups may go on; before the first one and after the end they look closer
        self._used = self._closed = False
        self._captured: list[Workspace] = []
        self.in_graphs = False  # a graph captured a lookup of a group with this cache
        self._policies_of_graphs: list[PolicyMemory] = []
        self._memories: list[Memory] = []
        with self._backend.current():
            self._stream = self._backend.new_stream()
            try:
                self._allocate(pagelock)
                self._count_hits(policy)
                self._use_policy(policy, PolicyMemory(self._backend, None if self.fixed else policy, self.sets, name))
            except BaseException:
                self._release()
                raise
        self._pool = WorkspacePool(self._backend, self.new_workspace, _FIXED_WORKSPACES if self.fixed else buffers, name)
        self._control = threading.RLock()
        # kernels of the CPU hold the memory of the store as its other readers do; those of a device count themselves
        self.reading = store.reading if store is not None and device is None else nullcontext
        self._link = StoreLink(self._backend, self._state, store) if store is not None else None
        if copies and self._link is not None and store is not None:
            mine = weakref.ref(self)
            self._index_mirror = IndexMirror(self._backend, self._link, store, name, lambda: _may_miss(mine()))
        self._misses: StagedMisses | None = None
        self._staged_from = NEVER  # keys of the smallest batch that may be staged
        if store is not None and (miss_path == "staged" or (miss_path == "auto" and device is not None)):
            always, fixed = miss_path == "staged", self.fixed
            self._misses = StagedMisses(
                self._backend, self._parts, store, always=always, ways=self.capacity, fixed=fixed, default=default, name=name
            )
            self._staged_from = min_staged(miss_path)
        register_fork_reset(self)

    @staticmethod
    def _check(dim: int, rows: int, kind: str, row_type: str, buffers: int, store: HostStore | None, name: str) -> None:
        if kind not in KINDS:
            raise ConfigError(f"{name}: cache kind {kind!r}, wanted one of {', '.join(KINDS)}")
        if row_type not in ELEMENT_BYTES:
            raise ConfigError(f"{name}: rows stored as {row_type!r}, wanted one of {', '.join(ELEMENT_BYTES)}")
        for what, value, least in (("dim", dim, 1), ("rows", rows, 0), ("buffers", buffers, 1)):
            if value < least:
                raise ConfigError(f"{name}: {what} of the cache is {value}, wanted {least} or more")
        if store is not None and store.dim != dim:
            raise ConfigError(f"{name}: the cache has width {dim}, its host store {store.dim}")

    def _allocate(self, pagelock: bool) -> None:
        row_bytes = row_stride(self.dim, self.row_type)
        self._lines = self._take(self.sets * SET_BYTES, "index")
        self._rows = self._take(self.capacity * row_bytes, "rows", pinned=pagelock and self.fixed)
        self._state = self._take(STATE_BYTES, "state")
        self._backend.store_word(self._state + STATE_CHANGES, 1, self._stream)
        self._apart = self._take(STATE_BYTES, "state of queries")  # the same clock, but no host store
        self._parts = (self._lines, self._rows, self.sets, self._state)  # as kernels take them
        self._no_lists = self._state + NO_LISTS
        self._backend.store_word(self._state + STATE_CAPACITY, max(1, self.capacity), self._stream)
        self.bytes_of_rows = self.capacity * row_bytes

    def _count_hits(self, policy: Policy) -> None:
        """Have memory for the counts of hits, if a policy wants them."""
        if policy.needs_count and not self.fixed and not self._pending:
            pending = self._take(4 * self.capacity, "hits")
            self._backend.store_word(self._state + STATE_PENDING, pending, self._stream)
            self._pending = pending

    def _use_policy(self, policy: Policy, memory: PolicyMemory) -> None:
        """Let a policy decide who leaves, with memory made for it; nothing is at work."""
        counted = policy.needs_count and not self.fixed
        self.policy, self._policy_memory, self._counted, self._admits = policy, memory, counted, memory.admits
        self.workspace_shape = WorkspaceShape(
            self.dim,
            self.sets,
            lists=not self.fixed,
            counts=counted,
            lists_missed_from=self._may_list_from,
            words=memory.words,
        )
        self.new_workspace = partial(Workspace, self._backend, self.workspace_shape, self.name)
        self._own = self.new_workspace()  # of query and insert
        self._chains.clear()
        self._repeats = self._backend.ordinal is not None and not self._admits
        self._set_fully_resident(self._fully_resident)

    def _set_fully_resident(self, complete: bool) -> None:
        """Whether the cache has a row for every key of its store. Wrong for a while, it costs time and no row is wrong.

        Then a lookup has nothing to insert and, if the clock of the policy stands still meanwhile, leaves nothing to do: it is
        one kernel. The rows of keys that the store has nevertheless come from there, again and again.
        """
        if self._fully_resident and not complete and self._index_mirror is not None:
            self._index_mirror.make_later()
        self._fully_resident = complete
        self._lists_missed_from = NEVER if complete else self._may_list_from
        self.single_kernel = complete and not self._counted and not self._admits and self.policy.clock == "insertions"

    def _take(self, size: int, what: str, *, pinned: bool = False) -> int:
        allocate = self._backend.allocate_pinned if pinned else self._backend.allocate
        self._memories.append(allocate(max(1, size), f"{self.name}: cache: {what}"))
        return self._memories[-1].address

    def _release(self) -> None:
        for memory in self._memories:
            memory.release()
        self._memories.clear()
        for policy in self._policies_of_graphs:
            policy.release()

    def reset_after_fork(self) -> None:
        """In a forked child: locks are made anew; the twin begins empty, as another thread may have been changing it."""
        self._control = threading.RLock()
        if self._backend.ordinal is None and not self._closed:
            self._backend.fill(self._lines, 0, self.sets * SET_BYTES, 0)
            if self._pending:
                self._backend.fill(self._pending, 0, 4 * self.capacity, 0)
            self._policy_memory.clear(0)
            self._own = self.new_workspace()

    # -- kernels ----------------------------------------------------------------------------------------------------------

    def _answer_spec(self, name: str, key_form: str, out_type: str, aligned: bool) -> KernelSpec:
        """A kernel that writes answers of this cache; in a fixed one nothing is touched, whatever the policy."""
        return KernelSpec(
            name=name,
            dim=self.dim,
            policy=load_policy("fifo") if self.fixed else for_hits(self.policy),
            fixed=self.fixed,
            row_type=self.row_type,
            out_type=out_type,
            key_form=key_form,
            out_vector=aligned,
        )

    def _lookup_spec(self, name: str, key_form: str, out_type: str, aligned: bool, small: bool) -> KernelSpec:
        """How a kernel of the lookup is built, from what was measured (``benchmarks/device/lookup.py``).

        The limits of registers are those that the way of a hit needs. Without them the functions for misses, which stand out of
        line, would set the number for the whole kernel, and a third of the warps would fit.
        """
        spec = self._answer_spec(name, key_form, out_type, aligned)
        if not self.row_type == out_type == "float32":
            return self._typed_spec(spec, small)
        if small:
            return replace(spec, lanes=8, group=4, by_tile=True, registers=40)
        if 4 * self.dim <= 128:
            return replace(spec, lanes=4, group=16, registers=64)
        return replace(spec, lanes=8, group=8, registers=72)

    def _typed_spec(self, spec: KernelSpec, small: bool) -> KernelSpec:
        """``_lookup_spec`` where rows or answers are not float32; ``benchmarks/device/shapes.py`` tries other values."""
        if small:
            return replace(spec, lanes=8, group=4, by_tile=True, registers=40 if self.dim <= 128 else 64)
        if self.dim <= 32:
            narrow = self.row_type != "float32" and self.dim % 4 == 0 and spec.out_vector
            return replace(spec, lanes=4, group=32 if narrow else 16, registers=64)
        return replace(spec, lanes=8, group=8, registers=72)

    def _lookup_kernel(
        self, key_form: str, out_type: str, aligned: bool, small: bool, name: str = "lookup_kernel"
    ) -> tuple[Kernel, int]:
        """The kernel of the lookup, or one of its kind, and how many keys a warp of it takes."""
        key = (name, key_form, out_type, aligned, small)
        found: tuple[Kernel, int] | None = self._kernels.get(key)
        if found is None:
            spec = self._lookup_spec(*key)
            found = self._kernels[key] = self._backend.kernel(spec), spec.group
        return found

    # for several caches of one kin together, by ``cache.group``

    @property
    def fusion_key(self) -> tuple[Any, ...]:
        """Caches for which this is the same can be looked up by one kernel."""
        policy = "" if self.fixed else self.policy.digest
        alone = id(self) if self._admits else 0  # whose lookups count requests besides
        return self._backend.ordinal, self.dim, self.fixed, self.row_type, policy, alone

    def tables_lookup_kernel(self, key_form: str, out_type: str, aligned: bool, small: bool) -> tuple[Kernel, int]:
        """``_lookup_kernel`` for several tables."""
        return self._lookup_kernel(key_form, out_type, aligned, small, "lookup_tables_kernel")

    def tables_kernel(self, name: str) -> Kernel:
        """``touch_tables_kernel`` or ``insert_tables_kernel``."""
        return self._kernel(name)

    def described(self, workspace: Workspace | None) -> list[int]:
        """The words of a table of a group (``layouts.cache``); without a workspace, for a batch that leaves nothing to do."""
        lines, rows, sets, state = self._parts
        default = int(self._default.view(np.uint32))
        leaves, stage = (self._no_lists, 0) if workspace is None else (workspace.address, workspace.stage)
        return [lines, rows, sets, state, default, leaves, stage, 4 * self.dim, max(1, self.capacity)]

    def _kernel(self, name: str) -> Kernel:
        """Any other kernel; what it does not depend on is the same for all caches, so that they share it."""
        kernel: Kernel | None = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = self._backend.kernel(self._plain_spec(name))
        return kernel

    def _plain_spec(self, name: str) -> KernelSpec:
        by_row = name in ("insert_kernel", "insert_tables_kernel", "update_kernel", "refresh_kernel")
        by_policy = name in BY_POLICY
        return KernelSpec(
            name=name,
            dim=self.dim if by_row else 1,
            policy=self.policy if by_policy else load_policy("fifo"),
            fixed=self.fixed and by_row,
            row_type=self.row_type if by_row else "float32",
        )

    def _launch(self, name: str, tiles: int, stream: int, *args: int) -> None:
        self._kernel(name).launch(self._backend.blocks(tiles), stream, *args)

    # -- lookup: the hot path -----------------------------------------------------------------------------------------------

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
            absent_list: address of int64 ``[1 + n]``, or 0: their number, then the positions of keys found nowhere, in no
                order. For at most ``kernels.layouts.cache.MAX_BATCH`` keys.

        Raises:
            ClosedError: the cache was closed.
            CapacityError: no memory for a batch of this size, or too many keys for an absent list.
            DeviceError: the driver refused.
        """
        self.begin()
        if absent_list and n > MAX_BATCH:
            raise CapacityError(f"{self.name}: a list of absent keys of {n} keys, wanted at most {MAX_BATCH}")
        staged = n >= self._staged_from and self._is_staged(n, stream, capturing, absent_list)
        if self._repeats and not staged and capturing is None and 0 < n <= MAX_BATCH and not absent_list:
            first = "list_by_region_kernel" if self._lists(n) else "lookup_kernel"
            shape = (first, key_form, out_type, out % 16 == 0, n < self.large_batch)
            if self._pool.reuse(stream, n, self._start_prepared, shape, keys, n, out, stream):
                return
        with self._backend.current():
            if n == 0:
                if absent_list:
                    self._backend.fill(absent_list, 0, 8, stream)
                return
            if capturing is None:
                capturing = not staged and self._backend.is_capturing(stream)
            batch = (keys, n, out, stream, key_form, out_type, absent_list, staged)
            self._with_workspace(capturing, stream, self._batches, *batch)

    def _is_staged(self, n: int, stream: int, capturing: bool | None, absent_list: int) -> bool:
        """Host threads gather what this batch misses. Never while a graph captures it: a graph cannot wait."""
        if self._misses is None or capturing or not self._misses.takes(n, behind=absent_list != 0):
            return False
        with self._backend.current():
            return capturing is not None or not self._backend.is_capturing(stream)

    def _start_prepared(
        self, workspace: Workspace, shape: tuple[str, str, str, bool, bool], keys: int, n: int, out: int, stream: int
    ) -> bool:
        # now that no other policy can come in force; what lists its misses has them served, whatever came in meanwhile
        single = self.single_kernel and shape[0] == "lookup_kernel"
        prepared = workspace.prepared.get((shape, single)) or self._prepare(shape, single, workspace, stream)
        return prepared is not None and prepared.start(keys, n, out)

    def _prepare(
        self, shape: tuple[str, str, str, bool, bool], single: bool, workspace: Workspace, stream: int
    ) -> PreparedLookup | None:
        """Lookups of this shape on the stream that has the workspace, if their kernels are there."""
        found = self._kernels.get(shape)
        others = [] if single else self._kernels_after()
        serves = [] if shape[0] == "lookup_kernel" else self._serving_kernels(*shape[2:4], only_ready=True)
        if found is None or None in others or None in serves:
            return None
        kernel, group = found
        leaves = self._no_lists if single else workspace.address
        launches: list[tuple[Any, ...]] = [(1, 1, LOOKUP_THREADS, (*self._parts, 0, 0, 0, self._default, leaves))]
        if serves:
            blocks, serving = self._backend.serving_blocks, (*self._parts, self._default, leaves)
            launches += [(blocks, 1, OTHER_THREADS, (leaves,)), (blocks, 1, OTHER_THREADS, serving)]
        if not single:
            launches += self._finishing(workspace, 1)
        kernels, last = [kernel, *serves, *others], len(serves) + len(others)
        prepared = workspace.prepared[shape, single] = cast("CudaBackend", self._backend).prepared_lookup(
            kernels,
            launches,
            stream,
            workspace.event,
            group=group,
            sets=self.sets,
            capacity=self.capacity,
            touch_at=last - 1 if len(others) == 2 else 0,
            insert_at=last if others else 0,
        )
        return prepared

    def _kernels_after(self) -> list[Kernel | None]:
        """What a lookup is followed by; None for kernels that no lookup needed yet."""
        if self.fixed:
            return []
        names = ["touch_kernel", "insert_kernel"] if self._counted else ["insert_kernel"]
        return [self._kernels.get(name) for name in names]

    def _start_chain(self, workspace: Workspace, shape: tuple[Any, ...], n: int, stream: int, launch: tuple[Any, ...]) -> bool:
        """``launch``: blocks, threads and arguments of the first kernel, without the workspace, which is the last."""
        single = self.single_kernel
        chain = self._chains.get((*shape, single))
        if chain is None:
            return False
        blocks, threads, args = launch
        leaves = self._no_lists if single else workspace.address
        launches = [(blocks, 1, threads, (*args, leaves))]
        if not single:
            launches += self._finishing(workspace, n)
        return chain.start(self._backend.context, stream, workspace.event, *launches)

    def _finishing(self, workspace: Workspace, n: int) -> list[tuple[Any, ...]]:
        """``_finish`` for kernels in turn: blocks, rows, threads and arguments of each."""
        if self.fixed:
            return []
        lines, rows, sets, state = self._parts
        insertion = (lines, rows, state, workspace.stage, 4 * self.dim, workspace.address, self._ticks(n))
        finishing: list[tuple[Any, ...]] = [
            (self._backend.blocks_after(n, n if n < sets else sets), 1, OTHER_THREADS, insertion)
        ]
        if self._counted:
            finishing.insert(0, (self._backend.blocks_after(n, n), 1, OTHER_THREADS, (lines, sets, state, workspace.address)))
        return finishing

    def _keep_chain(self, shape: tuple[Any, ...], kernel: Kernel) -> None:
        """From now on pooled lookups of this shape, which begin with this kernel, can be started in one step."""
        others = self._kernels_after()
        if self._repeats and (*shape, False) not in self._chains and None not in others:
            backend = cast("CudaBackend", self._backend)
            self._chains[*shape, True] = backend.launch_chain([kernel])
            self._chains[*shape, False] = backend.launch_chain([kernel, *others])

    def _with_workspace(self, capturing: bool, stream: int, work: Callable[..., None], *args: Any) -> None:
        """Call ``work(workspace, *args)``: with one of the pool, or with one for good if a graph is to use it again."""
        if capturing:
            with self._control, self._backend.relaxed():  # beside a change of the policy
                workspace = self.new_workspace()
                self._captured.append(workspace)
                work(workspace, *args)
            return
        workspace = self._pool.acquire(stream)
        done = False
        try:
            with self.reading():
                work(workspace, *args)
            done = True
        finally:
            self._pool.release(workspace, stream, invalid=not done)

    def begin(self) -> None:
        """What every lookup begins with: the cache is open, and its store can be followed."""
        if not self._ready:
            self._enter()
        if self._link is not None and self._link.problem is not None:
            raise self._link.problem

    def _enter(self) -> None:
        """The first lookup waits for a warming that is at work; from then on the cache is in use."""
        with self._control:
            self._check_open()
            self._used = self._ready = True

    @contextmanager
    def _controlled(self) -> Iterator[None]:
        """One at a time of all that works on the stream of the cache."""
        with self._control, self._backend.current():
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.name}: the cache is closed")

    def _batches(
        self,
        workspace: Workspace,
        keys: int,
        n: int,
        out: int,
        stream: int,
        key_form: str,
        out_type: str,
        absent_list: int,
        staged: bool = False,
    ) -> None:
        built = (key_form, out_type, out % 16 == 0)
        work = self._staged_batch if staged else self._batch
        if n <= MAX_BATCH and not absent_list and not workspace.lists_absent:  # nearly every lookup
            if n > workspace.limit:
                workspace.reserve(n, False, self._stream)
            work(workspace, keys, n, out, stream, built)
            return
        workspace.reserve(min(n, MAX_BATCH), bool(absent_list), self._stream)
        key_bytes, out_bytes = KEY_BYTES[key_form], self.dim * ELEMENT_BYTES[out_type]
        for start in range(0, n, MAX_BATCH):
            if workspace.lists_absent:
                self._backend.fill(workspace.address + WORKSPACE_ABSENT, 0, 8, stream)
            to = out and out + start * out_bytes
            work(workspace, keys + start * key_bytes, min(MAX_BATCH, n - start), to, stream, built)
        if absent_list:
            self._backend.copy(absent_list, workspace.address + WORKSPACE_ABSENT, 8, stream)
            self._backend.copy(absent_list + 8, workspace.absent_list, 8 * n, stream)

    def _batch(self, workspace: Workspace, keys: int, n: int, out: int, stream: int, built: tuple[str, str, bool]) -> None:
        if self._lists(n):
            self._rows_to(out, keys, n, workspace.address, stream, built, "list_by_region_kernel")
            sort, serve = cast("list[Kernel]", self._serving_kernels(*built[1:]))
            sort.launch(self._backend.serving_blocks, stream, workspace.address)
            serve.launch(self._backend.serving_blocks, stream, *self._parts, self._default, workspace.address)
        else:
            self._rows_to(out, keys, n, workspace.address, stream, built)
        self._end_batch(workspace, keys, n, stream, built[0])

    def _lists(self, n: int) -> bool:
        """A batch of ``n`` keys only lists what it misses."""
        return n >= self._lists_missed_from and self._in_order()

    def _in_order(self) -> bool:
        """Rows of the host store are better read in the order of their addresses, if they are many."""
        return self._index_mirror is not None and self._index_mirror.scattered

    def _serving_kernels(self, out_type: str, aligned: bool, *, only_ready: bool = False) -> list[Kernel | None]:
        """The kernels that sort and serve what a batch missed and listed; ``only_ready``: None for those not used so far."""
        key = ("serve_missed_kernel", out_type, aligned)
        if only_ready:
            return [self._kernels.get("sort_missed_kernel"), self._kernels.get(key)]
        found: Kernel | None = self._kernels.get(key)
        if found is None:
            spec = self._serving_spec(out_type, aligned, counted=self._counted)
            found = self._kernels[key] = self._backend.kernel(spec)
        return [self._kernel("sort_missed_kernel"), found]

    def _serving_spec(self, out_type: str, aligned: bool, *, counted: bool) -> KernelSpec:
        """Of a policy it depends on whether that counts newcomers."""
        spec = self._answer_spec("serve_missed_kernel", "int64", out_type, aligned)
        return replace(spec, policy=load_policy("lfu" if counted else "fifo"))

    def _staged_batch(
        self, workspace: Workspace, keys: int, n: int, out: int, stream: int, built: tuple[str, str, bool]
    ) -> None:
        assert self._misses is not None
        list_misses = partial(self._rows_to, out, keys, n, workspace.address, stream, built, "list_kernel")
        try:
            self._misses.answer(list_misses, workspace, n, out, stream, built=built[1:], counted=self._counted)
        finally:  # also after a failure: hits that are listed for the policy would stay untouched for ever
            self._end_batch(workspace, keys, n, stream, built[0])
            self._misses.end(workspace, stream)

    def _end_batch(self, workspace: Workspace, keys: int, n: int, stream: int, key_form: str) -> None:
        """What follows the answer of a batch."""
        if self._admits:
            self._count_requests(workspace, keys, n, stream, key_form)
        if not self.fixed:
            self._finish(workspace, n, workspace.stage, 4 * self.dim, self._ticks(n), stream)

    def _ticks(self, n: int) -> int:
        """By how much a batch moves the clock of the policy: more for one that is large beside the cache."""
        return max(1, 4 * n // self.capacity)

    def _rows_to(
        self,
        out: int,
        keys: int,
        n: int,
        workspace: int,
        stream: int,
        built: tuple[str, str, bool],
        name: str = "lookup_kernel",
    ) -> None:
        """Write the answer of a batch and list what is to be inserted (``list_kernel``: all that the cache has not)."""
        kernel, group = self._lookup_kernel(*built, n < self.large_batch, name)
        blocks = self._backend.lookup_blocks(n, group)
        kernel.launch(blocks, stream, *self._parts, keys, n, out, self._default, workspace, threads=LOOKUP_THREADS)

    def _count_requests(
        self, workspace: Workspace, keys: int, n: int, stream: int, key_form: str, skips: int = 0, skipped: int = 0
    ) -> None:
        """Count the keys of a batch in the sketch of a policy that admits; those equal to ``skipped`` not, if it ``skips``."""
        shape = ("sketch_kernel", key_form)
        kernel = self._kernels.get(shape)
        if kernel is None:
            spec = KernelSpec(name="sketch_kernel", dim=1, policy=load_policy("fifo"), key_form=key_form, group=32)
            kernel = self._kernels[shape] = self._backend.kernel(spec)
        blocks = self._backend.blocks(-(-n // 8))  # a key a lane
        kernel.launch(blocks, stream, self._state, keys, n, int(skips != 0), skipped, workspace.address)

    def _finish(self, workspace: Workspace, n: int, source: int, stride: int, advance: int, stream: int) -> None:
        """Touch what a batch hit, if the policy counts, and insert its newcomers with the rows at ``source``."""
        if self._counted:
            touch, blocks = self._kernel("touch_kernel"), self._backend.blocks_after(n, n)
            touch.launch(blocks, stream, self._lines, self.sets, self._state, workspace.address)
        lines, rows, sets, state = self._parts
        kernel = self._kernels.get("insert_kernel") or self._kernel("insert_kernel")
        blocks = self._backend.blocks_after(0 if self._fully_resident else n, n if n < sets else sets)
        kernel.launch(blocks, stream, lines, rows, state, source, stride, workspace.address, advance)

    def close(self) -> None:
        """Wait for the lookups at work and give all memory back. No graph that captured a lookup may run any more."""
        with self._control:
            if self._closed:
                return
            self._closed, self._ready = True, False
        with self._backend.current():
            self._pool.close(self._stream)
            for workspace in (*self._captured, self._own):
                workspace.release(self._stream)
            if self._misses is not None:
                self._misses.close()
            if self._index_mirror is not None:
                self._index_mirror.close()
            if self._link is not None:
                self._link.close()
            self._policy_memory.release()
            self._release()
            self._backend.destroy_stream(self._stream)
        self._backend.close()

    def _words(self, address: int, count: int) -> np.ndarray:
        words = np.empty(count, np.int64)
        self._backend.to_host(words, address, self._stream)
        return words

    # -- arrays of the host --------------------------------------------------------------------------------------------------

    def _copies(self, *arrays: np.ndarray) -> AbstractContextManager[list[int]]:
        """Addresses of the contents of arrays where the cache lives."""
        return self._copies_on(self._stream, *arrays)

    @contextmanager
    def _copies_on(self, stream: int, *arrays: np.ndarray) -> Iterator[list[int]]:
        memories = [self._backend.copy_of(array, stream) for array in arrays]
        try:
            yield [memory.address for memory in memories]
        finally:
            for memory in memories:
                memory.release()

    @contextmanager
    def _room(self, size: int) -> Iterator[int]:
        """Address of ``size`` bytes for the results of a call."""
        memory = self._backend.allocate(size, f"{self.name}: results of a call")
        try:
            yield memory.address
        finally:
            memory.release()

    def keys_of(self, keys: np.ndarray) -> np.ndarray:
        """Contiguous keys, int64 ``[n]``.

        Raises:
            KeyDtypeError: they are something else.
        """
        if keys.dtype != np.int64 or keys.ndim != 1:
            raise KeyDtypeError(f"{self.name}: keys are {keys.dtype}{list(keys.shape)}, int64[n] is wanted")
        return np.ascontiguousarray(keys)
