"""What can be simulated under a name: an algorithm with one global order, a cache policy in sets, or both."""

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

__all__ = ["BOUNDS", "Candidate", "contender", "contenders", "known_names"]

_ALGORITHMS = "hps_numba.simulate.algorithms"
_POLICIES = "hps_numba.kernels.policies"
BOUNDS = ("belady", "infinite")
_IN_SETS_ONLY = ("admit", "victim", "takes_key")  # what a policy may have that one order of dense numbers cannot carry


@dataclass(frozen=True)
class Candidate:
    """One line of a comparison.

    Attributes:
        name: of the file, the class, or as the user gave it.
        algorithm: with one order of all rows, or None.   policy: in the sets of a cache, or None.
    """

    name: str
    algorithm: Algorithm | None
    policy: Policy | None

    @property
    def is_associative(self) -> bool:
        """It can be simulated fully associative."""
        return self.algorithm is not None or (
            self.policy is not None and not any(getattr(self.policy, what, None) for what in _IN_SETS_ONLY)
        )

    @property
    def is_bound(self) -> bool:
        """No cache does better; not a policy that one could deploy."""
        return self.algorithm is not None and self.algorithm.bound

    def associative(self, batch: int, advance: int) -> Algorithm:
        """The algorithm; a policy is given time as in a cache whose clock moves by ``advance`` after each ``batch`` keys.

        Raises:
            PolicyError: it is defined in sets only.
        """
        if self.algorithm is not None:
            return self.algorithm
        if self.policy is None or not self.is_associative:
            raise PolicyError(f"policy {self.name!r}: is defined within a set, wanted geometry 'gpu'")
        return scored(self.policy, batch, advance)


def known_names() -> tuple[list[str], list[str]]:
    """Names of algorithms with one global order, and of cache policies."""
    return plugins.names(_ALGORITHMS), plugins.names(_POLICIES)


def contender(policy: Any, *, allow_code: bool = False) -> Candidate:
    """What a name, a class or a ``Policy`` stands for.

    Args:
        policy: the name of an algorithm or of a built-in cache policy, ``package.module:NAME``, ``file.py:NAME``, a class
            with ``first`` and ``touch``, or a ``Policy``.
        allow_code: a file may be run.

    Raises:
        PolicyError: unknown, or it breaks the contract of a policy.
    """
    if not isinstance(policy, str):
        made = as_policy(policy)
        return Candidate(made.name, None, made)
    if plugins.is_reference(policy):
        return Candidate(policy.rpartition(":")[2], None, load_policy(policy, allow_code=allow_code, folder=Path.cwd()))
    algorithms, policies = known_names()
    if policy not in algorithms and policy not in policies:
        known = ", ".join(sorted({*algorithms, *policies}))
        raise PolicyError(f"policy {policy!r} is unknown, known are {known}; one of your own is file.py:NAME or module:NAME")
    return Candidate(
        policy,
        plugins.load(_ALGORITHMS, policy, error=PolicyError) if policy in algorithms else None,
        load_policy(policy) if policy in policies else None,
    )


def contenders(policies: Sequence[Any], *, allow_code: bool = False) -> list[Candidate]:
    """Each ``contender`` once, names made unique.

    Raises:
        PolicyError: as ``contender``, or two different policies have the same name.
    """
    found: dict[str, Candidate] = {}
    for policy in policies:
        one = contender(policy, allow_code=allow_code)
        if one.name in found and found[one.name] != one:
            raise PolicyError(f"policy {one.name!r} came twice and differs, wanted one of each name")
        found[one.name] = one
    if not found:
        raise PolicyError("policies: none came, wanted one or more")
    return list(found.values())
