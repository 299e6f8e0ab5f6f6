"""Pooled lookups of one cache: one row for each bag of keys, summed in the kernel that finds the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hps_numba.cache.call_times import CallTimes
from hps_numba.cache.host_arrays import contiguous_keys, contiguous_offsets, contiguous_weights
from hps_numba.cache.kernel_set import KernelKey, KernelSet
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.residency import Residency
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.version_switch import StandIns, VersionSwitch
from hps_numba.cache.workspace import Workspace
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.errors import CapacityError, ConfigError
from hps_numba.kernels.layouts.cache import MAX_BATCH
from hps_numba.kernels.layouts.pooling import (
    COMBINERS,
    PADDED,
    THREADS,
    pool_blocks,
    pool_run,
)

__all__ = ["Pooling"]


class Pooling:
    """Lookups whose rows are combined bag by bag; the cache is left as ``Lookups.lookup`` of the same keys would leave it.

    Args:
        times: of calls of ``pool``.

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
        switch: VersionSwitch,
        times: CallTimes,
    ) -> None:
        self._switch, self._times = switch, times
        self._geometry, self._state, self._lifecycle, self._kernels = geometry, state, lifecycle, kernels
        self._residency, self._plan, self._workspaces = residency, plan, workspaces
        self._backend, self._pool, self._context = kernels.backend, workspaces.pool, kernels.backend.context

    def pool(
        self,
        keys: int,
        n: int,
        offsets: int,
        bags: int,
        out: int,
        stream: int,
        combiner: str = "sum",
        weights: int = 0,
        options: int = 0,
        padding: int = 0,
        key_form: str = "int64",
        out_type: str = "float32",
        capturing: bool | None = None,
    ) -> None:
        """``EmbeddingCache.pool``."""
        since = self._times.begin()
        self._lifecycle.begin()
        geometry = self._geometry
        number = COMBINERS.get(combiner)
        if number is None:
            raise ConfigError(f"{geometry.name}: combiner: expected one of {', '.join(COMBINERS)}, got {combiner!r}")
        if n > MAX_BATCH:
            raise CapacityError(f"{geometry.name}: pooled lookup: expected at most {MAX_BATCH} keys, got {n}")
        if bags == 0:
            return
        run = pool_run(bags, n, geometry.dim)
        blocks = pool_blocks(bags, geometry.dim, run)
        batch = (keys, n, offsets, bags, run, weights, out, number, geometry.default, options, padding)
        args = (*self._state.kernel_args, *batch)
        shape = ("pool_kernel", key_form, out_type, out % 16 == 0)
        repeats = self._kernels.chains and capturing is None and n
        if not repeats or not self._pool.reuse(stream, n, self._start_chain, shape, n, blocks, args, stream):

            def ask(stand_ins: StandIns) -> None:
                stand_ins[self._state.address].pooling.pool(
                    keys, n, offsets, bags, out, stream, combiner, weights, options, padding, key_form, out_type, False
                )

            self._start_unprepared(ask, capturing, shape, n, blocks, args, stream)
        if since:
            self._times.end(since)

    def _start_unprepared(
        self,
        ask: Callable[[StandIns], None],
        capturing: bool | None,
        shape: KernelKey,
        n: int,
        blocks: int,
        args: tuple[Any, ...],
        stream: int,
    ) -> None:
        """Start the kernels one after the other; during a switch of versions, ``ask`` the stand-in."""
        with self._backend.current():
            if capturing is None:
                capturing = self._backend.is_capturing(stream)
            if capturing:
                self._workspaces.use(True, stream, self._batch, shape, n, blocks, args, stream)
                return
            done: list[bool] = []
            while not self._switch.answer(ask):
                self._workspaces.use(False, stream, self._unless_switching, done, shape, n, blocks, args, stream)
                if done:
                    break

    def _unless_switching(self, workspace: Workspace, done: list[bool], *batch: Any) -> None:
        """``_batch``, unless a switch of versions has begun before the workspace was claimed; ``done`` tells."""
        if self._switch.active is None:
            self._batch(workspace, *batch, inserts=not self._residency.single_kernel)
            done.append(True)

    def _start_chain(
        self, workspace: Workspace, shape: KernelKey, n: int, blocks: int, args: tuple[Any, ...], stream: int
    ) -> bool:
        chains = self._kernels.chains.get(shape)
        if chains is None or self._switch.active is not None:
            return False
        single, whole = chains
        if self._residency.single_kernel:
            launch = blocks, 1, THREADS, (*args, self._state.no_lists)
            return single.start(self._context, stream, workspace.event, launch)
        launch = blocks, 1, THREADS, (*args, workspace.address)
        return whole.start(self._context, stream, workspace.event, launch, *self._plan.finishing_lookup(workspace, n))

    def _batch(
        self,
        workspace: Workspace,
        shape: KernelKey,
        n: int,
        blocks: int,
        args: tuple[Any, ...],
        stream: int,
        *,
        inserts: bool = True,
    ) -> None:
        """Start all kernels of a batch; ``inserts``: as in ``lookup._answer_alone``, not if all rows are here."""
        workspace.reserve(max(n, 1), False, self._state.stream)
        kernel, _ = self._kernels.built(shape)
        kernel.launch(blocks, stream, *args, workspace.address if inserts else self._state.no_lists, threads=THREADS)
        if not n:
            return
        if not inserts:
            self._kernels.chain(shape)
            return
        if self._kernels.admits:
            keys, options, padding = args[4], args[-2], args[-1]
            skips = options & PADDED != 0
            self._plan.count_requests(workspace.address, shape[1], keys, n, stream, skips=skips, skipped=padding)
        self._plan.finish_lookup(workspace, n, stream)
        self._kernels.chain(shape)

    def pool_arrays(
        self, keys: np.ndarray, offsets: np.ndarray, weights: np.ndarray | None = None, combiner: str = "sum"
    ) -> np.ndarray:
        """``EmbeddingCache.pool_arrays``."""
        self._lifecycle.check_open()
        state, name = self._state, self._geometry.name
        keys = contiguous_keys(name, keys)
        given = [keys, contiguous_offsets(name, offsets, len(keys))]
        if weights is not None:
            given.append(contiguous_weights(name, weights, len(keys)))
        out = np.empty((len(offsets) - 1, self._geometry.dim), np.float32)
        held = state.held_stream()
        stream = held.handle
        with self._backend.current(), state.copies_on(stream, *given) as addresses, state.buffer(out.nbytes) as room:
            at, starts, factors = (*addresses, 0)[:3]
            self.pool(at, len(keys), starts, len(out), room, stream, combiner, factors)
            self._backend.to_host(out, room, stream)
        return out
