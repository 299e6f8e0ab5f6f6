"""Lookups of one cache: raw addresses and streams. ``cache.EmbeddingCache`` says what they do for callers.

A lookup is mostly like one before on its stream: the same shape, with the same workspace. Then it is started in one
step (``_start_prepared``); everything else is done batch by batch (``_batches``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from time import perf_counter_ns
from typing import Any

import numpy as np

from hps_numba.cache.call_times import CallTimes
from hps_numba.cache.gathering import GATHERED_FROM, GatheredMisses
from hps_numba.cache.host_arrays import contiguous_keys, float32_output
from hps_numba.cache.kernel_set import LISTED_LOOKUP, LOOKUP, KernelKey, KernelSet
from hps_numba.cache.launch_plan import AnswerForm, LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.residency import Residency
from hps_numba.cache.shares import ALONE
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.staging import NEVER, StagedMisses
from hps_numba.cache.state import CacheState
from hps_numba.cache.version_switch import StandIns, VersionSwitch
from hps_numba.cache.workspace import Workspace
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.errors import CapacityError
from hps_numba.kernels.dtypes import ELEMENT_BYTES, KEY_BYTES
from hps_numba.kernels.layouts.cache import MAX_BATCH, WORKSPACE_ABSENT

__all__ = ["Lookups"]


class Lookups:
    """Lookups of one cache.

    Args:
        misses: for batches whose missed rows host threads gather, if there are such.
        gathered: for batches of which they gather a part.
        reading: gives a block in which the host store frees nothing that this thread reads.
        times: of calls of ``lookup``, except for those with an absent list, which their callers go on with.

    Attributes:
        staged_from: keys of the smallest batch that may be staged.
        gathered_from: keys of the smallest batch whose missed rows the host may help to bring.

    Thread safety: all methods.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        kernels: KernelSet,
        residency: Residency,
        plan: LaunchPlan,
        workspaces: WorkspaceSet,
        misses: StagedMisses | None,
        gathered: GatheredMisses | None,
        switch: VersionSwitch,
        reading: Callable[[], AbstractContextManager[object]],
        times: CallTimes,
    ) -> None:
        self._geometry, self._state, self._lifecycle, self._kernels = geometry, state, lifecycle, kernels
        self._residency, self._plan, self._workspaces, self._misses = residency, plan, workspaces, misses
        self._gathered = gathered
        self._switch, self._reading, self._times = switch, reading, times
        self._backend, self._pool, self._large_batch = kernels.backend, workspaces.pool, kernels.large_batch
        self._on_device = kernels.backend.ordinal is not None
        self.staged_from = NEVER if misses is None else 1
        self.gathered_from = NEVER if gathered is None else GATHERED_FROM

    def lookup(
        self,
        keys: int,
        n: int,
        out: int,
        stream: int,
        key_form: str = "int64",
        out_type: str = "float32",
        capturing: bool | None = None,
        absent_list: int = 0,
    ) -> None:
        """``EmbeddingCache.lookup``."""
        times = self._times
        since = perf_counter_ns() if next(times.due) and not absent_list else 0
        self._lifecycle.begin()
        if absent_list and n > MAX_BATCH:
            raise CapacityError(
                f"{self._geometry.name}: lookup with a list of absent keys: expected at most {MAX_BATCH} keys, got {n}"
            )
        staged = n >= self.staged_from and self._can_stage(stream, capturing)
        staged = staged or (n >= self.gathered_from and self._host_may_help(n) and self._can_stage(stream, capturing))
        if self._kernels.one_step and not staged and capturing is None and 0 < n <= MAX_BATCH and not absent_list:
            listed = n >= self._residency.lists_missed_from and self._plan.reads_in_order
            shape = (LISTED_LOOKUP if listed else LOOKUP, key_form, out_type, out % 16 == 0, n < self._large_batch)
            start = self._start_prepared if self._on_device else self._start_on_cpu
            if self._pool.reuse(stream, n, start, shape, keys, n, out, stream):
                if since:
                    times.end(since)
                return
        self._start_unprepared(keys, n, out, stream, key_form, out_type, capturing, absent_list, staged)
        if since:
            times.end(since)

    def _start_unprepared(
        self,
        keys: int,
        n: int,
        out: int,
        stream: int,
        key_form: str,
        out_type: str,
        capturing: bool | None,
        absent_list: int,
        staged: bool,
    ) -> None:
        """Look up batch by batch: unlike the batches before, captured by a graph, listed, or with the help of the host."""
        with self._backend.current():
            if n == 0:
                if absent_list:
                    self._backend.fill(absent_list, 0, 8, stream)
                return
            if capturing is None:
                capturing = not staged and self._backend.is_capturing(stream)
            if capturing:
                self._workspaces.use(True, stream, self._batches, keys, n, out, stream, key_form, out_type, absent_list)
            else:
                self._use_workspace(keys, n, out, stream, key_form, out_type, absent_list, staged)

    def _use_workspace(
        self, keys: int, n: int, out: int, stream: int, key_form: str, out_type: str, absent_list: int, staged: bool
    ) -> None:
        """Look up with a workspace of the pool; during a switch of versions the stand-in does."""
        batch = (keys, n, out, stream, key_form, out_type, absent_list)
        done: list[bool] = []

        def ask(stand_ins: StandIns) -> None:
            stand_ins[self._state.address].lookups.lookup(*batch[:6], False, absent_list)

        while not self._switch.answer(ask):
            self._workspaces.use(False, stream, self._unless_switching, done, *batch, staged)
            if done:
                break

    def _unless_switching(self, workspace: Workspace, done: list[bool], *batch: Any) -> None:
        """``_batches``, unless a switch of versions has begun before the workspace was claimed; ``done`` tells."""
        if self._switch.active is None:
            if not self._answer_alone(workspace, *batch):
                self._batches(workspace, *batch)
            done.append(True)

    def _answer_alone(
        self,
        workspace: Workspace,
        keys: int,
        n: int,
        out: int,
        stream: int,
        key_form: str,
        out_type: str,
        absent_list: int,
        staged: bool,
    ) -> bool:
        """Answer a batch without an insertion, if all rows are here; False, with nothing done, if one may have to follow.

        A key that a writer is at work on is answered from the host store. If it is in its alternate set, an insertion would put
        it into its primary one too, which is full, and evict another: then not all rows would be here any more.
        """
        listed = bool(absent_list) or workspace.lists_absent
        if not self._residency.single_kernel or n > MAX_BATCH or listed or staged:
            return False
        if n > workspace.limit:
            workspace.reserve(n, False, self._state.stream)
        self._kernels.finishing()  # there when a lookup needs it, as others may wait then
        form = (key_form, out_type, out % 16 == 0)
        self._plan.start_answer(LOOKUP, form, keys, n, out, self._state.no_lists, stream)
        return True

    def fill(self, keys: int, n: int, stream: int) -> None:
        """Insert int64 keys as a lookup would, also during a switch of versions: for whoever fills the cache."""
        self._workspaces.use(False, stream, self._batches, keys, n, 0, stream, "int64", "float32", 0)

    def _host_may_help(self, n: int) -> bool:
        """Host threads may gather missed rows of a large batch: there are many, and the device's own reads are slow; or it is
        so ordered."""
        assert self._gathered is not None
        if self._residency.complete:
            return False
        return bool(self._gathered.shares.forced) or (self._plan.needs_host and not self._gathered.skips(n))

    def _can_stage(self, stream: int, capturing: bool | None) -> bool:
        """Host threads gather what this batch misses. Never while a graph captures it: a graph cannot wait."""
        if capturing:
            return False
        with self._backend.current():
            return capturing is not None or not self._backend.is_capturing(stream)

    def _start_prepared(self, workspace: Workspace, shape: KernelKey, keys: int, n: int, out: int, stream: int) -> bool:
        if self._switch.active is not None:
            return False
        # no policy change can happen now; missed keys that are listed have to be served, even if by now all rows are here
        single = self._residency.single_kernel and shape[0] == LOOKUP
        prepared = workspace.prepared.get((shape, single))
        if prepared is None:
            with self._backend.current():
                if self._backend.is_capturing(stream):  # a kernel that fails to compile would leave the event in the graph
                    return False
                prepared = workspace.prepared[shape, single] = self._plan.prepare(workspace, shape, single, stream)
        started: bool = prepared.start(keys, n, out)
        return started

    def _start_on_cpu(self, workspace: Workspace, shape: KernelKey, keys: int, n: int, out: int, stream: int) -> bool:
        """``_start_prepared`` in a block in which the store frees nothing."""
        if self._switch.active is not None:
            return False
        with self._reading():
            single = self._residency.single_kernel and shape[0] == LOOKUP
            prepared = workspace.prepared.get((shape, single))
            if prepared is None:
                prepared = workspace.prepared[shape, single] = self._plan.prepare(workspace, shape, single, stream)
            started: bool = prepared.start(keys, n, out)
            return started

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
        form = (key_form, out_type, out % 16 == 0)
        work = self.batch if not staged else self._staged_batch if self._gathered is None else self._gathered_batch
        if n <= MAX_BATCH and not absent_list and not workspace.lists_absent:  # nearly every lookup
            if n > workspace.limit:
                workspace.reserve(n, False, self._state.stream)
            work(workspace, keys, n, out, stream, form)
            return
        workspace.reserve(min(n, MAX_BATCH), bool(absent_list), self._state.stream)
        key_bytes, out_bytes = KEY_BYTES[key_form], self._geometry.dim * ELEMENT_BYTES[out_type]
        for start in range(0, n, MAX_BATCH):
            if workspace.lists_absent:
                self._backend.fill(workspace.address + WORKSPACE_ABSENT, 0, 8, stream)
            to = out and out + start * out_bytes
            work(workspace, keys + start * key_bytes, min(MAX_BATCH, n - start), to, stream, form)
        if absent_list:
            self._backend.copy(absent_list, workspace.address + WORKSPACE_ABSENT, 8, stream)
            self._backend.copy(absent_list + 8, workspace.absent_list, 8 * n, stream)

    def batch(self, workspace: Workspace, keys: int, n: int, out: int, stream: int, form: AnswerForm) -> None:
        """Answer a batch with a workspace that has room for it, and insert what it missed.

        Args:
            keys, out: addresses.   n: 1 to ``kernels.layouts.cache.MAX_BATCH``.
        """
        name = LISTED_LOOKUP if n >= self._residency.lists_missed_from and self._plan.reads_in_order else LOOKUP
        self._plan.start_answer(name, form, keys, n, out, workspace.address, stream)
        self.end_batch(workspace, keys, n, stream, form[0])

    def _staged_batch(self, workspace: Workspace, keys: int, n: int, out: int, stream: int, form: AnswerForm) -> None:
        assert self._misses is not None
        list_misses = partial(self._plan.start_listing, form, keys, n, out, workspace.address, stream)
        try:
            self._misses.answer(list_misses, workspace, n, out, stream, out_type=form[1], aligned=form[2])
        finally:  # also after a failure: hits that are listed for the policy would stay untouched for ever
            self.end_batch(workspace, keys, n, stream, form[0])
            self._misses.end(workspace, stream)

    def _gathered_batch(self, workspace: Workspace, keys: int, n: int, out: int, stream: int, form: AnswerForm) -> None:
        assert self._gathered is not None
        share = ALONE if self._residency.complete or not workspace.own_list else self._gathered.begin(workspace, n, stream)
        if share == ALONE:
            self.batch(workspace, keys, n, out, stream, form)
            return
        self._plan.start_gathered(form, keys, n, out, workspace.address, workspace.gathering, share, stream)
        self.end_batch(workspace, keys, n, stream, form[0])

    def end_batch(self, workspace: Workspace, keys: int, n: int, stream: int, key_form: str) -> None:
        """What follows the answer of a batch."""
        if self._kernels.admits:
            self._plan.count_requests(workspace.address, key_form, keys, n, stream)
        self._plan.finish_lookup(workspace, n, stream)

    # -- arrays of the host -------------------------------------------------------------------------------------------------

    def lookup_arrays(self, keys: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """``EmbeddingCache.lookup_arrays``."""
        self._lifecycle.check_open()
        state, name = self._state, self._geometry.name
        keys = contiguous_keys(name, keys)
        out = float32_output(name, out, len(keys), self._geometry.dim)
        held = state.held_stream()
        stream = held.handle
        with self._backend.current(), state.copies_on(stream, keys) as (address,), state.buffer(out.nbytes) as room:
            self.lookup(address, len(keys), room, stream)
            self._backend.to_host(out, room, stream)
        return out

    def scatter(self, positions: np.ndarray, rows: np.ndarray, out: int, stream: int, out_type: str) -> None:
        """``EmbeddingCache.scatter``."""
        self._lifecycle.check_open()
        with self._backend.current():
            kernel, _ = self._kernels.built(("scatter_kernel", out_type))
            with self._state.copies_on(stream, positions, np.ascontiguousarray(rows, np.float32)) as (to, source):
                kernel.launch(self._backend.blocks(len(positions)), stream, to, source, len(positions), out)
                self._backend.synchronize(stream)
