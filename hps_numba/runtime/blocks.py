"""Blocks that others wait for, and that end even if an interrupt kept them from being left.

Problem: Ctrl-C may hit after a ``with`` block was counted as entered and before its body began, or inside its exit. A
generator (``contextlib.contextmanager``) that is interrupted there goes on only when the traceback that refers to it is
dropped, and a notebook keeps the last one. Choice: whoever enters notes the frame with the ``with`` statement. Whoever has
waited for long asks whether that frame still runs: a block whose frame has ended has ended too.

Turned down: walking the stacks of all threads (``sys._current_frames``, ``f_back``). A thread may return from a frame between
two steps of the walk, and CPython 3.11 then reads memory that it has freed.
"""

from __future__ import annotations

import dis
import gc
import inspect
import sys
import time
from contextlib import ExitStack
from types import CodeType, FrameType, TracebackType

__all__ = ["Blocks", "EnteredAt", "frame_of_block", "has_ended"]

_SUSPENDED = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_STACKED = ExitStack.enter_context.__code__
_FIRST_PAUSE, _LAST_PAUSE = 1e-5, 1e-2


def frame_of_block() -> FrameType | None:
    """The frame that enters a block; called by ``__enter__``. None if it may be suspended: it is never lost."""
    frame = sys._getframe(2)
    if frame.f_code is _STACKED:
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame.f_code.co_flags & _SUSPENDED else frame


def has_ended(frame: FrameType | None) -> bool:
    """Whether a frame of a function, of any thread, has returned or raised; False for None.

    CPython hands a frame to the garbage collector when it ends, not before. Should that change, all count as running.
    """
    return _IS_TOLD and frame is not None and gc.is_tracked(frame)


_IS_TOLD = (lambda: not gc.is_tracked(sys._getframe()))()


class EnteredAt:
    """Where a block of foreign code was entered, which may enter it by other means than a ``with`` statement.

    Attributes:
        frame: it was entered in.
    """

    __slots__ = ("_at", "frame")

    def __init__(self, frame: FrameType) -> None:
        self.frame, self._at = frame, frame.f_lasti

    @property
    def is_over(self) -> bool:
        """The block was that of a ``with`` statement of a function that has ended; false if that is not certain."""
        code = self.frame.f_code
        return has_ended(self.frame) and not code.co_flags & _SUSPENDED and _is_with(code, self._at)

    def is_left_for(self, other: EnteredAt) -> bool:
        """``other`` is the same ``with`` statement of the same call, which has left this block before."""
        return self.frame is other.frame and self._at == other._at and _is_with(self.frame.f_code, self._at)

    def __str__(self) -> str:
        return f"{self.frame.f_code.co_filename}, in {self.frame.f_code.co_qualname}"


def _is_with(code: CodeType, at: int) -> bool:
    """Whether the instruction at this offset is the entry of a ``with`` statement, and no call of ``__enter__``."""
    names = [dis.opname[code.co_code[i]] for i in (at, at - 2) if i >= 0]
    return names[0] == "BEFORE_WITH" or names == ["CALL", "LOAD_SPECIAL"]  # the second since Python 3.14


class Blocks:
    """The blocks that threads are in. Thread safety: every method, without a lock."""

    def __init__(self) -> None:
        self._open: dict[_Block, FrameType | None] = {}

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
        for block in list(self._open):
            if has_ended(self._open.get(block)):
                self._open.pop(block, None)


class _Block:
    __slots__ = ("_open",)

    def __init__(self, entered: dict[_Block, FrameType | None]) -> None:
        self._open = entered

    def __enter__(self) -> None:
        self._open[self] = frame_of_block()

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._open.pop(self, None)
