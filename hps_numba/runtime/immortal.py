"""Things that last as long as the process, not as long as Python knows of them.

Problem: native threads go on while the interpreter ends, and it frees what its modules own, mappings of memory included.
Choice: one more reference to what such a thread may still read, that nobody drops; the memory goes with the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

__all__ = ["keep_forever"]

# a prototype of its own: argtypes set on ctypes.pythonapi itself would be shared with every other user of ctypes
_refer = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))


def keep_forever(thing: object, refer: Callable[[object], None] = _refer) -> None:
    """Never free ``thing``.   Thread safety: may be called anywhere, also while the interpreter ends."""
    refer(thing)
