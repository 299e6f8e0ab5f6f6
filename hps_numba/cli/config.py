"""``hps-numba config``: checks config files and prints their schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba import plugins
from hps_numba.cli._output import AsJson, collected_log_lines, print_facts, print_json, print_table
from hps_numba.errors import ConfigError, HpsError
from hps_numba.runtime.paths import safe_to_show

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig, TableSpec

__all__ = ["PLUGIN"]

PLUGIN = typer.Typer(no_args_is_help=True, help="Check config files and print their schema.")


@PLUGIN.command("schema")
def schema() -> None:
    """Print the JSON schema of config files.

    It contains every key with its type, range, default and meaning; editors use it to complete and check config files.
    """
    from hps_numba.config import json_schema

    print_json(json_schema())


@PLUGIN.command("check")
def check(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A ps_config JSON file.")],
    strict: Annotated[bool, typer.Option("--strict", help="Unknown keys are errors instead of warnings.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a config file and the models it names.

    All invalid values are reported at once. If there are none, every sparse model is opened and its size is checked. The exit
    code is 1 if there is any problem.
    """
    from hps_numba.config import read_config

    with collected_log_lines() as warnings:
        try:
            server, problems = read_config(config, strict=strict), []
        except ConfigError as problem:
            server, problems = None, list(getattr(problem, "problems", (str(problem),)))
    report: dict[str, Any] = {"config": config, "ok": not problems, "problems": problems, "warnings": warnings}
    if server is not None:
        report |= _summary(server)
        problems += [*_unavailable(server), *(table["problem"] for table in report["tables"] if table["problem"])]
        report["ok"] = not problems
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["ok"]:
        raise typer.Exit(1)


def _summary(server: ServerConfig) -> dict[str, Any]:
    return {
        "key_bits": 64 if server.supportlonglong else 32,
        "volatile_db": server.volatile_db.type,
        "persistent_db": server.persistent_db.type,
        "update_source": server.update_source.type,
        "devices": sorted({device for model in server.models for device in model.deployed_device_list}),
        "tables": [_table(table) for table in server.tables()],
    }


def _unavailable(server: ServerConfig) -> Iterator[str]:
    """What the config requires and this installation or this machine lacks."""
    from hps_numba.config.messages import dotted
    from hps_numba.device.driver import device_count, why_no_device

    known = plugins.names("hps_numba.storage.tiers")
    for place, section in server.tier_sections():
        if not plugins.is_reference(section.type) and section.type not in known:
            yield f"{dotted(place)}.type: expected one of {', '.join(known)}, which this version has, got {section.type!r}"
    if server.require_gpu and not device_count():
        yield f"require_gpu: true, but {why_no_device()}"


def _table(table: TableSpec) -> dict[str, Any]:
    from hps_numba.storage.model_files import open_model

    rows, problem = None, None
    try:
        with open_model(table.source, table.dim) as model:
            rows = model.rows
    except (HpsError, OSError) as error:
        problem = f"{table.model}/{table.name}: {error}"
    return {
        "model": table.model,
        "table": table.name,
        "dim": table.dim,
        "default_value": table.default_value,
        "sparse_file": safe_to_show(table.source),
        "rows": rows,
        "problem": problem,
    }


def _show(report: dict[str, Any]) -> None:
    if "tables" in report:
        devices = ", ".join(map(str, report["devices"])) or "none (served by the CPU)"
        print_facts(
            [
                ("keys", f"{report['key_bits']} bits"),
                ("volatile_db", report["volatile_db"]),
                ("persistent_db", report["persistent_db"]),
                ("update_source", report["update_source"]),
                ("GPUs", devices),
            ]
        )
        columns = ("table", "sparse file", "dim", "default", "rows")
        print_table(columns, [_cells(table) for table in report["tables"]], left=2)
    for problem in report["problems"]:
        typer.echo(f"error: {problem}", err=True)
    counts = (_counted(len(report["problems"]), "problem"), _counted(len(report["warnings"]), "warning"))
    typer.echo(f"{report['config']}: {', '.join(filter(None, counts)) or 'ok'}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}" if number else ""


def _cells(table: dict[str, Any]) -> tuple[str, ...]:
    rows = "cannot be opened" if table["rows"] is None else f"{table['rows']:,}"
    name = f"{table['model']}/{table['table']}"
    return name, _short(table["sparse_file"]), f"{table['dim']}", f"{table['default_value']:g}", rows


def _short(source: str) -> str:
    """A path, relative to the working directory if it is inside."""
    path = Path(source)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else source
