"""Another policy for a cache that is in service: rows stay, lookups go on, scores begin anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from hps_numba.cache.lookup import BY_POLICY
from hps_numba.cache.policy_memory import PolicyMemory
from hps_numba.cache.pooling import CachePooling
from hps_numba.errors import ConfigError
from hps_numba.kernels.compiler.specialize import KernelSpec
from hps_numba.kernels.layouts.cache import STATE_INSERTED, STATE_TOLD, TICKS_OF_A_CACHE
from hps_numba.kernels.policies._load import for_hits
from hps_numba.kernels.policies._policy import Policy

__all__ = ["CachePolicy", "PolicyChange"]


class PolicyChange(NamedTuple):
    """All that a cache needs for another policy, compiled and allocated: what is left to do cannot fail for its sake."""

    policy: Policy
    kernels: dict[Any, Any]
    memory: PolicyMemory

    def release(self) -> None:
        """Give back what was taken for a change that is not made."""
        self.memory.release()


def _insertion_by(policy: Policy) -> list[str]:
    """Kernels that depend on the policy and follow a lookup."""
    return ["insert_kernel", *(["touch_kernel"] if policy.needs_count else [])]


class CachePolicy(CachePooling):
    """Changes of the policy."""

    def compile_policy(self) -> None:
        """Compile what insertion by the policy needs now, rather than with the first lookup that misses.

        Raises:
            PolicyError: a function of the policy does not compile here.
        """
        if not self.fixed:
            with self._backend.current():
                self._kernels |= {name: self._kernel_for(self.policy, name) for name in _insertion_by(self.policy)}

    def set_policy(self, policy: Policy) -> None:
        """Let another policy decide from now on who leaves; done when this returns.

        Rows stay where they are, each with the score of a row that came in alone now; the state of sets and the sketch begin
        anew. Lookups wait for the switch, which takes about as long as a pass over the index, not for compilers. Graphs that
        were captured before go on with the policy before; capture them again.

        Raises:
            ConfigError: a fixed cache, which evicts nothing.
            PolicyError: a function does not compile here.   CapacityError: no memory for what the policy remembers. In
            either case the policy before stays.
        """
        self.adopt_policy(self.prepare_policy(policy))

    def prepare_policy(self, policy: Policy) -> PolicyChange:
        """Compile and allocate what ``adopt_policy`` needs. Raises as ``set_policy``."""
        self._check_open()
        if self.fixed:
            raise ConfigError(f"{self.name}: a policy for a {self.kind} cache, which evicts nothing; wanted a dynamic one")
        with self._controlled():
            self._count_hits(policy)
        with self._backend.current():
            kernels = self._kernels_for(policy)
            return PolicyChange(policy, kernels, PolicyMemory(self._backend, policy, self.sets, self.name))

    def adopt_policy(self, change: PolicyChange) -> None:
        """Put a policy that was prepared in force."""
        try:
            with self._controlled(), self._pool.emptied(self._stream) as pool:
                self._own.release(self._stream)
                before = self._policy_memory
                self._use_policy(change.policy, change.memory)
                pool.make = self.new_workspace
                self._kernels = change.kernels
                if self._captured or self.in_graphs:
                    self._policies_of_graphs.append(before)
                else:
                    before.release()
                inserted = int(self._words(self._state + STATE_INSERTED, 1)[0])  # before its clock began to count
                self._backend.store_word(self._state + STATE_TOLD, TICKS_OF_A_CACHE * inserted, self._stream)
                self._rescore()
        except BaseException:
            if self._policy_memory is not change.memory:
                change.release()
            raise

    def _kernels_for(self, policy: Policy) -> dict[Any, Any]:
        """Kernels for a policy: those that insertion needs, and all that this cache has used so far."""
        wanted = ["rescore_kernel", *_insertion_by(policy)]
        used = [key for key in list(self._kernels) if key not in BY_POLICY]
        return {key: self._kernel_for(policy, key) for key in (*wanted, *used)}

    def _kernel_for(self, policy: Policy, key: Any) -> Any:
        """What ``_kernels`` has under a key, for another policy."""
        if isinstance(key, KernelSpec) or key[0] == "sketch_kernel":
            return self._kernels[key]
        if isinstance(key, str):
            spec = self._plain_spec(key)
            return self._backend.ready_kernel(replace(spec, policy=policy) if key in BY_POLICY else spec)
        if key[0] == "serve_missed_kernel":
            return self._backend.ready_kernel(self._serving_spec(*key[1:], counted=policy.needs_count))
        if key[0] == "pool_kernel":
            return self._backend.ready_kernel(replace(self._pool_spec(*key[1:]), policy=for_hits(policy)))
        spec = replace(self._lookup_spec(*key), policy=for_hits(policy))
        return self._backend.ready_kernel(spec), spec.group

    def _rescore(self) -> None:
        """Score all rows as newcomers; with the cache's own stream, and done when this returns."""
        self._launch("rescore_kernel", self.sets, self._stream, self._lines, self.sets, self._state)
        self._backend.synchronize(self._stream)
