"""Things that last as long as the process, not as long as Python knows of them.

Problem: native threads go on while the interpreter ends, and it frees what its modules own, mappings of memory included. Choice:
one more reference to what such a thread may still read, that nobody drops; the system takes the memory with the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["keep_forever"]


def keep_forever(
    thing: object,
    refer: Callable[..., object] = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi)),
) -> None:
    """Never free ``thing``.   Thread safety: may be called anywhere, also while the interpreter ends."""
    refer(thing)
