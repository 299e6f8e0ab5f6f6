"""The functions of a policy: what they may use, copies that keep the globals they were loaded with, and their description."""

from __future__ import annotations

import dis
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np

from hps_numba.errors import PolicyError

__all__ = ["MAX_CONSTANTS", "broken", "described", "does_not_compile", "for_compiler", "is_simple", "isolated"]

_BUILTINS = ("abs", "int", "len", "max", "min", "range")
#: elements of a tuple; the constants of a kernel share 64 KiB of a GPU
MAX_CONSTANTS = 4096

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


def is_simple(function: FunctionType) -> bool:
    """Whether it is an ordinary function with positional parameters only, none with a default value."""
    code = function.__code__
    special = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    special |= inspect.CO_ASYNC_GENERATOR
    return not (code.co_flags & special or code.co_kwonlyargcount or function.__defaults__)


# -- errors -----------------------------------------------------------------------------------


def broken(name: str, function: Callable[..., Any], what: str, line: int | None = None) -> PolicyError:
    """The error for a function of the policy ``name``: where it is, and what is wrong with it."""
    code = function.__code__
    return PolicyError(f"policy {name!r}, {code.co_name} ({code.co_filename}:{line or code.co_firstlineno}): {what}")


def does_not_compile(name: str, function: Callable[..., Any], target: str, problem: Exception) -> PolicyError:
    """The error for a compiler's message, with the line that it named last, if that is in this function's file."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("Failed in ")]
    cause = (causes or lines or [type(problem).__name__])[0]
    file = re.escape(Path(function.__code__.co_filename).name)  # numba gives its path from the working directory
    named = re.findall(rf'File "(?:[^"]*/)?{file}", line (\d+)', text)
    line = int(named[-1]) if named else None
    return broken(name, function, f"does not compile for {target}: {cause}", line)


# -- what they may use ------------------------------------------------------------------------


def isolated(
    name: str, function: FunctionType, constants: Mapping[str, Any], callers: tuple[CodeType, ...] = ()
) -> FunctionType:
    """A copy of ``function`` that sees only the globals it uses, with the values they have now.

    Args:
        constants: values that replace globals of these names, in called functions too.

    Raises:
        PolicyError: it uses what no policy may.
    """
    code = function.__code__
    if code in callers:
        raise broken(name, function, "calls itself; expected no recursion")
    if code.co_freevars:
        raise broken(
            name,
            function,
            f"uses {code.co_freevars[0]!r} of an enclosing function; expected a global integer (or policy_with)",
        )
    scope: dict[str, Any] = {"__name__": function.__module__ or "policy"}  # None where code came from exec
    for step in dis.get_instructions(code):
        line = step.positions.lineno if step.positions else None
        if (fault := _fault(step)) is not None:
            raise broken(name, function, fault, line)
        if step.opname == "LOAD_GLOBAL":
            scope |= _global(name, function, step.argval, constants, (*callers, code), line)
    return FunctionType(code, scope, function.__name__)


def _fault(step: dis.Instruction) -> str | None:
    if step.opname in _REFUSED:
        return f"{_REFUSED[step.opname]}; expected integer arithmetic only"
    if step.opname == "BINARY_OP" and step.argrepr.startswith("/") and not step.argrepr.startswith("//"):
        return "expected the division //, got /"
    if step.opname == "LOAD_CONST" and isinstance(step.argval, (float, complex, str, bytes)):
        return f"expected integers only, got {step.argval!r}"
    return None


def _global(
    name: str,
    function: FunctionType,
    used: str,
    constants: Mapping[str, Any],
    callers: tuple[CodeType, ...],
    line: int | None,
) -> dict[str, int | tuple[int, ...] | FunctionType]:
    """The global ``used`` as an isolated copy of ``function`` sees it; nothing for a builtin."""
    if used not in constants and used not in function.__globals__:
        if used in _BUILTINS:
            return {}
        raise broken(name, function, f"uses {used!r}, which is not defined or not one of {', '.join(_BUILTINS)}", line)
    value = constants[used] if used in constants else function.__globals__[used]
    if type(value) is int:
        return {used: value}
    if type(value) is tuple:
        return {used: _checked(name, function, used, value, line)}
    if isinstance(value, FunctionType):
        if not is_simple(value):
            raise broken(name, value, f"expected positional parameters without defaults, got {inspect.signature(value)}")
        return {used: isolated(name, value, constants, callers)}
    raise broken(
        name,
        function,
        f"expected integers, tuples of integers and plain functions as globals, got the {type(value).__name__} {used!r}",
        line,
    )


def _checked(name: str, function: FunctionType, used: str, value: tuple[Any, ...], line: int | None) -> tuple[int, ...]:
    """The tuple, if a compiler can take it."""
    if not 1 <= len(value) <= MAX_CONSTANTS:
        raise broken(name, function, f"{used!r}: expected 1 to {MAX_CONSTANTS} elements, got {len(value)}", line)
    for element in value:
        if type(element) is not int or not -(2**63) <= element < 2**63:
            raise broken(name, function, f"{used!r}: expected integers of 64 bits, got {element!r}", line)
    return value


def described(function: FunctionType) -> Iterator[str]:
    """The behaviour of an isolated function, as text."""
    code = function.__code__
    yield f"{code.co_argcount} {code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
    for used, value in sorted(function.__globals__.items()):
        if isinstance(value, FunctionType):
            yield f"{used}:"
            yield from described(value)
        elif type(value) in (int, tuple):
            yield f"{used} = {value}"
    yield "end"


# -- for compilers ----------------------------------------------------------------------------


@functools.cache
def for_compiler(function: FunctionType) -> FunctionType:
    """An isolated function as it is compiled: tuples become int64 arrays, which take any index at no cost.

    The function itself if it uses no tuple, and the same copy on every call.
    """
    known = function.__globals__
    used = {name: _compilable(known[name]) for name in function.__code__.co_names if name in known}
    if all(value is known[name] for name, value in used.items()):
        return function
    return FunctionType(function.__code__, {**known, **used}, function.__name__)


def _compilable(value: Any) -> Any:
    if isinstance(value, FunctionType):
        return for_compiler(value)
    return np.array(value, np.int64) if type(value) is tuple else value
