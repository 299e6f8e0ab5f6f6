"""What a cache policy is: integer functions that decide which row leaves a full set of the cache, and who may come in.

Each way of a set has a score. ``first(now, count)`` is the score of a row that comes in, ``touch(score, now, count)`` the
score of a row that was asked for again; the row with the smallest score leaves first. A policy is a class that serves as
their namespace, there is no ``self``::

    class MostRecentLeaves:
        def first(now, count):
            return -now

        def touch(score, now, count):
            return -now

* ``now``: time in ticks, 0 <= now < 2**48; the same for all keys of a call, larger in each later call. With the class attribute
  ``clock = "insertions"`` it is the number of rows that came in so far, 64 ticks for as many as the cache has ways: it stands
  still while nothing comes in, and a cache that holds its whole table then needs no second kernel a lookup.
* ``count``: 1. With the class attribute ``needs_count = True``: how often the batch has the key, 1 <= count < 2**31.
* ``score``: 0 <= score < 2**32. What a function returns is kept modulo 2**32.

Without ``needs_count`` a touch may be applied more than once to a row that a batch has more than once, so it has to be
idempotent for equal ``now``. Three things more, each at its own price, which only policies that have it pay:

* ``first(now, count, key)``: the score may depend on the key, an int64. Under such a policy a row with the largest score,
  2**32 - 1, stays: where no other row could leave, the newcomer is refused.
* ``victim(scores, state) -> way`` or ``victim(scores, state, now) -> way``: which way of a full set leaves, in the place of
  the smallest score. ``scores`` are those of the set's ways, ``len(scores)`` of them (10 in a cache; as many as there are
  slots in a fully associative simulation), numbered the same whichever key comes. ``state`` is what the policy remembers of
  the set: as many uint32 as the class attribute ``state`` says (0 to 16, 0 if it is left out), 0 in the beginning. Both are
  read and written by index; what is written is kept modulo 2**32. If the way belongs to a row that came in with the same
  batch, the next way that does not leaves in its place.
* ``admit(key, count, sketch) -> bool``: may the newcomer take the place of the row that is to leave? It is asked when the set
  is full, after the victim was chosen; if not, that row stays (and what ``victim`` wrote). ``sketch`` is two integers,
  0 to 15: about how often the newcomer was asked for lately, its requests in this batch included, and the same of the row
  that is to leave. Requests are counted by lookups, found or not, in a count-min sketch that forgets
  (``kernels.cache_sketch``); what it says is never too small.

A batch acts on a set in this order: all touches of resident rows; then newcomers in the order of their first positions, each
into an empty way, else ``victim`` (or the smallest score, the first in the probe order of the newcomer of equals), ``admit``
and ``first``. A newcomer that was refused is asked for again at its next position in the batch.

The functions run as plain Python, compiled for the CPU and compiled for CUDA, and have to say the same everywhere: integers
only (floats round differently), nothing allocated, nothing raised, and no globals but integers, tuples of integers, functions
of the same kind and ``abs``, ``int``, ``len``, ``max``, ``min``, ``range``. A class that breaks this is a PolicyError when it
is loaded, with the function, its line, and for which target it does not compile.

*What a digest covers.* Problem: compiled kernels are kept on disk under the digest of their policy, so two policies that
act differently must never share one. Choice: bytecode, constants and the values of all globals in use, of the functions and
of those that they call; and the functions of a :class:`Policy` are copies that keep seeing these values. Turned down: the
text of the source, because a notebook or an edited file gives text that is not what runs, and a comment would compile anew.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from hps_numba import parts
from hps_numba.errors import PolicyError
from hps_numba.kernels.policies._functions import broken, described, is_simple, isolated
from hps_numba.kernels.policies._probes import check_compiled, check_plain

__all__ = ["MOST_STATE", "Policy", "as_policy", "load_policy", "policy_with"]

MOST_STATE = 16
_PACKAGE = "hps_numba.kernels.policies"
_PARAMETERS = {
    "first": ("now", "count"),
    "touch": ("score", "now", "count"),
    "admit": ("key", "count", "sketch"),
    "victim": ("scores", "state"),
}
#: a parameter that a function may have besides, at the end
_MORE = {"first": "key", "victim": "now"}
_NEEDED = ("first", "touch")
_CLOCKS = ("calls", "insertions")
_KNOWN = (*_PARAMETERS, "clock", "needs_count", "state")


@dataclass(frozen=True)
class Policy:
    """A policy that was checked, ready to be compiled into the kernels of a cache.

    Attributes:
        name: as the config names it, or the name of the class.
        first: plain Python function ``first(now, count) -> score``, with ``key`` besides if ``takes_key``.
        touch: plain Python function ``touch(score, now, count) -> score``. Compiled code passes int64 to both and keeps
            the low 32 bits of what they return.
        needs_count: ``count`` is the number of occurrences in the batch, and ``touch`` is applied once; else ``count`` is 1.
        digest: 32 hex digits that tell what the functions do, constants and called functions included; equal digests
            belong to the same function objects. Of one Python version, as compiled kernels are.
        admit: ``admit(key, count, sketch) -> bool``, or None: all newcomers come in.
        victim: ``victim(scores, state) -> way``, with ``now`` besides if ``takes_now``; or None: the smallest score leaves.
            In plain Python, scores and state are lists, compiled they are int64 arrays.
        state: uint32 that victim keeps of each set.
        takes_key, takes_now: the functions have these parameters.
        clock: what ``now`` counts: ``calls`` or ``insertions``.
    """

    name: str
    first: Callable[..., int]
    touch: Callable[[int, int, int], int]
    needs_count: bool
    digest: str
    admit: Callable[[int, int, tuple[int, int]], bool] | None = None
    victim: Callable[..., int] | None = None
    state: int = 0
    takes_key: bool = False
    takes_now: bool = False
    clock: str = "calls"

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The functions that it has, by name."""
        return {label: function for label in _PARAMETERS if (function := getattr(self, label)) is not None}

    @property
    def for_hits(self) -> Policy:
        """What kernels that only touch rows know of it: policies that touch alike share them."""
        if self.needs_count:  # a kernel of its own touches
            return load_policy("lfu")
        first = load_policy("fifo").first
        return Policy(self.name, first, self.touch, False, _digest({"first": first, "touch": self.touch}, False, 0, "calls"))


