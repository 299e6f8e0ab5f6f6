"""What a cache policy is: two integer functions that decide which row leaves a full set of the cache.

Each way of a set has a score. ``first(now, count)`` is the score of a row that comes in, ``touch(score, now, count)`` the
score of a row that was asked for again; the row with the smallest score leaves first. A policy is a class that serves as
their namespace, there is no ``self``::

    class MostRecentLeaves:
        def first(now, count):
            return -now

        def touch(score, now, count):
            return -now

* ``now``: time in ticks, 0 <= now < 2**48; the same for all keys of a call, larger in each later call.
* ``count``: 1. With the class attribute ``needs_count = True``: how often the batch has the key, 1 <= count < 2**31.
* ``score``: 0 <= score < 2**32. What a function returns is kept modulo 2**32.

Without ``needs_count`` a touch may be applied more than once to a row that a batch has more than once, so it has to be
idempotent for equal ``now``. The functions run as plain Python, compiled for the CPU and compiled for CUDA, and have to say
the same everywhere: integers only (floats round differently), nothing allocated, nothing raised, and no globals but integers,
functions of the same kind and ``abs``, ``int``, ``max``, ``min``, ``range``. A class that breaks this is a PolicyError when
it is loaded.

*What a digest covers.* Problem: compiled kernels are kept on disk under the digest of their policy, so two policies that
act differently must never share one. Choice: bytecode, constants and the values of all globals in use, of the functions and
of those that they call; and the functions of a :class:`Policy` are copies that keep seeing these values. Turned down: the
text of the source, because a notebook or an edited file gives text that is not what runs, and a comment would compile anew.
"""

from __future__ import annotations

import dis
import hashlib
import inspect
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from hps_numba import parts
from hps_numba.errors import PolicyError

__all__ = ["Policy", "as_policy", "load_policy"]

_PACKAGE = "hps_numba.kernels.policies"
_LOW32 = 0xFFFF_FFFF
_PARAMETERS = {"first": ("now", "count"), "touch": ("score", "now", "count")}
_LATER = ("admit", "victim", "state")
_Probe = tuple[int, ...]
_BUILTINS = ("abs", "int", "max", "min", "range")

#: bytecode that cannot run on every device, by what it does
_REFUSED = {
    "STORE_GLOBAL": "writes a global variable",
    "DELETE_GLOBAL": "deletes a global variable",
    "IMPORT_NAME": "imports a module",
    "MAKE_FUNCTION": "defines a function inside",
    "BUILD_LIST": "makes a list",
    "BUILD_SET": "makes a set",
    "BUILD_MAP": "makes a dict",
    "BUILD_STRING": "makes a string",
    "RAISE_VARARGS": "raises or asserts",
    "PUSH_EXC_INFO": "catches an exception",
}


@dataclass(frozen=True)
class Policy:
    """A policy that was checked, ready to be compiled into the kernels of a cache.

    Attributes:
        name: as the config names it, or the name of the class.
        first: plain Python function ``first(now, count) -> score``.
        touch: plain Python function ``touch(score, now, count) -> score``. Compiled code passes int64 to both and keeps
            the low 32 bits of what they return.
        needs_count: ``count`` is the number of occurrences in the batch, and ``touch`` is applied once; else ``count`` is 1.
        digest: 32 hex digits that tell what the functions do, constants and called functions included; equal digests
            belong to the same function objects. Of one Python version, as compiled kernels are.
    """

    name: str
    first: Callable[[int, int], int]
    touch: Callable[[int, int, int], int]
    needs_count: bool
    digest: str


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


_functions: dict[str, tuple[FunctionType, FunctionType]] = {}  # by digest, so that kernels made of them are found again
_compiled: set[str] = set()  # digests


def _policy_of(kind: Any, name: str, *, compiled: bool) -> Policy:
    if isinstance(kind, Policy):
        return kind
    _check_attributes(kind, name)
    first, touch = (_isolated(name, _function(name, kind, label), ()) for label in _PARAMETERS)
    needs_count = getattr(kind, "needs_count", False)
    digest = _digest(first, touch, needs_count)
    if digest not in _functions:
        _probes(Policy(name, first, touch, needs_count, digest))
        first, touch = _functions.setdefault(digest, (first, touch))
    policy = Policy(name, *_functions[digest], needs_count, digest)
    if compiled and digest not in _compiled:
        _check_compiled(policy)
        _compiled.add(digest)
    return policy


