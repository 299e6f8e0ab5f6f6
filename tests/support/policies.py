"""Policies of the tests: built in, from the page on policies, and pinned keys."""

from __future__ import annotations

from typing import Any

from support.docs import block_with

from hps_numba.kernels.policies._load import as_policy, load_policy
from hps_numba.kernels.policies._policy import Policy
from hps_numba.kernels.policies.pinned import pinned

PINS = (0, 3, 5, 11, 12, 40, -1, 2**63 - 1)


def own_policy(name: str) -> Policy:
    """One of those that the page on policies shows; so its kernels are compiled once for these tests and those of the page."""
    scope: dict[str, Any] = {}
    exec(block_with("policies.md", f"class {name}:").partition("\n\n\nserver")[0], scope)
    return as_policy(scope[name])


def policy_for(name: str) -> Policy:
    """A policy by its file; pinned with keys of the tests, as it has none by itself."""
    if name == "SecondChance":
        return own_policy("SecondChance")
    return as_policy(pinned(PINS, "lru")) if name == "pinned" else load_policy(name)
