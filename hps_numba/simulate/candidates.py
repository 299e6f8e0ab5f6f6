"""What can be simulated under a name: a fully associative algorithm, a cache policy that works in sets, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps_numba import plugins
from hps_numba.errors import PolicyError
from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.simulate.algorithms._algorithm import Algorithm
from hps_numba.simulate.algorithms._scored import scored

__all__ = ["BOUNDS", "Candidate", "find_candidate", "find_candidates", "known_names"]

_ALGORITHMS = "hps_numba.simulate.algorithms"
_POLICIES = "hps_numba.kernels.policies"
BOUNDS = ("belady", "infinite")
_SET_ONLY = ("admit", "victim", "takes_key")  # what a fully associative simulation over dense numbers cannot express


@dataclass(frozen=True)
class Candidate:
    """One line of a comparison.

    Attributes:
        name: of the file or the class, or as the user gave it.
        algorithm: the fully associative one, or None.   policy: that of a set-associative cache, or None.
    """

    name: str
    algorithm: Algorithm | None
    policy: Policy | None

    @property
    def is_associative(self) -> bool:
        """It can be simulated fully associative."""
        return self.algorithm is not None or (
            self.policy is not None and not any(getattr(self.policy, what, None) for what in _SET_ONLY)
        )

    @property
    def is_bound(self) -> bool:
        """It is an upper bound on all policies, not one that can be deployed."""
        return self.algorithm is not None and self.algorithm.bound

    def associative(self, batch: int, advance: int) -> Algorithm:
        """The algorithm; for a policy, one whose clock advances by ``advance`` ticks after each ``batch`` keys, as in a cache.

        Raises:
            PolicyError: it is defined within a set only.
        """
        if self.algorithm is not None:
            return self.algorithm
        if self.policy is None or not self.is_associative:
            raise PolicyError(f"geometry: expected 'gpu' for policy {self.name!r}, which is defined within a set")
        return scored(self.policy, batch, advance)


def known_names() -> tuple[list[str], list[str]]:
    """Names of the fully associative algorithms, and of the cache policies."""
    return plugins.names(_ALGORITHMS), plugins.names(_POLICIES)


def find_candidate(policy: Any, *, allow_code: bool = False) -> Candidate:
    """The candidate that a name, a class or a ``Policy`` refers to.

    Args:
        policy: the name of an algorithm or of a built-in cache policy, ``package.module:NAME``, ``file.py:NAME``, a class
            with ``first`` and ``touch``, or a ``Policy``.
        allow_code: permit ``module:NAME`` and ``file.py:NAME``, which are run.

    Raises:
        PolicyError: it is unknown, or breaks the contract of a policy.
    """
    if not isinstance(policy, str):
        loaded = as_policy(policy)
        return Candidate(loaded.name, None, loaded)
    if plugins.is_reference(policy):
        return Candidate(policy.rpartition(":")[2], None, load_policy(policy, allow_code=allow_code, folder=Path.cwd()))
    algorithms, policies = known_names()
    if policy not in algorithms and policy not in policies:
        known = ", ".join(sorted({*algorithms, *policies}))
        raise PolicyError(f"policy: expected one of {known}, file.py:NAME or module:NAME, got {policy!r}")
    return Candidate(
        policy,
        plugins.load(_ALGORITHMS, policy, error=PolicyError) if policy in algorithms else None,
        load_policy(policy) if policy in policies else None,
    )


def find_candidates(policies: Any, *, allow_code: bool = False) -> list[Candidate]:
    """The candidates of one or several policies (see ``find_candidate``), each once.

    Raises:
        PolicyError: as ``find_candidate``; or there are none; or two different policies have the same name.
    """
    several = isinstance(policies, Sequence) and not isinstance(policies, str)
    found: dict[str, Candidate] = {}
    for policy in policies if several else [policies]:
        candidate = find_candidate(policy, allow_code=allow_code)
        if found.setdefault(candidate.name, candidate) != candidate:
            raise PolicyError(f"policies: expected one policy for each name, got two different ones called {candidate.name!r}")
    if not found:
        raise PolicyError("policies: expected one or more, got none")
    return list(found.values())
