"""``hps-numba tiers``: whether the tiers of a config answer, what is in them, and how fast they are."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from hps_numba.cli._output import AsJson, console, human_seconds, print_facts, print_json, print_table
from hps_numba.cli._tiers import AllowCode, Config, TierName, chosen_tiers, configured_tiers, label

__all__ = ["PLUGIN"]


def tiers(
    config: Config,
    tier: TierName = None,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Fetches of each kind whose time is taken.")] = 100,
    keys: Annotated[int, typer.Option(min=1, max=1_000_000, help="Keys in such a fetch.")] = 16,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Show whether the tiers of a config answer, and what is in them.

    Each tier is opened on its own, for reading, without a server: its tables with their rows, and the time of fetches of keys
    that it has and of keys that it lacks. Each kind of fetch is measured for 5 s at most. The exit code is 1 if a tier is down;
    one on a disk that nobody has written to yet is not.
    """
    from hps_numba.cli._tier_survey import survey_tier

    chosen = chosen_tiers(configured_tiers(config, allow_code=allow_code), tier)
    with nullcontext() if as_json else console(stderr=True).status("asking the tiers", refresh_per_second=2):
        surveys = [survey_tier(one, samples=samples, keys_each=keys) for one in chosen]
    down = [one["tier"] for one in surveys if one["error"] is not None]
    if as_json:
        print_json({"config": config, "ok": not down, "tiers": surveys})
    else:
        _show(surveys)
    if down:
        raise typer.Exit(1)


PLUGIN = tiers


def _show(surveys: list[dict[str, Any]]) -> None:
    print_facts((one["tier"], _line(one)) for one in surveys)
    tables = [(one["tier"], table) for one in surveys for table in one["tables"]]
    if tables:
        typer.echo("")
        print_table(("tier", "table", "dim", "rows", "bytes", "room for"), [_table(*pair) for pair in tables], left=2)
    times = [(one["tier"], kind, times) for one in surveys for kind, times in one["latency"].items()]
    if times:
        typer.echo("")
        print_table(("tier", "keys", "fetches", "keys each", "found", "p50", "p99"), [_times(*one) for one in times], left=2)


def _line(one: dict[str, Any]) -> str:
    what = label(one)
    if one["error"] is not None:
        return f"{what}: DOWN: {one['error']}"
    if not one["made"]:
        return f"{what}: nothing there yet; the start of a server, or the first write, makes it"
    words = [word for word in ("shared", "persistent") if one[word]] + (["read only"] if one["read_only"] else [])
    if one["private"]:
        words.append("in the memory of each process: empty in this new one")
    return f"{what}: answers; {', '.join(words)}"


def _table(tier: str, table: dict[str, Any]) -> tuple[str, ...]:
    from hps_numba.device.host_memory import human_bytes

    name = table["table"] if table["in_config"] else f"{table['table']} (not in the config)"
    room = "any number" if table["capacity"] is None else f"{table['capacity']:,}"
    return tier, name, f"{table['dim']}", f"{table['rows']:,}", human_bytes(table["bytes"]), room


def _times(tier: str, kind: str, times: dict[str, Any]) -> tuple[str, ...]:
    share = times["found"] / (times["fetches"] * times["keys_each"])
    seconds = [human_seconds(times[f"{name}_seconds"]) for name in ("p50", "p99")]
    return tier, kind, f"{times['fetches']:,}", f"{times['keys_each']:,}", f"{share:.0%}", *seconds
