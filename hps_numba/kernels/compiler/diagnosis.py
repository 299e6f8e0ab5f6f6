"""Which error a compiler's complaint becomes: of the policy, with function and line, or of the kernel."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

from hps_numba.errors import DeviceError, HpsError
from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.policies._functions import does_not_compile, for_compiler

__all__ = ["first_line", "refused", "signature_of"]


def refused(spec: KernelSpec, where: str, problem: Exception, compile_scalar: Callable[[FunctionType, Any], None]) -> HpsError:
    """The error for a compiler's complaint: a PolicyError, if a function of the policy on its own does not compile either."""
    for label, function in spec.policy.functions.items():
        try:
            compile_scalar(for_compiler(function), signature_of(label, function))
        except Exception as fault:
            return does_not_compile(spec.policy.name, function, where, fault)
    return DeviceError(f"{spec} does not compile for {where}: {first_line(problem)}")


def signature_of(label: str, function: Callable[..., Any]) -> Any:
    """The numba types of a function of a policy."""
    from numba import types

    word, words, pair = types.int64, types.Array(types.int64, 1, "C"), types.UniTuple(types.int64, 2)
    if label == "admit":
        return types.boolean(word, word, pair)
    count = function.__code__.co_argcount
    return word(words, words, *[word] * (count - 2)) if label == "victim" else word(*[word] * count)


def first_line(problem: Exception) -> str:
    """A compiler's message in one line: the first that names a cause, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("Failed in ")]
    return (causes or lines or [type(problem).__name__])[0]
