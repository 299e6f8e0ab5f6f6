"""Output of commands: text and tables or JSON on stdout, plain unless it is a terminal; warnings on stderr."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.runtime import hugectr_log

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "STDOUT",
    "AsJson",
    "check_output_file",
    "collected_log_lines",
    "console",
    "human_rate",
    "human_seconds",
    "print_facts",
    "print_json",
    "print_json_line",
    "print_table",
    "show_log_lines",
    "write_json",
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

STDOUT = Path("-")  # as the name of a file to write
_PLAIN_WIDTH = 100
_LOGGER = logging.getLogger("hps_numba")


def check_output_file(option: str, path: Path | None) -> None:
    """Raise ``BadParameter`` before any work is done if a result could not be written to ``path``."""
    if path is not None and path != STDOUT and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise typer.BadParameter(f"expected a file in an existing directory, got {path}", param_hint=option)


def console(*, stderr: bool = False) -> Console:
    """A console for the current stdout or stderr; 100 columns and no colours unless it is a terminal."""
    from rich.console import Console

    created = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not created.is_terminal:
        created.width = _PLAIN_WIDTH
    return created


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> None:
    """Print a table: the first ``left`` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print ``name  value`` lines, the values in one column; an empty name continues the line above."""
    facts = list(facts)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        typer.echo(f"{name:<{width}}  {value}".rstrip())


def print_json(content: Any) -> None:
    """Print ``content`` as JSON; NaN and infinities, which JSON lacks, become null."""
    typer.echo(json.dumps(_finite(content), indent=2, ensure_ascii=False, default=str))


def write_json(report: Any, path: Path | None) -> bool:
    """Print a report as JSON if ``path`` is ``STDOUT``, which the answer tells; else write it to the file, if there is one.

    Raises:
        ConfigError: the file cannot be written, and is as it was.
    """
    if path == STDOUT:
        print_json(report)
        return True
    if path is not None:
        from hps_numba.errors import ConfigError
        from hps_numba.runtime.replacing import write_report

        text = json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n"
        write_report(path, text, text[: text.index(":")], error=ConfigError)
    return False


def print_json_line(content: Any) -> None:
    """The same on one line."""
    typer.echo(json.dumps(_finite(content), ensure_ascii=False, default=str))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def human_seconds(seconds: float) -> str:
    """``0.00213`` -> ``2.13 ms``."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds / scale < 1000 else f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def human_rate(amount: float, unit: str) -> str:
    """``25_400_000, "keys/s"`` -> ``25.4 M keys/s``."""
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= scale:
            return f"{amount / scale:.3g} {prefix}{'' if unit.startswith('B') else ' '}{unit}"
    return f"{amount:.3g} {unit}"


# -- log messages ---------------------------------------------------------------------


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        typer.echo(f"{record.levelname.lower()}: {record.getMessage()}", err=True)


class _ListHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def show_log_lines(verbose: bool) -> Callable[[], None]:
    """Show log messages of the library from WARNING (``verbose``: INFO) on, until the returned function is called.

    If HugeCTR's variables say where and from which level, they are shown so; ``verbose`` adds those from INFO on.
    """
    of_environment = hugectr_log.install()
    if of_environment is not None:
        if verbose:
            of_environment.show_at_least(hugectr_log.LEVELS["WARNING"])
        return lambda: None
    handler, level = _StderrHandler(), _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO if verbose else logging.WARNING)

    def stop() -> None:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)

    return stop


@contextmanager
def collected_log_lines() -> Iterator[list[str]]:
    """The WARNING messages that the library logs in the block."""
    handler = _ListHandler()
    _LOGGER.addHandler(handler)
    try:
        yield handler.lines
    finally:
        _LOGGER.removeHandler(handler)