# -- what a class must look like ------------------------------------------------------------


def _wanted(label: str) -> str:
    return f"{label}({', '.join(_PARAMETERS[label])})"


def _check_attributes(kind: Any, name: str) -> None:
    if not isinstance(kind, type):
        raise PolicyError(f"policy {name!r}: is a {type(kind).__name__}, wanted a class with first and touch")
    known = ("first", "touch", "needs_count")
    for attribute in dir(kind):
        if attribute in _LATER:
            raise PolicyError(f"policy {name!r}: this version does not know {attribute}, it knows {', '.join(known)}")
        if attribute not in known and not attribute.startswith("_"):
            raise PolicyError(f"policy {name!r}: {attribute!r} is unknown, wanted first, touch or needs_count")
    needs_count = getattr(kind, "needs_count", False)
    if not isinstance(needs_count, bool):
        raise PolicyError(f"policy {name!r}: needs_count is {needs_count!r}, wanted True or False")


def _function(name: str, kind: type, label: str) -> FunctionType:
    function = getattr(kind, label, None)
    if function is None:
        raise PolicyError(f"policy {name!r}: has no {label}, wanted a function {_wanted(label)}")
    if not isinstance(function, FunctionType):
        raise PolicyError(
            f"policy {name!r}: {label} is a {type(function).__name__}, wanted a plain Python function {_wanted(label)}"
        )
    code = function.__code__
    if code.co_varnames[: code.co_argcount] != _PARAMETERS[label] or not _is_simple(function):
        raise _broken(name, function, f"parameters are {inspect.signature(function)}, wanted {_wanted(label)}")
    return function


def _is_simple(function: FunctionType) -> bool:
    """Positional parameters only, none with a default value; an ordinary function."""
    code = function.__code__
    special = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    special |= inspect.CO_ASYNC_GENERATOR
    return not (code.co_flags & special or code.co_kwonlyargcount or function.__defaults__)


def _broken(name: str, function: Callable[..., Any], what: str, line: int | None = None) -> PolicyError:
    code = function.__code__
    return PolicyError(f"policy {name!r}, {code.co_name} ({code.co_filename}:{line or code.co_firstlineno}): {what}")


# -- what its functions may use --------------------------------------------------------------


def _isolated(name: str, function: FunctionType, callers: tuple[CodeType, ...]) -> FunctionType:
    """A copy of ``function`` that sees the globals it uses, with the values they have now, and no others."""
    code = function.__code__
    if code in callers:
        raise _broken(name, function, "calls itself, wanted no recursion")
    if code.co_freevars:
        raise _broken(name, function, f"uses {code.co_freevars[0]!r} of an enclosing function, wanted a global integer")
    scope: dict[str, Any] = {"__name__": function.__module__}
    for step in dis.get_instructions(code):
        line = step.positions.lineno if step.positions else None
        if (fault := _fault(step)) is not None:
            raise _broken(name, function, fault, line)
        if step.opname == "LOAD_GLOBAL":
            scope |= _global(name, function, step.argval, (*callers, code), line)
    return FunctionType(code, scope, function.__name__)


def _fault(step: dis.Instruction) -> str | None:
    if step.opname in _REFUSED:
        return f"{_REFUSED[step.opname]}, wanted integer arithmetic only"
    if step.opname == "BINARY_OP" and step.argrepr.startswith("/") and not step.argrepr.startswith("//"):
        return "divides by /, wanted //"
    if step.opname == "LOAD_CONST" and isinstance(step.argval, (float, complex, str, bytes)):
        return f"uses {step.argval!r}, wanted integers only"
    return None


def _global(
    name: str, function: FunctionType, used: str, callers: tuple[CodeType, ...], line: int | None
) -> dict[str, int | FunctionType]:
    """What the global ``used`` is for an isolated copy of ``function``; nothing for a builtin."""
    if used not in function.__globals__:
        if used in _BUILTINS:
            return {}
        raise _broken(name, function, f"uses {used!r}, which is not defined or not one of {', '.join(_BUILTINS)}", line)
    value = function.__globals__[used]
    if type(value) is int:
        return {used: value}
    if isinstance(value, FunctionType):
        if not _is_simple(value):
            raise _broken(name, value, f"parameters are {inspect.signature(value)}, wanted positional ones without defaults")
        return {used: _isolated(name, value, callers)}
    raise _broken(name, function, f"uses the {type(value).__name__} {used!r}, wanted integers and plain functions only", line)


