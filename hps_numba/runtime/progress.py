"""A progress bar for loading, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["rows_progress"]

_WORTH_A_BAR = 1_000_000


@contextmanager
def rows_progress(
    total: int, show: bool | None = None, *, unit: str = "rows", doing: str = "loading"
) -> Iterator[Callable[[str, int], None]]:
    """Yield ``advance(what, rows)``; draw a bar on stderr if that is a terminal and there is much to load.

    Args:
        total: rows to come.
        show: True or False to decide; None for "on a terminal, from a million rows on".
        unit: what is counted.   doing: what is shown before the first ``what``.
    """
    if not (sys.stderr.isatty() and total >= _WORTH_A_BAR if show is None else show):
        yield lambda what, rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total or None)
        yield lambda what, rows: bar.update(task, advance=rows, description=what)
