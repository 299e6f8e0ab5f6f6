"""What a policy keeps besides the scores: a state for each set, and a sketch of how often keys were requested."""

from __future__ import annotations

from hps_numba.cache.backends import Backend, Memory
from hps_numba.errors import HpsError
from hps_numba.kernels.cache.sketch import sketch_shape
from hps_numba.kernels.layouts.cache import (
    WAYS,
    WORKSPACE_SET_STATES,
    WORKSPACE_SKETCH,
    WORKSPACE_SKETCH_SHIFT,
    WORKSPACE_SKETCH_WORDS,
)
from hps_numba.kernels.policies._policy import Policy

__all__ = ["PolicyMemory", "policy_bytes"]


def policy_bytes(policy: Policy, sets: int) -> int:
    """Bytes that a policy takes in a cache of so many sets, counts of hits included."""
    counts = 4 * WAYS * sets if policy.needs_count else 0
    sketch = 8 * sketch_shape(sets * WAYS)[0] if policy.admit is not None else 0
    return counts + 4 * policy.state * sets + sketch


class PolicyMemory:
    """Memory of one policy in one cache; none for a policy that only scores.

    Workspaces hold its addresses, and not the state of the cache: so a graph that was captured under another policy goes on
    with the memory of that one, which is kept as long as the graph may run.

    Args:
        sets: of the cache.   policy: None for a cache that evicts nothing.

    Raises:
        CapacityError: the memory is not there.
    """

    def __init__(self, backend: Backend, policy: Policy | None, sets: int, name: str) -> None:
        self._backend = backend
        self._parts: list[tuple[Memory, int]] = []
        #: words of the header of a workspace
        self.words: dict[int, int] = {}
        self.admits = policy is not None and policy.admit is not None
        try:
            if policy is not None and policy.state:
                self.words[WORKSPACE_SET_STATES] = self._take(4 * policy.state * sets, f"{name}: cache: state of sets")
            if self.admits:
                words, shift = sketch_shape(sets * WAYS)
                self.words[WORKSPACE_SKETCH] = self._take(8 * words, f"{name}: cache: frequency sketch")
                self.words |= {WORKSPACE_SKETCH_WORDS: words, WORKSPACE_SKETCH_SHIFT: shift}
        except HpsError:
            self.release()
            raise

    def _take(self, size: int, purpose: str) -> int:
        memory = self._backend.allocate(size, purpose)
        self._parts.append((memory, size))
        return memory.address

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return sum(size for _, size in self._parts)

    def clear(self, stream: int) -> None:
        """Set everything to 0, as at the start."""
        for memory, size in self._parts:
            self._backend.fill(memory.address, 0, size, stream)

    def release(self) -> None:
        """Free the memory; again does nothing."""
        for memory, _ in self._parts:
            memory.release()
        self._parts.clear()
