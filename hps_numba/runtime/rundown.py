"""Who still works on something that is about to go, and a wait for them that no interrupt can break.

Problem: whoever waits in a ``finally`` block or an ``except`` clause for threads that write to his memory is done for by the
next exception of a signal handler, which Python raises after any call in there; two signals at once often do it. Choice: the
wait is one call into C, that of a lock for readers and writers of the system, which goes on when a signal comes (POSIX: it
"shall not return an error code of [EINTR]"). Python runs no handler before a call into C, only after it: ``finally:
rundown.wait()`` has no gap. Turned down: nested ``try`` statements (they stand as many interrupts as there are of them), locks
of Python (a handler ends the wait), a thread that waits (who waits for that one?).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial

__all__ = ["Rundown"]

_BYTES = 256  # of a lock: 56 on Linux, 200 on macOS, 8 on Windows

if os.name == "posix":
    _PREFIX, _OK = "pthread_rwlock_", 0
    _NAMES = ("init", "tryrdlock", "unlock", "wrlock")
    _here, _waiting = ctypes.PyDLL(None), ctypes.CDLL(None)
else:
    _PREFIX, _OK = "", 1
    _NAMES = ("InitializeSRWLock", "TryAcquireSRWLockShared", "ReleaseSRWLockShared", "AcquireSRWLockExclusive")
    _here, _waiting = ctypes.PyDLL("kernel32"), ctypes.CDLL("kernel32")


def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    """``library`` says whether it holds the GIL."""
    function = library[_PREFIX + name]
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p] if name == "init" else [ctypes.c_void_p]
    function.restype = ctypes.c_ubyte if name.startswith("Try") else ctypes.c_int
    return function


_init, _enter, _leave = (_function(_here, name) for name in _NAMES[:3])
_wait = _function(_waiting, _NAMES[3])


class Rundown:
    """Threads that are inside, until somebody waits for them; then nobody comes in any more.

    Attributes:
        wait: call it, once, by the thread that ends it all: it returns when all have left. No interrupt breaks it if it is the
            first call of a ``finally`` block or an ``except`` clause.

    Thread safety: every method.
    """

    def __init__(self) -> None:
        self._lock = (ctypes.c_char * _BYTES)()
        address = ctypes.addressof(self._lock)
        _init(address, *(None,) * (_PREFIX != ""))
        self._enter, self._leave = partial(_enter, address), partial(_leave, address)
        self.wait: Callable[[], int] = partial(_wait, address)  # not a method: its first line could be interrupted

    def enter(self) -> bool:
        """Come in; False if somebody waits for the end, or has. Not for the thread that waits."""
        return self._enter() == _OK

    def leave(self) -> None:
        """The same thread leaves."""
        self._leave()
