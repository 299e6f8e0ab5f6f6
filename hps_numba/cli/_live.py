"""Commands that look again and again: when, and where on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._output import console, print_json_line

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Interval", "Once", "Seconds", "shown", "ticks", "until_interrupted"]

Interval = Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds between two looks.")]
Seconds = Annotated[float | None, typer.Option(min=0.1, max=10**7, help="End after so long; else with Ctrl-C.")]
Once = Annotated[bool, typer.Option("--once", help="Look once, after --interval, and end.")]


def ticks(interval: float, seconds: float | None) -> Iterator[None]:
    """When to look: every ``interval`` seconds, and once more when ``seconds`` have passed; None: without end."""
    began = time.monotonic()
    while True:
        left = interval if seconds is None else min(interval, began + seconds - time.monotonic())
        time.sleep(max(0.0, left))
        yield
        if seconds is not None and time.monotonic() >= began + seconds:
            return


@contextmanager
def until_interrupted() -> Iterator[None]:
    """A block that Ctrl-C ends, as what it does has no other end."""
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def shown(draw: Callable[[Any], RenderableType] | None) -> Iterator[Callable[[Any], None]]:
    """What shows each look: drawn in one place on a terminal, else below the last one; without ``draw``, as a line of JSON."""
    from rich.live import Live

    out = console()
    if draw is None:
        yield print_json_line
    elif not out.is_terminal:
        yield lambda look: out.print(draw(look))
    else:
        with Live(console=out, auto_refresh=False) as live:
            yield lambda look: live.update(draw(look), refresh=True)
