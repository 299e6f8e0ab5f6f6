"""Blocks that others wait for, and that end even if an interrupt kept them from being left.

Problem: Ctrl-C may hit after a ``with`` block was counted as entered and before its body began, or inside its exit. A
generator (``contextlib.contextmanager``) that is interrupted there goes on only when the traceback that refers to it is
dropped, and a notebook keeps the last one. Choice: whoever enters notes the frame with the ``with`` statement. Whoever has
waited for long looks at the stacks of all threads: a block whose frame runs no more has ended.
"""

from __future__ import annotations

import inspect
import sys
import time
from contextlib import ExitStack
from types import TracebackType

__all__ = ["Blocks", "frame_of_block", "running_frames"]

_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_STACKED = ExitStack.enter_context.__code__
_FIRST_PAUSE, _LAST_PAUSE = 1e-5, 1e-2


def frame_of_block() -> int:
    """The identity of the frame that enters a block; called by ``__enter__``. 0 if it may be suspended: it is never lost."""
    frame = sys._getframe(2)
    if frame.f_code is _STACKED:
        frame = frame.f_back  # type: ignore[assignment]
    return 0 if frame.f_code.co_flags & _SUSPENDED else id(frame)


def running_frames() -> set[int]:
    """The identities of the frames of all threads. 0 is among them: what ``frame_of_block`` could not tell."""
    running = {0}
    for top in sys._current_frames().values():
        frame = top
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back  # type: ignore[assignment]
    return running


class Blocks:
    """The blocks that threads are in. Thread safety: every method, without a lock."""

    def __init__(self) -> None:
        self._open: dict[_Block, int] = {}

    def block(self) -> _Block:
        """A block to be entered once."""
        return _Block(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def wait(self, seconds: float) -> bool:
        """Wait until all blocks have been left; False if that takes longer."""
        end, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while self._open:
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
            if pause == _LAST_PAUSE:
                self._drop_lost()
        return True

    def _drop_lost(self) -> None:
        entered = list(self._open.items())  # before the frames: a block that is entered now is not looked at
        running = running_frames()
        for block, frame in entered:
            if frame not in running:
                self._open.pop(block, None)


class _Block:
    __slots__ = ("_open",)

    def __init__(self, entered: dict[_Block, int]) -> None:
        self._open = entered

    def __enter__(self) -> None:
        self._open[self] = frame_of_block()

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._open.pop(self, None)
