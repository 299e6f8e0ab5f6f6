"""``hps-numba plan``: memory requirements, before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hps_numba.cli._output import AsJson, print_json, print_table

if TYPE_CHECKING:
    from hps_numba.cache.memory_use import CacheMemory
    from hps_numba.server.plan import DevicePlan, Plan

__all__ = ["PLUGIN"]

_OF_CACHES = ("index", "rows", "policy", "index_mirror", "workspaces", "group_workspaces", "staging")


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A ps_config JSON file.")],
    as_json: AsJson = False,
) -> None:
    """Show how much memory a config needs.

    Shows the bytes of each table in each tier and in each cache, by what they are for, and whether they fit in the memory of
    this machine and its devices. Only the sizes of the sparse models are read; nothing is allocated. The exit code is 1 if the
    plan does not fit.
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

    _show_tables(planned)
    if any(table.cache.bytes for table in planned.tables):
        _show_caches(planned)
    for device in planned.devices:
        _show_device(device)
    for line in _on_top(planned):
        typer.echo(line)
    peak, free = planned.host_bytes + planned.loading_bytes, planned.available_bytes
    verdict = "fits" if planned.fits_host else f"DOES NOT FIT: {human_bytes(peak - free)} too much"
    typer.echo(f"{human_bytes(peak)} of host memory while loading, {human_bytes(free)} available: {verdict}")


def _show_tables(planned: Plan) -> None:
    from hps_numba.device.host_memory import human_bytes

    pinned = planned.pinned_bytes
    rows: list[tuple[str, ...]] = [
        (
            f"{table.model}/{table.table}",
            f"{table.dim}",
            f"{table.rows:,}",
            f"{table.host_rows:,}",
            human_bytes(table.host_bytes),
            human_bytes(table.persistent_bytes),
            *([human_bytes(table.pinned_bytes)] if pinned else []),
        )
        for table in planned.tables
    ]
    host_rows = sum(table.host_rows for table in planned.tables)
    rows_bytes = sum(table.host_bytes for table in planned.tables)
    persistent = sum(table.persistent_bytes for table in planned.tables)
    columns = 7 if pinned else 6
    sums = [human_bytes(size) for size in (rows_bytes, persistent, pinned)]
    rows.append(("all tables", "", "", f"{host_rows:,}", *sums[: columns - 4]))
    heads = ("table", "dim", "rows in file", "rows in host memory", "host memory", "persistent", "pinned for caches")
    print_table(heads[:columns], rows)


def _show_caches(planned: Plan) -> None:
    """A table of what each cache takes, without the kinds of memory that none takes."""
    from hps_numba.device.host_memory import human_bytes

    kinds = [kind for kind in _OF_CACHES if any(getattr(table.cache, kind) for table in planned.tables)]

    def line(name: str, memory: CacheMemory) -> tuple[str, ...]:
        return (name, *(human_bytes(getattr(memory, kind)) for kind in kinds), human_bytes(memory.bytes))

    rows = [line(f"{table.model}/{table.table}", table.cache) for table in planned.tables if table.cache.bytes]
    rows += [line(f"device {device.device}", device.memory) for device in planned.devices]
    print_table(("each cache", *(kind.replace("_", " ") for kind in kinds), "all"), rows)


def _show_device(device: DevicePlan) -> None:
    from hps_numba.device.host_memory import human_bytes

    mirrors = device.memory.index_mirror
    of_it = f", of it {human_bytes(mirrors)} for index mirrors if they fit" if mirrors else ""
    what = f"{human_bytes(device.bytes)} on device {device.device}{of_it}"
    if device.free_bytes is None or device.total_bytes is None:
        typer.echo(f"{what}, which this machine does not have")
        return
    verdict = "fits" if device.fits else f"DOES NOT FIT: {human_bytes(device.needed_bytes - device.free_bytes)} too much"
    typer.echo(f"{what}, {human_bytes(device.free_bytes)} of {human_bytes(device.total_bytes)} free: {verdict}")


def _on_top(planned: Plan) -> list[str]:
    """What is taken on top of the plan, if it comes to that."""
    from hps_numba.device.host_memory import human_bytes

    tables = planned.tables
    graph = max((table.graph_bytes for table in tables), default=0)
    group = sum(table.group_bytes for table in tables if not table.cache.group_workspaces)
    listing = max((table.listing_bytes for table in tables), default=0)
    growth = max((table.growth_bytes for table in tables), default=0)
    lines = [
        (graph, "on a device for each lookup that a CUDA graph captures"),
        (group, "on a device for each selection of tables that is looked up together"),
        (listing, "where the cache is while a lookup runs, for keys that slower tiers are asked for"),
        (growth, "of host memory when rows are written to a table"),
    ]
    return [f"on top: up to {human_bytes(size)} {what}" for size, what in lines if size]


PLUGIN = plan
