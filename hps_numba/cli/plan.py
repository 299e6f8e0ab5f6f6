"""``hps-numba plan``: memory requirements, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from hps_numba.server.plan import Plan

__all__ = ["PLUGIN"]


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A ps_config JSON file.")],
    as_json: AsJson = False,
) -> None:
    """Show how much memory a config needs.

    Shows the bytes of each table in each tier, and whether they fit in the memory of this machine. Only the sizes of the
    sparse models are read; nothing is allocated. The exit code is 1 if the plan does not fit.
    """
    from hps_numba.config import read_config
    from hps_numba.server.plan import make_plan

    planned = make_plan(read_config(config))
    if as_json:
        print_json(planned.as_dict())
    else:
        _show(planned)
    if not planned.fits:
        raise typer.Exit(1)


def _show(planned: Plan) -> None:
    from hps_numba.device.host_memory import human_bytes

    cached = any(table.cache_bytes for table in planned.tables)
    rows = [
        (
            f"{table.model}/{table.table}",
            f"{table.dim}",
            f"{table.rows:,}",
            f"{table.host_rows:,}",
            human_bytes(table.host_bytes),
            human_bytes(table.persistent_bytes),
            *([human_bytes(table.cache_bytes)] if cached else []),
        )
        for table in planned.tables
    ]
    persistent = sum(table.persistent_bytes for table in planned.tables)
    caches = sum(table.cache_bytes for table in planned.tables)
    host_rows = sum(table.host_rows for table in planned.tables)
    sums = [human_bytes(size) for size in (planned.host_bytes, persistent, caches)]
    rows.append(("all tables", "", "", f"{host_rows:,}", *sums[: 3 if cached else 2]))
    heads = ("table", "dim", "rows in file", "rows in host memory", "host memory", "persistent", "each cache")
    print_table(heads[: 7 if cached else 6], rows)
    for device, size in planned.device_bytes.items():
        mirrors = planned.index_mirror_bytes[device]
        more = f", plus {human_bytes(mirrors)} for index mirrors if they fit" if mirrors else ""
        typer.echo(f"{human_bytes(size)} on device {device}{more}")
    peak, free = planned.host_bytes + planned.loading_bytes, planned.available_bytes
    verdict = "fits" if planned.fits else f"DOES NOT FIT: {human_bytes(peak - free)} too much"
    typer.echo(f"{human_bytes(peak)} of host memory while loading, {human_bytes(free)} available: {verdict}")


PLUGIN = plan
