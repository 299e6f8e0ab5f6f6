"""What an array is: its framework and device, told from its class, without importing any framework.

Whoever holds an array of a framework has imported it, so the framework is found in ``sys.modules``, by the module names of the
array's classes. A user's subclass of a framework's array counts as the framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["NUMPY", "ArrayKind", "Finish", "do_nothing", "framework_of", "kind_of", "one_line"]

Finish = Callable[[], None]
"""To be called once the rows of an answer are filled, or the kernels that fill them are launched."""

_PACKAGES = {"torch": "torch", "tensorflow": "tensorflow", "cupy": "cupy", "jax": "jax", "jaxlib": "jax"}


class ArrayKind(NamedTuple):
    """What to build for the caller: the framework's name, and the device in the framework's own terms (None for NumPy)."""

    framework: str
    device: Any = None


NUMPY = ArrayKind("numpy")


def _framework_of_class(kind: type) -> str | None:
    for base in kind.__mro__:
        framework = _PACKAGES.get(base.__module__.partition(".")[0])
        if framework is not None:
            return None if issubclass(kind, tuple) else framework  # torch.Size is a tuple of ints
    return None


_known: Callable[[type], str | None] = functools.lru_cache(maxsize=256)(_framework_of_class)


def framework_of(array: Any) -> str | None:
    """``torch``, ``tensorflow``, ``cupy`` or ``jax``; None for anything else."""
    return _known(type(array))


def kind_of(array: Any) -> ArrayKind:
    """The kind of an array. Lists, numbers, capsules and arrays of unknown frameworks count as NumPy."""
    framework = framework_of(array)
    return NUMPY if framework is None else ArrayKind(framework, array.device)


def do_nothing() -> None:
    """The ``Finish`` of an output that is written in place."""


def one_line(text: object) -> str:
    """Text of foreign code as one line of at most 200 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 200 else f"{line[:200]}..."
