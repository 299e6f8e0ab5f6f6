"""How a command fails: with one line on stderr and an exit code, never with a traceback.

``HPS_NUMBA_DEBUG=1`` in the environment shows the traceback instead.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from hps_numba.errors import HpsError

__all__ = ["CommandTree", "one_line"]

_ARGUMENT = re.compile(r"\bpass (overwrite|format|dim|allow_code)\b(=True)?")  # arguments of the library that are options here
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
_MAX_LINE = 1200


class CommandTree(TyperGroup):
    """The root of the commands: runs a command and turns any exception into a line and an exit code."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit; with ``standalone_mode=False``, return and raise as typer does."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # names of files may hold what no text can
        run = functools.partial(super().main, *args, **{**options, "standalone_mode": False})
        if options.get("standalone_mode", True):
            sys.exit(_exit_code(run))
        return run()

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        """Names of the commands, sorted."""
        return sorted(self.commands)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run the command; Ctrl-C becomes ``Abort``, which typer passes on."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Abort from None


def _exit_code(run: Callable[[], Any]) -> int:
    try:
        code = run()
        sys.stdout.flush()
    except typer.Abort:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        return _pipe_closed()
    except Exception as problem:
        if hasattr(problem, "format_message"):  # a usage error of typer, whose class differs between its versions
            return _usage_error(problem)
        if os.environ.get("HPS_NUMBA_DEBUG"):
            raise
        return _failed(problem)
    return int(code or 0)


def _failed(problem: Exception) -> int:
    if isinstance(problem, HpsError):
        return _fail(one_line(problem), FAILED)
    if isinstance(problem, OSError):
        return _fail(_system_error(problem), FAILED)
    if isinstance(problem, MemoryError):
        return _fail("out of memory", FAILED)
    kind = type(problem).__name__
    return _fail(f"{kind}: {' '.join(str(problem).split())} (a bug; HPS_NUMBA_DEBUG=1 shows the traceback)", FAILED)


def _fail(line: str, code: int) -> int:
    line = " ".join(line.split())
    if len(line) > _MAX_LINE:  # a value that was given is shown in full by some messages
        line = f"{line[: _MAX_LINE // 2]} ... {line[-_MAX_LINE // 2 :]}"
    typer.echo(f"error: {line}", err=True)
    return code


def _usage_error(problem: Any) -> int:
    context = getattr(problem, "ctx", None)
    if type(problem).__name__ == "NoArgsIsHelpError":
        problem.show()
        return MISUSED
    more = f" (see {context.command_path} --help)" if context else ""
    return _fail(f"{' '.join(problem.format_message().split())}{more}", MISUSED)


def one_line(problem: HpsError) -> str:
    """The message of an error of the library, which calls the options of commands by their names."""
    problems: tuple[str, ...] = getattr(problem, "problems", ())
    if len(problems) < 2:
        return _ARGUMENT.sub(lambda found: f"pass --{found[1].replace('_', '-')}", " ".join(str(problem).split()))
    first = str(problem).splitlines()[0]
    return f"{first}, and {len(problems) - 1} more (hps-numba config check lists them)"


def _system_error(problem: OSError) -> str:
    reason = problem.strerror or " ".join(str(problem).split()) or type(problem).__name__
    return reason if problem.filename is None else f"{problem.filename}: {reason}"


def _pipe_closed() -> int:
    """The reader of our output has closed the pipe (``| head``): write nothing more, not even at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED
