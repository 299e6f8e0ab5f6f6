"""Another policy for a cache in service: rows stay, lookups go on, scores start again."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from hps_numba.cache.backends import Kernel
from hps_numba.cache.kernel_set import KernelKey, KernelSet
from hps_numba.cache.launch_plan import LaunchPlan
from hps_numba.cache.lifecycle import Lifecycle
from hps_numba.cache.policy_memory import PolicyMemory
from hps_numba.cache.residency import Residency
from hps_numba.cache.sizing import CacheGeometry
from hps_numba.cache.state import CacheState
from hps_numba.cache.workspace_set import WorkspaceSet
from hps_numba.errors import ConfigError
from hps_numba.kernels.layouts.cache import STATE_INSERTED, STATE_TOLD, TICKS_OF_A_CACHE
from hps_numba.kernels.policies._policy import Policy

__all__ = ["PolicyChange", "PolicySwitch"]


class PolicyChange(NamedTuple):
    """All that a cache needs for another policy, compiled and allocated, so that ``adopt`` does not fail for want of it."""

    policy: Policy
    kernels: dict[KernelKey, tuple[Kernel, int]]
    memory: PolicyMemory

    def release(self) -> None:
        """Free the memory of a change that is not made."""
        self.memory.release()


class PolicySwitch:
    """Changes of the policy of one cache.   Thread safety: all methods."""

    def __init__(
        self,
        geometry: CacheGeometry,
        state: CacheState,
        lifecycle: Lifecycle,
        kernels: KernelSet,
        residency: Residency,
        plan: LaunchPlan,
        workspaces: WorkspaceSet,
    ) -> None:
        self._geometry, self._state, self._lifecycle = geometry, state, lifecycle
        self._kernels, self._residency, self._plan, self._workspaces = kernels, residency, plan, workspaces

    def prepare(self, policy: Policy) -> PolicyChange:
        """``EmbeddingCache.prepare_policy``."""
        geometry, backend = self._geometry, self._kernels.backend
        self._lifecycle.check_open()
        if geometry.fixed:
            raise ConfigError(
                f"{geometry.name}: change of policy: expected a dynamic cache, got a {geometry.kind} one, which never evicts"
            )
        if policy.needs_count:
            with self._lifecycle.controlled():
                self._state.allocate_hits()
        with backend.current():
            kernels = self._kernels.made_for(policy)
            return PolicyChange(policy, kernels, PolicyMemory(backend, policy, geometry.sets, geometry.name))

    def adopt(self, change: PolicyChange) -> None:
        """``EmbeddingCache.adopt_policy``."""
        workspaces = self._workspaces
        try:
            with self._lifecycle.controlled():
                workspaces.while_empty(partial(self._adopt, change))
        except BaseException:
            if workspaces.policy_memory is not change.memory:
                change.release()
            raise

    def _adopt(self, change: PolicyChange) -> None:
        state = self._state
        self._workspaces.adopt(change.memory, counts=change.policy.needs_count)
        self._kernels.adopt(change.policy, change.kernels)
        self._residency.policy_changed()
        inserted = state.word(STATE_INSERTED)  # before its clock began to count
        state.set_word(STATE_TOLD, TICKS_OF_A_CACHE * inserted)
        self._plan.rescore()
