"""``hps-numba``: the command line, with one file per command; the name of the file is the name of the command,
with ``-`` for ``_``.

A command file defines ``PLUGIN``: a function, whose docstring is the help text, or a ``typer.Typer`` with subcommands. Files
with a leading underscore hold the parts of commands. Heavy imports are delayed until a command runs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hps_numba import __version__, plugins
from hps_numba.cli._errors import CommandTree
from hps_numba.cli._output import show_log_lines

__all__ = ["build", "main"]


def build() -> typer.Typer:
    """The command tree, with every command file of this folder."""
    app = typer.Typer(
        cls=CommandTree,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich" if sys.stdout.isatty() else None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name in plugins.names(__name__):
        command, shown = plugins.load(__name__, name), name.replace("_", "-")
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=shown)
        else:
            app.command(shown)(command)
    return app


def main() -> None:
    """Run the command in ``sys.argv``, then exit: 0 success, 1 failure, 2 usage error."""
    build()(prog_name="hps-numba")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"hps-numba {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show log messages at level INFO.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A hierarchical parameter server for recommender models in pure Python, with exact embedding lookups."""
    context.call_on_close(show_log_lines(verbose))
