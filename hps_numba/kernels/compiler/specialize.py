"""Specializes cache kernels: one source, bound to the memory and lanes of a target, for one shape of cache.

``bind`` copies a kernel function and all plain functions it calls, with other globals: the operations of ``simt.reference`` are
replaced by those of the target, and constants (DIM, FIXED, ...) and the functions of the policy get their values. So a constant
is a constant to the compiler, and branches on it vanish.

*Why copies and not arguments.* Problem: widths, types and policies must be known to the compiler, but kernels that are made by
functions returning functions hide what they use and cannot be read or tested in plain Python. Choice: kernels are ordinary
functions of ordinary modules, whose globals are replaced. Turned down: text templates, and closures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MappingProxyType
from typing import Any

from hps_numba.kernels.compiler.spec import KernelSpec

__all__ = ["bind", "bindings", "names_in"]


def bind(function: FunctionType, names: dict[str, Any], wrap: Callable[[FunctionType], Any]) -> FunctionType:
    """A copy of ``function`` whose globals, and those of all plain functions it calls, are taken from ``names``.

    Globals not named there stay, and so do those of functions that are taken from ``names``: a policy may use any names.
    Each function that is called is passed through ``wrap``, once; the outermost is not. Functions must not be recursive.
    """
    done: dict[FunctionType, Any] = {}

    def copy(original: FunctionType, names: Mapping[str, Any] = names) -> FunctionType:
        scope = dict(original.__globals__)
        for name in dict.fromkeys(names_in(original.__code__)):
            if name not in names and name not in scope:
                continue  # a builtin, or an attribute
            value = names.get(name, scope.get(name))
            if isinstance(value, FunctionType):
                if value not in done:
                    done[value] = wrap(copy(value, MappingProxyType({}) if name in names else names))
                value = done[value]
            scope[name] = value
        return FunctionType(original.__code__, scope, original.__name__, original.__defaults__)

    return copy(function)


def names_in(code: CodeType) -> Iterator[str]:
    """Names that code uses, with those of functions and comprehensions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def bindings(
    spec: KernelSpec, wrap: Callable[[FunctionType], Any], names: Mapping[str, Any] = MappingProxyType({})
) -> FunctionType:
    """The kernel of a spec in plain Python: the operations of ``simt.reference``, constants and policy of the spec.

    ``names`` replaces further names, such as the number of a tile in a grid.
    """
    return bind(spec.function, {**spec.for_one_lane, **names}, wrap)
