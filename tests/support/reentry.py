"""A call in the middle of another one of the same thread, as a signal handler makes it, but at a line of choice."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hps_numba
from hps_numba.errors import ReentryError

_PACKAGE = str(Path(hps_numba.__file__).parent)


def run_inside(outer: Callable[[], Any], inner: Callable[[], Any], line: int, *, visits: int = 1 << 62) -> str:
    """Call ``inner`` when ``outer`` comes to its line number ``line``, counted over all lines of the package that it runs.

    Args:
        visits: how often each line counts at most: a loop that waits for another thread has as many as that needs.

    Returns ``not reached`` if there are fewer; else ``refused`` or ``done``, as ``inner`` was.
    """
    what = "not reached"
    left = line
    seen: Counter[tuple[CodeType, int]] = Counter()

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal what, left
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            seen[frame.f_code, frame.f_lineno] += 1
            left -= seen[frame.f_code, frame.f_lineno] <= visits
            if left == 0:
                left = -1
                sys.settrace(None)
                try:
                    inner()
                    what = "done"
                except ReentryError:
                    what = "refused"
        return trace if left > 0 else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outer()
    finally:
        sys.settrace(before)
    return what
