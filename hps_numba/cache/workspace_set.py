"""The workspaces of one cache: lent from a pool, kept for graphs, one for calls that wait; and the memory of the policy.

Workspaces hold the addresses of the policy's memory, so a policy change replaces all of them. A graph that was captured before
goes on with its workspace and the memory of the policy of that time, which live as long as the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

from hps_numba.cache.backends import Backend
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.policy_memory import PolicyMemory
from hps_numba.cache.workspace import Workspace, WorkspaceShape
from hps_numba.cache.workspace_pool import WorkspacePool
from hps_numba.runtime.fork import register_fork_reset

__all__ = ["WorkspaceSet"]


class WorkspaceSet:
    """What batches of one cache work with.

    Args:
        stream: of the cache, used for waits.   shape: of each workspace, without the words of the policy.
        memory: of the policy.   limit: most batches of the pool at a time.
        reading: gives a block in which the host store frees nothing that this thread reads.

    Attributes:
        pool: of workspaces for lookups.   own: the workspace of calls that wait.   captured: those of graphs.
        policy_memory: of the policy in force.   of_graphs: of policies before, which graphs may still use.
        in_graphs: a graph captured a lookup of a group with this cache.

    Thread safety: ``use`` and ``bytes`` from any thread; the others while no lookup is at work.
    """

    def __init__(
        self,
        backend: Backend,
        lifecycle: Lifecycle,
        stream: int,
        shape: WorkspaceShape,
        memory: PolicyMemory,
        *,
        limit: int,
        reading: Callable[[], AbstractContextManager[object]],
        name: str,
    ) -> None:
        self._backend, self._lifecycle, self._stream = backend, lifecycle, stream
        self._reading, self._name = reading, name
        self.captured: list[Workspace] = []
        self.of_graphs: list[PolicyMemory] = []
        self.in_graphs = False
        self._use_shape(shape, memory)
        self.own = self.new()
        self.pool = WorkspacePool(self.new, limit, name)
        register_fork_reset(self)

    def _use_shape(self, shape: WorkspaceShape, memory: PolicyMemory) -> None:
        self.shape, self.policy_memory = replace(shape, words=memory.words), memory
        self.new = partial(Workspace, self._backend, self.shape, self._name)
        self._new_captured = partial(Workspace, self._backend, self.shape.captured(), self._name)

    def reset_after_fork(self) -> None:
        """In a forked child, start the memory of the policy and the own workspace again: another thread may have used them."""
        if self._backend.ordinal is None and not self._lifecycle.closed:
            self.policy_memory.clear(0)
            self.own = self.new()

    def while_empty(self, change: Callable[[], object]) -> None:
        """Call ``change`` while no workspace is lent and all work with them is done; lookups that come sleep until it ends."""
        self.pool.while_empty(self._stream, change)

    def adopt(self, memory: PolicyMemory, *, counts: bool) -> None:
        """Use the memory of another policy; inside ``while_empty``. ``counts``: it counts hits."""
        self.own.release(self._stream)
        before = self.policy_memory
        self._use_shape(replace(self.shape, counts=counts), memory)
        self.own, self.pool.make = self.new(), self.new
        if self.captured or self.in_graphs:
            self.of_graphs.append(before)
        else:
            before.release()

    def use(self, capturing: bool, stream: int, work: Callable[..., None], *args: Any) -> None:
        """Call ``work(workspace, *args)``: with one of the pool, or, for a graph, with one that lives as long as the cache.

        Raises:
            ClosedError: the cache was closed.   Otherwise as ``work``.
        """
        if capturing:
            with self._lifecycle.lock, self._backend.relaxed():  # not during a change of the policy
                self._lifecycle.check_open()
                workspace = self._new_captured()
                self.captured.append(workspace)
                work(workspace, *args)
            return
        self.pool.lend(stream, self._work, work, *args)

    def _work(self, workspace: Workspace, work: Callable[..., None], *args: Any) -> None:
        with self._reading():
            work(workspace, *args)

    @property
    def gathering_bytes(self) -> int:
        """Bytes that gatherings take beside the workspaces, where the cache lives."""
        gatherings = [workspace.gathering for workspace in self.pool.workspaces]
        return sum(gathering.bytes for gathering in gatherings if gathering is not None)

    @property
    def has_graphs(self) -> bool:
        """A graph may look up with this cache at any time."""
        return self.in_graphs or bool(self.captured)

    def drain(self) -> None:
        """Wait until every workspace that is lent now is back, and for the work with all of them; nobody else waits."""
        self.pool.drain(self._stream)

    @property
    def bytes(self) -> int:
        """Bytes of all workspaces but those of graphs."""
        return self.pool.bytes + self.own.bytes

    @property
    def captured_bytes(self) -> int:
        """Bytes of what graphs keep: their workspaces, and the memory of policies that were in force before."""
        workspaces = sum(workspace.bytes for workspace in tuple(self.captured))
        return workspaces + sum(memory.bytes for memory in tuple(self.of_graphs))

    def close(self) -> None:
        """Wait for lookups at work, and free the workspaces."""
        self.pool.close(self._stream)
        for workspace in (*self.captured, self.own):
            workspace.release(self._stream)

    def release_policies(self) -> None:
        """Free the memory of all policies."""
        for memory in (self.policy_memory, *self.of_graphs):
            memory.release()