def load_policy(name: str, *, allow_code: bool = False, folder: Path | None = None) -> Policy:
    """The policy called ``name``: built-in (by file name), ``package.module:NAME``, or ``file.py:NAME`` of the user's.

    Args:
        allow_code: ``name`` may be a file, which is run.
        folder: where a relative file is looked up after the working directory.

    Raises:
        PolicyError: no such policy, or it breaks the contract above; one line with function, line, what came, what is wanted.
    """
    if not isinstance(name, str):
        raise PolicyError(f"cache policy: {name!r} is no name, wanted one of {', '.join(parts.names(_PACKAGE))} or module:NAME")
    kind = parts.load(_PACKAGE, name, allow_code=allow_code, folder=folder, error=PolicyError)
    # built-in ones are compiled by their tests: a start does not wait for that again
    return _policy_of(kind, name, compiled=parts.is_reference(name))


def as_policy(kind: Any, *, name: str | None = None) -> Policy:
    """The policy that a class describes, e.g. one written in a notebook; a Policy is returned as it is.

    Globals that its functions use are read now: after a change of one, call ``as_policy`` again.

    Raises:
        PolicyError: it breaks the contract above.
    """
    return _policy_of(kind, name or getattr(kind, "__name__", None) or type(kind).__name__, compiled=True)


def policy_with(kind: type, **constants: Any) -> type:
    """A class like ``kind`` whose functions, and those that they call, see other values of the globals in ``constants``.

    So one file serves for policies that differ in a number, a tuple of keys or another policy's function:
    ``policy_with(Decay, HALF_LIFE=100)``. ``clock``, ``needs_count`` and ``state`` among the constants are those of the class.

    Raises:
        PolicyError: ``kind`` is no class. What the constants may be is checked when the result is loaded.
    """
    if not isinstance(kind, type):
        raise PolicyError(f"policy_with: {kind!r} came, a class is wanted")
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
    for label in _PARAMETERS:
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
    takes_key, takes_now = (label in functions and _has_more(functions[label], label) for label in _MORE)
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
    return function.__code__.co_argcount > len(_PARAMETERS[label])


def _digest(functions: Mapping[str, Any], needs_count: bool, state: int, clock: str) -> str:
    python = sys.implementation.cache_tag or sys.version
    lines = [python, f"{needs_count} {state} {clock}"]
    for label, function in functions.items():
        lines += [label, *described(function)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


# -- what a class must look like ------------------------------------------------------------


def _wanted(label: str) -> str:
    plain = f"{label}({', '.join(_PARAMETERS[label])})"
    return f"{plain} or {label}({', '.join(_PARAMETERS[label])}, {_MORE[label]})" if label in _MORE else plain


def _check_attributes(kind: Any, name: str) -> None:
    if not isinstance(kind, type):
        raise PolicyError(f"policy {name!r}: is a {type(kind).__name__}, wanted a class with first and touch")
    for attribute in dir(kind):
        if attribute not in _KNOWN and not attribute.startswith("_"):
            raise PolicyError(f"policy {name!r}: {attribute!r} is unknown, wanted {', '.join(_KNOWN[:-1])} or {_KNOWN[-1]}")
    needs_count = getattr(kind, "needs_count", False)
    if not isinstance(needs_count, bool):
        raise PolicyError(f"policy {name!r}: needs_count is {needs_count!r}, wanted True or False")
    clock = getattr(kind, "clock", "calls")
    if clock not in _CLOCKS:
        raise PolicyError(f"policy {name!r}: clock is {clock!r}, wanted {' or '.join(map(repr, _CLOCKS))}")
    state = getattr(kind, "state", 0)
    if type(state) is not int or not 0 <= state <= MOST_STATE:
        raise PolicyError(f"policy {name!r}: state is {state!r}, wanted a number of uint32 a set, 0 to {MOST_STATE}")
    if state and getattr(kind, "victim", None) is None:
        raise PolicyError(f"policy {name!r}: state is {state}, but there is no victim(scores, state) that would use it")


def _function(name: str, kind: type, label: str) -> FunctionType | None:
    function = getattr(kind, label, None)
    if function is None:
        if label not in _NEEDED:
            return None
        raise PolicyError(f"policy {name!r}: has no {label}, wanted a function {_wanted(label)}")
    if not isinstance(function, FunctionType):
        raise PolicyError(
            f"policy {name!r}: {label} is a {type(function).__name__}, wanted a plain Python function {_wanted(label)}"
        )
    code = function.__code__
    given = code.co_varnames[: code.co_argcount]
    known = [_PARAMETERS[label], *([(*_PARAMETERS[label], _MORE[label])] if label in _MORE else [])]
    if given not in known or not is_simple(function):
        raise broken(name, function, f"parameters are {inspect.signature(function)}, wanted {_wanted(label)}")
    return function
