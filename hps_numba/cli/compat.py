"""``hps-numba compat``: HugeCTR's package names for every process of the environment, notebooks too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hps_numba.cli._output import AsJson, print_facts, print_json
from hps_numba.compat import environment
from hps_numba.compat.folder import PACKAGES

__all__ = ["PLUGIN"]

PLUGIN = typer.Typer(no_args_is_help=True, help="Serve scripts of HugeCTR HPS unchanged, in every process of the environment.")

User = Annotated[bool, typer.Option("--user", help="For all environments of this user that see the user's packages.")]


@PLUGIN.command("enable")
def enable(user: User = False, as_json: AsJson = False) -> None:
    """Let every Python process import hugectr, hps_torch and hierarchical_parameter_server from hps_numba.

    Writes one file to the site-packages of the environment. HugeCTR itself, if it is installed, keeps its names.
    """
    path = environment.enable(environment.site_folder(user=user))
    found = environment.origins()
    foreign = {name: where for name, where in found.items() if not _is_ours(where)}
    if as_json:
        print_json({"written": path, "found": found, "ok": not foreign})
    else:
        typer.echo(f"wrote {path}")
    for name, where in foreign.items():
        instead = "new processes do not find it" if where is None else f"new processes find that in {where}"
        typer.echo(f"warning: {name}: {instead}; python -m hps_numba.compat script.py takes hps_numba's", err=True)


@PLUGIN.command("disable")
def disable(user: User = False, as_json: AsJson = False) -> None:
    """Undo `enable`."""
    folder = environment.site_folder(user=user)
    path = folder / environment.FILE
    removed = environment.disable(folder)
    if as_json:
        print_json({"removed": path if removed else None})
    else:
        typer.echo(f"removed {path}" if removed else f"nothing to remove: {path} is not there")


@PLUGIN.command("status")
def status(as_json: AsJson = False) -> None:
    """Show where the packages of HugeCTR come from in a new process of this environment."""
    folders = [environment.site_folder()]
    if environment.site.ENABLE_USER_SITE:
        folders.append(environment.site_folder(user=True))
    files = [folder / environment.FILE for folder in folders if environment.is_enabled(folder)]
    found = environment.origins()
    if as_json:
        print_json({"enabled": bool(files), "files": files, "found": found})
        return
    print_facts(
        [("enabled", ", ".join(map(str, files)) or "no"), *((name, where or "not found") for name, where in found.items())]
    )


def _is_ours(where: str | None) -> bool:
    return where is not None and Path(where).is_relative_to(PACKAGES)
