"""Which kernels a batch starts, in which order and how large: one description, whoever starts them.

A sequence is a list of kernels and a list of launches beside it. It is started in one of three ways:

* ``start``: a kernel after the other, under capture by a graph and by the first call of a stream;
* ``LaunchChain``: in one step out of Python, with new arguments (pooled lookups and lookups of several tables on a device);
* ``PreparedLookup``: in one step, where only keys, their number and the address of the answer are new (lookups).

*Why three.* A call out of Python costs as much as the driver's own work, and a lookup makes six. So ``start`` costs most, and
packing some 20 arguments of each kernel is what a ``PreparedLookup`` saves beyond a ``LaunchChain``; but it holds the arguments
of one workspace, which pooled lookups, whose offsets and weights move as well, could not reuse (``compiler.launch_native``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hps_numba.cache.backends import LOOKUP_THREADS, OTHER_THREADS, CpuPreparedLookup, Kernel
from hps_numba.cache.gathering import Gathering
from hps_numba.cache.index_mirror import IndexMirror
from hps_numba.cache.kernel_set import LISTED_LOOKUP, LOOKUP, KernelKey, KernelSet
from hps_numba.cache.residency import Residency
from hps_numba.cache.shares import LEAST_ROWS
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.workspace import Workspace

if TYPE_CHECKING:
    from hps_numba.kernels.compiler.launch import PreparedLookup

__all__ = ["AnswerForm", "Launch", "LaunchPlan", "start"]

Launch = tuple[int, int, int, tuple[Any, ...]]
"""Blocks, rows of so many blocks, threads of a block, and the arguments of one kernel."""
AnswerForm = tuple[str, str, bool]
"""Form of the keys, type of the answer, and whether that is 16-byte aligned."""


def start(kernels: Sequence[Kernel], launches: Sequence[Launch], stream: int) -> None:
    """Start kernels one after the other on a stream."""
    for kernel, (blocks, rows, threads, args) in zip(kernels, launches):
        if rows == 1 and threads == OTHER_THREADS:  # the defaults, which cost less than keywords beside ``*args``
            kernel.launch(blocks, stream, *args)
        else:
            kernel.launch(blocks, stream, *args, threads=threads, rows=rows)


class LaunchPlan:
    """The launches of one cache.

    Args:
        mirror: of the host store's index, which says whether missed rows are better read in the order of their addresses.

    Thread safety: all methods; a workspace in one call at a time.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        kernels: KernelSet,
        residency: Residency,
        mirror: IndexMirror | None,
    ) -> None:
        self._backend = kernels.backend
        self._geometry, self._state, self._kernels, self._residency = geometry, state, kernels, residency
        self._mirror = mirror
        self._fixed, self._sets, self._capacity = geometry.fixed, geometry.sets, geometry.capacity
        self._kernel_args, self._stride, self._default = state.kernel_args, 4 * geometry.dim, geometry.default

    # -- the answer of a batch ----------------------------------------------------------------------------------------------

    @property
    def reads_in_order(self) -> bool:
        """Missed rows, if they are many, are better read in the order of their addresses."""
        return self._mirror is not None and self._mirror.scattered

    @property
    def needs_host(self) -> bool:
        """Missed rows, if they are many, are better brought with the help of the host (``cache.gathering``)."""
        return self._mirror is not None and self._mirror.translated

    def answer(self, name: str, group: int, keys: int, n: int, out: int, workspace: int) -> list[Launch]:
        """The launches of the kernels that answer ``n`` keys (``KernelSet.answering``).

        Args:
            name: of the first kernel.   group: keys that a warp of it takes.   keys, out, workspace: addresses.
        """
        blocks, args = self._backend.lookup_blocks(n, group), (*self._kernel_args, keys, n, out, self._default, workspace)
        lookup = blocks, 1, LOOKUP_THREADS, args
        if name != LISTED_LOOKUP:
            return [lookup]
        blocks = self._backend.serving_blocks
        serving = blocks, 1, OTHER_THREADS, (*self._kernel_args, self._default, workspace)
        return [lookup, self._locating(workspace, 0), (blocks, 1, OTHER_THREADS, (workspace,)), serving]

    def _locating(self, workspace: int, row_bytes: int) -> Launch:
        """The launch of ``locate_missed_kernel``."""
        return self._backend.serving_blocks, 1, OTHER_THREADS, (self._state.address, workspace, row_bytes)

    def start_answer(self, name: str, form: AnswerForm, keys: int, n: int, out: int, workspace: int, stream: int) -> None:
        """Write the answer of a batch and list what is to be inserted."""
        kernels, group = self._kernels.answering((name, *form, n < self._kernels.large_batch))
        start(kernels, self.answer(name, group, keys, n, out, workspace), stream)

    def start_listing(self, form: AnswerForm, keys: int, n: int, out: int, workspace: int, stream: int) -> None:
        """Write the answers that are in the cache, and list the missed keys for whoever answers them."""
        kernel, group = self._kernels.built((LISTED_LOOKUP, *form, n < self._kernels.large_batch))
        start((kernel,), self.answer(LISTED_LOOKUP, group, keys, n, out, workspace)[:1], stream)

    def start_gathered(
        self, form: AnswerForm, keys: int, n: int, out: int, workspace: int, gathering: Gathering, share: int, stream: int
    ) -> None:
        """``start_answer`` with the help of the host, which gathers so much of what is missing, in 1/65,536."""
        (lister, locator, sharer, asker, server, timer, placer), group = self._kernels.gathering(
            (*form, n < self._kernels.large_batch)
        )
        asked = gathering.begin(n, share)
        listing, _, (blocks, rows, threads, _), serving = self.answer(LISTED_LOOKUP, group, keys, n, out, workspace)
        locating = self._locating(workspace, self._stride)
        sharing = blocks, rows, threads, (workspace, share, LEAST_ROWS, asked.most)
        start((lister, locator, sharer), (listing, locating, sharing), stream)
        gathering.ask(asked, asker, stream)
        start((server,), (serving,), stream)
        gathering.copy(asked, timer, stream)
        lines, _, sets, state = self._kernel_args
        args = lines, sets, state, self._default, workspace, asked.batch
        start((placer,), ((self._backend.blocks_after(n, max(1, asked.most)), rows, threads, args),), stream)

    def start_query(self, keys: int, n: int, out: int, workspace: int, stream: int) -> None:
        """``start_answer`` of int64 keys as if there were no host store; the default is 0."""
        kernel, group = self._kernels.built((LOOKUP, "int64", "float32", True, n < self._kernels.large_batch))
        args = (*self._state.query_args, keys, n, out, np.float32(0), workspace)
        kernel.launch(self._backend.lookup_blocks(n, group), stream, *args, threads=LOOKUP_THREADS)

    # -- what follows -------------------------------------------------------------------------------------------------------

    def finishing(self, workspace: Workspace, n: int, source: int, stride: int, advance: int) -> list[Launch]:
        """The launches of the kernels that follow the answer of ``n`` keys in a dynamic cache (``KernelSet.finishing``).

        Args:
            source, stride: address of the rows to insert, and bytes from one to the next.
            advance: ticks that the batch moves the clock of the policy.
        """
        lines, rows, sets, state = self._kernel_args
        blocks = self._backend.blocks_after(0 if self._residency.complete else n, n if n < sets else sets)
        insertion = blocks, 1, OTHER_THREADS, (lines, rows, state, source, stride, workspace.address, advance)
        if not self._kernels.counted:
            return [insertion]
        touch = self._backend.blocks_after(n, n), 1, OTHER_THREADS, (lines, sets, state, workspace.address)
        return [touch, insertion]

    def ticks(self, n: int) -> int:
        """Ticks that a batch of ``n`` keys moves the clock of the policy: more if it is large beside the cache."""
        return max(1, 4 * n // self._capacity)

    def finish(self, workspace: Workspace, n: int, source: int, stride: int, advance: int, stream: int) -> None:
        """Touch what a batch hit, if the policy counts hits, and insert what it missed; arguments as for ``finishing``."""
        start(self._kernels.finishing(), self.finishing(workspace, n, source, stride, advance), stream)

    def finish_lookup(self, workspace: Workspace, n: int, stream: int) -> None:
        """``finish`` with the rows that the lookup of ``n`` keys found in the host store; nothing in a fixed cache."""
        if not self._fixed:
            ticks = max(1, 4 * n // self._capacity)
            start(self._kernels.finishing(), self.finishing(workspace, n, workspace.stage, self._stride, ticks), stream)

    def finishing_lookup(self, workspace: Workspace, n: int) -> list[Launch]:
        """The launches of ``finish_lookup``."""
        if self._fixed:
            return []
        return self.finishing(workspace, n, workspace.stage, self._stride, max(1, 4 * n // self._capacity))

    def count_requests(
        self, workspace: int, key_form: str, keys: int, n: int, stream: int, *, skips: bool = False, skipped: int = 0
    ) -> None:
        """Count the keys of a batch in the sketch of a policy that admits; not those equal to ``skipped``, if it ``skips``."""
        kernel, _ = self._kernels.built(("sketch_kernel", key_form))
        blocks = self._backend.blocks(-(-n // 8))  # a key a lane
        kernel.launch(blocks, stream, self._state.address, keys, n, int(skips), skipped, workspace)

    def rescore(self) -> None:
        """Score all rows as if they were inserted now; done when this returns."""
        state = self._state
        self._kernels.run("rescore_kernel", self._sets, state.stream, state.lines, self._sets, state.address)
        self._backend.synchronize(state.stream)

    # -- in one step --------------------------------------------------------------------------------------------------------

    def prepare(self, workspace: Workspace, shape: KernelKey, single: bool, stream: int) -> PreparedLookup | CpuPreparedLookup:
        """Lookups of a shape with a workspace, on the stream that has it.

        Args:
            shape: as ``KernelSet.answering`` takes it.   single: nothing follows the answer, and nothing is listed.
        """
        answering, group = self._kernels.answering(shape)
        lists = self._state.no_lists if single else workspace.address
        launches = self.answer(shape[0], group, 0, 1, 0, lists)
        finishing = () if single else self._kernels.finishing()
        if not single:
            launches += self.finishing_lookup(workspace, 1)
        last = len(launches) - 1
        return self._backend.prepared_lookup(
            [*answering, *finishing],
            launches,
            stream,
            workspace.event,
            group=group,
            sets=self._sets,
            capacity=self._capacity,
            touch_at=last - 1 if len(finishing) == 2 else 0,
            insert_at=last if finishing else 0,
        )
