"""Values that nobody expects, for every argument of every public call."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.errors import HpsError

__all__ = ["PATHS", "ZOO", "Foreign", "parameters_of", "refusals"]


class Foreign:
    """An object whose every conversion fails in its own way."""

    def fails(self, *args: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    __index__ = __float__ = __iter__ = __array__ = __fspath__ = __str__ = __repr__ = __len__ = fails


ZOO: dict[str, Any] = {
    "text": "x",
    "empty text": "",
    "text with a zero byte": "a\0b",
    "bytes": b"",
    "none": None,
    "true": True,
    "integer": 5,
    "negative": -1,
    "huge": 2**70,
    "float": 1.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "complex": 1j,
    "NumPy float": np.float32(1.5),
    "list": [],
    "list of texts": ["x"],
    "list of none": [None],
    "ragged list": [[1], [1, 2]],
    "tuple": (),
    "dict": {},
    "set": {1, 2},
    "float array": np.array([1.5]),
    "empty array": np.zeros((2, 0)),
    "text array": np.array(["a"]),
    "object array": np.array([object()]),
    "object": object(),
    "class": Foreign,
    "path": Path("nowhere"),
    "foreign": Foreign(),
}

PATHS = ("fifo", "/dev/zero", "/dev/full", ".", "/", "..", "missing/file", "~nobody/x", "x" * 300, "\udcff", "text")
"""Paths at which there is no regular file of any use; ``refusals`` makes ``fifo`` and ``text`` in the working directory."""


def parameters_of(functions: Mapping[str, Callable[..., Any]]) -> list[tuple[str, str]]:
    """(name of a function, name of one of its parameters), for all of them."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        (name, parameter.name)
        for name, function in functions.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind not in kinds and parameter.name != "self"
    ]


def refusals(call: Callable[[Any], Any], *, paths: bool = False) -> Iterator[tuple[Any, HpsError | None]]:
    """Call with each value of the zoo, and with odd paths; yields the value and the error of this package, if there was one.

    Anything else that is raised passes through, with the value as a note.
    """
    if paths and not os.path.lexists("fifo"):
        os.mkfifo("fifo")
        Path("text").write_text("text")
    for value in (*ZOO.values(), *(PATHS if paths else ())):
        try:
            call(value)
        except HpsError as error:
            yield value, error
        except BaseException as error:
            error.add_note(f"got {type(value).__name__} {value if isinstance(value, (str, int, float)) else ''!r}")
            raise
        else:
            yield value, None