def _digest(first: FunctionType, touch: FunctionType, needs_count: bool) -> str:
    python = sys.implementation.cache_tag or sys.version
    lines = [python, str(needs_count), *_described(first), *_described(touch)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _described(function: FunctionType) -> Iterator[str]:
    """What an isolated function does, as text."""
    code = function.__code__
    yield f"{code.co_argcount} {code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
    for used, value in sorted(function.__globals__.items()):
        if isinstance(value, FunctionType):
            yield f"{used}:"
            yield from _described(value)
        elif type(value) is int:
            yield f"{used} = {value}"
    yield "end"


# -- what its functions must answer ----------------------------------------------------------


def _times() -> Iterator[tuple[random.Random, int]]:
    """Times around every edge, and at random; with them the source of randomness, the same in every process."""
    source = random.Random(20)
    for edge in (8, 2**31, 2**32, 2**33, 2**48 - 2):
        yield from ((source, edge + step) for step in (-8, -1, 0, 1))
    for _ in range(24):
        yield source, source.getrandbits(source.randint(1, 48))


def _scores(policy: Policy, source: random.Random, now: int) -> list[int]:
    """Scores that a row may have at ``now``: of rows that came in or were touched before, and any others."""
    ages = (0, 1, 7, 8, 9, source.randint(10, 10**6))
    born = [_asked(policy, "first", (max(now - age, 0), 1)) for age in ages]
    touched = [_asked(policy, "touch", (score, max(now - age // 2, 0), 1)) for score, age in zip(born, ages)]
    return sorted({*born, *touched, 0, 1, 2**31 - 1, 2**31, _LOW32, source.getrandbits(32)})


def _probes(policy: Policy) -> tuple[list[_Probe], list[_Probe]]:
    """Arguments of first and of touch to try; raises PolicyError if plain Python has no good answer to one."""
    first: list[_Probe] = []
    touch: list[_Probe] = []
    for source, now in _times():
        counts = (1, 2, source.randint(3, 2**31 - 1)) if policy.needs_count else (1,)
        first += [(now, count) for count in counts]
        touch += [(score, now, count) for score in _scores(policy, source, now) for count in counts]
    for label, probes in (("first", first), ("touch", touch)):
        for probe in probes:
            _asked(policy, label, probe)
    if not policy.needs_count:
        _check_idempotent(policy, touch)
    return first, touch


def _asked(policy: Policy, label: str, probe: _Probe) -> int:
    """The answer of plain Python, as the cache keeps it."""
    function = getattr(policy, label)
    try:
        answer = function(*probe)
    except Exception as problem:
        raise _broken(
            policy.name, function, f"{_call(label, probe)} raised {type(problem).__name__}: {problem}, wanted an integer"
        ) from None
    if type(answer) is not int:
        raise _broken(policy.name, function, f"{_call(label, probe)} is {answer!r}, wanted an integer")
    return answer & _LOW32


def _check_idempotent(policy: Policy, probes: list[_Probe]) -> None:
    for score, now, count in probes:
        once = _asked(policy, "touch", (score, now, count))
        twice = _asked(policy, "touch", (once, now, count))
        if once != twice:
            raise _broken(
                policy.name,
                policy.touch,
                f"{_call('touch', (score, now, count))} is {once} and then {_call('touch', (once, now, count))} is {twice}, "
                "wanted the same for equal now: set needs_count = True if it counts requests",
            )


def _check_compiled(policy: Policy) -> None:
    from hps_numba.kernels.compile import host_function

    for label, probes in zip(_PARAMETERS, _probes(policy)):
        function = getattr(policy, label)
        try:
            answers = [host_function(function)(*probe) for probe in probes]
        except Exception as problem:
            raise _broken(policy.name, function, f"does not compile: {_first_line(problem)}") from None
        for probe, answer in zip(probes, answers):
            plain = _asked(policy, label, probe)
            if type(answer) is not int or answer & _LOW32 != plain:
                what = f"{_call(label, probe)} is {plain}, but compiled {answer!r}"
                raise _broken(policy.name, function, f"{what}, wanted the same with int64 arithmetic")


def _call(label: str, probe: _Probe) -> str:
    return f"{label}({', '.join(map(str, probe))})"


def _first_line(problem: Exception) -> str:
    """What numba has to say in one line: the first that names a cause, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("Failed in ")]
    return (causes or lines or [type(problem).__name__])[0]
