"""Cache policies found by name, checked, and made from classes (``_policy`` says what a policy is)."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from hps_numba import plugins
from hps_numba.config.arguments import as_flag, as_optional, as_path
from hps_numba.config.messages import show
from hps_numba.errors import PolicyError
from hps_numba.kernels.policies._functions import broken, described, is_simple, isolated
from hps_numba.kernels.policies._policy import MAX_STATE, OPTIONAL, PARAMETERS, Policy
from hps_numba.kernels.policies._probes import check_compiled, check_plain

__all__ = ["as_policy", "for_hits", "load_policy", "policy_with"]

_PACKAGE = "hps_numba.kernels.policies"
_NEEDED = ("first", "touch")
_CLOCKS = ("calls", "insertions")
_KNOWN = (*PARAMETERS, "clock", "needs_count", "state")


def load_policy(name: str, *, allow_code: bool = False, folder: Path | None = None) -> Policy:
    """The policy called ``name``: built-in (by file name), ``package.module:NAME``, or ``file.py:NAME`` of the user's.

    Args:
        allow_code: ``name`` may be a file, which is executed.
        folder: where a relative file is looked up after the working directory.

    Raises:
        PolicyError: no such policy, or it breaks the contract; one line with function, line, what was expected and found.
    """
    if not isinstance(name, str):
        known = ", ".join(plugins.names(_PACKAGE))
        raise PolicyError(f"cache policy: expected one of {known} or module:NAME, got {None if name is None else show(name)}")
    allow_code = as_flag(allow_code, "allow_code")
    folder = as_optional(folder, as_path, "folder")
    kind = plugins.load(_PACKAGE, name, allow_code=allow_code, folder=folder, error=PolicyError)
    # built-in ones are compiled by their tests: starting up does not wait for that again
    return _policy_of(kind, name, compiled=plugins.is_reference(name))


def as_policy(kind: Any, *, name: str | None = None) -> Policy:
    """The policy that a class describes, e.g. one written in a notebook; a Policy is returned as it is.

    Globals that its functions use are read now: after a change of one, call ``as_policy`` again.

    Raises:
        PolicyError: it breaks the contract.
    """
    if name is not None and not isinstance(name, str):
        raise PolicyError(f"name: expected a text or None, got {show(name)}")
    return _policy_of(kind, name or getattr(kind, "__name__", None) or type(kind).__name__, compiled=True)


def for_hits(policy: Policy) -> Policy:
    """The part of a policy that kernels use which only touch rows: policies that touch alike share them."""
    if policy.needs_count:  # a kernel of its own touches
        return load_policy("lfu")
    first = load_policy("fifo").first
    digest = _digest({"first": first, "touch": policy.touch}, False, 0, "calls")
    return Policy(policy.name, first, policy.touch, False, digest)


def policy_with(kind: type, **constants: Any) -> type:
    """A class like ``kind`` whose functions, and those they call, see other values of the globals in ``constants``.

    So one file serves for policies that differ in a number, a tuple of keys or another policy's function:
    ``policy_with(Decay, HALF_LIFE=100)``. ``clock``, ``needs_count`` and ``state`` among the constants are those of the class.

    Raises:
        PolicyError: ``kind`` is not a class. The constants are checked when the result is loaded.
    """
    if not isinstance(kind, type):
        raise PolicyError(f"policy_with: expected a class, got {show(kind)}")
    body: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    for name in ("clock", "needs_count", "state"):
        if name in constants:
            body[name] = constants.pop(name)
    body["_constants"] = {**getattr(kind, "_constants", {}), **constants}
    return type(kind.__name__, (kind,), body)


_functions: dict[str, dict[str, FunctionType]] = {}  # by digest, so that kernels made of them are found again
_compiled: set[str] = set()  # digests


def _policy_of(kind: Any, name: str, *, compiled: bool) -> Policy:
    if isinstance(kind, Policy):
        return kind
    _check_attributes(kind, name)
    constants: Mapping[str, Any] = getattr(kind, "_constants", {})
    functions: dict[str, FunctionType] = {}
    for label in PARAMETERS:
        function = _function(name, kind, label)
        if function is not None:
            functions[label] = isolated(name, function, constants)
    needs_count: bool = getattr(kind, "needs_count", False)
    state: int = getattr(kind, "state", 0)
    clock: str = getattr(kind, "clock", "calls")
    digest = _digest(functions, needs_count, state, clock)
    if digest not in _functions:
        check_plain(_made(name, functions, needs_count, state, clock, digest))
        _functions.setdefault(digest, functions)
    policy = _made(name, _functions[digest], needs_count, state, clock, digest)
    if compiled and digest not in _compiled:
        check_compiled(policy)
        _compiled.add(digest)
    return policy


def _made(name: str, functions: Mapping[str, FunctionType], needs_count: bool, state: int, clock: str, digest: str) -> Policy:
    takes_key, takes_now = (label in functions and _has_more(functions[label], label) for label in OPTIONAL)
    return Policy(
        name,
        functions["first"],
        functions["touch"],
        needs_count,
        digest,
        functions.get("admit"),
        functions.get("victim"),
        state,
        takes_key,
        takes_now,
        clock,
    )


def _has_more(function: FunctionType, label: str) -> bool:
    return function.__code__.co_argcount > len(PARAMETERS[label])


def _digest(functions: Mapping[str, Any], needs_count: bool, state: int, clock: str) -> str:
    python = sys.implementation.cache_tag or sys.version
    lines = [python, f"{needs_count} {state} {clock}"]
    for label, function in functions.items():
        lines += [label, *described(function)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


# -- what a class must look like ------------------------------------------------------------


def _signatures(label: str) -> str:
    plain = f"{label}({', '.join(PARAMETERS[label])})"
    return f"{plain} or {label}({', '.join(PARAMETERS[label])}, {OPTIONAL[label]})" if label in OPTIONAL else plain


def _check_attributes(kind: Any, name: str) -> None:
    if not isinstance(kind, type):
        raise PolicyError(f"policy {name!r}: expected a class with first and touch, got a {type(kind).__name__}")
    for attribute in dir(kind):
        if attribute not in _KNOWN and not attribute.startswith("_"):
            raise PolicyError(f"policy {name!r}: expected {', '.join(_KNOWN[:-1])} or {_KNOWN[-1]}, got {attribute!r}")
    needs_count = getattr(kind, "needs_count", False)
    if not isinstance(needs_count, bool):
        raise PolicyError(f"policy {name!r}: expected needs_count to be True or False, got {needs_count!r}")
    clock = getattr(kind, "clock", "calls")
    if clock not in _CLOCKS:
        raise PolicyError(f"policy {name!r}: expected clock to be {' or '.join(map(repr, _CLOCKS))}, got {clock!r}")
    state = getattr(kind, "state", 0)
    if type(state) is not int or not 0 <= state <= MAX_STATE:
        raise PolicyError(f"policy {name!r}: expected state to be a number of uint32 a set, 0 to {MAX_STATE}, got {state!r}")
    if state and getattr(kind, "victim", None) is None:
        raise PolicyError(f"policy {name!r}: state is {state}, but there is no victim(scores, state) that would use it")


def _function(name: str, kind: type, label: str) -> FunctionType | None:
    function = getattr(kind, label, None)
    if function is None:
        if label not in _NEEDED:
            return None
        raise PolicyError(f"policy {name!r}: expected a function {_signatures(label)}, got no {label}")
    if not isinstance(function, FunctionType):
        raise PolicyError(
            f"policy {name!r}: expected a plain Python function {_signatures(label)}, got a {type(function).__name__}"
        )
    code = function.__code__
    given = code.co_varnames[: code.co_argcount]
    known = [PARAMETERS[label], *([(*PARAMETERS[label], OPTIONAL[label])] if label in OPTIONAL else [])]
    if given not in known or not is_simple(function):
        raise broken(name, function, f"expected {_signatures(label)}, got {inspect.signature(function)}")
    return function
