"""Hold back signal handlers while something is changed that must be changed whole, and run them where it can be undone.

Problem: Python runs the handler of a signal between any two bytecodes of the main thread, and that of Ctrl-C raises there, also
in the middle of what undoes a change. Choice: for the time of a change, the Python handlers of signals that interrupt are
replaced by one that takes note; the change asks between two of its steps, and the handlers run then, with all that they raise.
A signal that comes a second time before the first was handled is handled at once, so that a change that hangs can still be
interrupted. Other threads run no handlers, and need nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["interrupts_held"]

_NAMES = ("SIGINT", "SIGBREAK", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))  # all would take 100 us to look at


class _Held:
    """Python handlers of signals, and which signals came."""

    def __init__(self) -> None:
        found = {number: signal.getsignal(number) for number in _SIGNALS}
        self._handlers: dict[int, Callable[[int, Any], Any]] = {
            number: handler for number, handler in found.items() if callable(handler)
        }
        self._came: list[int] = []

    def hold(self) -> None:
        for number in self._handlers:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if number in self._came:
            self._came.remove(number)
            self._handlers[number](number, frame)
        else:
            self._came.append(number)

    def let_in(self) -> None:
        while self._came:
            number = self._came.pop(0)
            self._handlers[number](number, None)

    def release(self) -> None:
        for number, handler in reversed(self._handlers.items()):  # Ctrl-C last, as the next one may come right then
            if signal.getsignal(number) == self._note:  # else a handler that ran meanwhile has set another
                signal.signal(number, handler)


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """A block in which no signal handler runs, but in the function that it gets, and when it has ended.

    Handlers see no frame, and raise what they like: KeyboardInterrupt for Ctrl-C. In threads other than the main one it does
    nothing, as there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield _nothing
        return
    held = _Held()
    try:
        held.hold()
        yield held.let_in
    finally:
        held.release()
        held.let_in()


def _nothing() -> None:
    """No handler runs here."""
