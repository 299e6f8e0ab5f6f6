"""KeyboardInterrupt before any chosen bytecode of a call, in chosen files: what Ctrl-C does at the worst moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["in_finalizer", "interrupted_everywhere"]


class _Interrupt:
    """A trace function that counts the bytecodes of some files and raises before one of them."""

    def __init__(self, files: tuple[str, ...], at: int) -> None:
        self.files, self.at = files, at
        self.count = 0

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.files) or in_finalizer(frame):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self


def in_finalizer(frame: FrameType | None) -> bool:
    """Python reports what is raised in ``__del__`` and goes on, so an interrupt there is none."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def interrupted_everywhere(call: Callable[[], object], *files: str, step: int = 1) -> Iterator[KeyboardInterrupt | None]:
    """Make the call again and again, each time interrupted one bytecode of the files later, until it is not interrupted.

    Args:
        files: ends of the names of the files whose bytecodes count.   step: every so many bytecodes.

    Yields the interrupt, whose traceback keeps the variables of the call alive as a notebook does; None if the call caught it.
    """
    at, before = 1, sys.gettrace()
    while True:
        interrupt, caught = _Interrupt(files, at), None
        sys.settrace(interrupt)
        try:
            call()
        except KeyboardInterrupt as problem:
            caught = problem
        finally:
            sys.settrace(before)
        if interrupt.count < at:
            assert at > 1, f"no bytecode of {files} was executed"
            return
        yield caught
        at += step
