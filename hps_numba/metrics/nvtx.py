"""Calls of a server as NVTX ranges, so that Nsight Systems shows them beside the work of the GPU; only where asked for.

The methods of the parts of a server are marked in subclasses that are made on request: in a server that was not asked, calls do
not even look whether it was. Turned down: a test in each call.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from hps_numba.errors import ConfigError

__all__ = ["VARIABLE", "Ranges", "open_ranges", "with_ranges"]

#: environment variable that asks for ranges in servers that are not told: 1, or 0
VARIABLE = "HPS_NUMBA_NVTX"
_DOMAIN = "hps_numba"
T = TypeVar("T")


class Ranges(NamedTuple):
    """``push(name)`` begins a range of this thread, ``pop()`` ends the last."""

    push: Callable[[str], object]
    pop: Callable[[], object]


def open_ranges(asked: bool | None) -> Ranges | None:
    """What marks ranges, if they are asked for: ``asked``, or for None the environment variable, says so.

    Raises:
        ConfigError: they are asked for, and neither ``nvtx`` nor a Torch with CUDA is installed; or the variable is not 0 or 1.
    """
    if asked is None:
        said = os.environ.get(VARIABLE, "")
        if said not in ("", "0", "1"):
            raise ConfigError(f"{VARIABLE}: expected 0 or 1, got {said!r}")
        asked = said == "1"
    if not asked:
        return None
    ranges = _of_nvtx() or _of_torch()
    if ranges is None:
        raise ConfigError("nvtx: expected the package nvtx (pip install nvtx) or a Torch with CUDA, found neither")
    return ranges


def _of_nvtx() -> Ranges | None:
    try:
        nvtx: Any = importlib.import_module("nvtx")
    except ImportError:
        return None
    return Ranges(functools.partial(nvtx.push_range, domain=_DOMAIN), functools.partial(nvtx.pop_range, domain=_DOMAIN))


def _of_torch() -> Ranges | None:
    try:
        nvtx: Any = importlib.import_module("torch.cuda.nvtx")
        nvtx.range_push("hps_numba")  # a Torch without CUDA has the functions, which fail
        nvtx.range_pop()
    except (ImportError, RuntimeError):
        return None
    return Ranges(lambda name: nvtx.range_push(f"{_DOMAIN}.{name}"), nvtx.range_pop)


def with_ranges(kind: type[T], names: Iterable[str], ranges: Ranges | None) -> type[T]:
    """A subclass whose methods of these names are ranges of the same names; the class itself for None."""
    if ranges is None:
        return kind
    return type(kind.__name__, (kind,), {name: _marked(getattr(kind, name), name, ranges) for name in names})


def _marked(method: Callable[..., Any], name: str, ranges: Ranges) -> Callable[..., Any]:
    @functools.wraps(method)
    def marked(self: Any, *arguments: Any, **options: Any) -> Any:
        ranges.push(name)
        try:
            return method(self, *arguments, **options)
        finally:
            ranges.pop()

    return marked
