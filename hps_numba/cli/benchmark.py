"""``hps-numba benchmark``: measures what a deployment is made of (checklist O06)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._output import AsJson, console, human_rate, human_seconds, print_facts, print_json, print_table
from hps_numba.cli._tiers import AllowCode, ConfiguredTier, TierName, chosen_tiers, configured_tiers, done_tiers, label

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig

__all__ = ["PLUGIN"]

PLUGIN = typer.Typer(no_args_is_help=True, help="Measure the storage tiers of this machine and network.")

_MAX_BATCH = 10_000_000


@PLUGIN.callback()
def benchmark() -> None:
    """Measure the storage tiers of this machine and network."""


@PLUGIN.command("tiers")
def tiers(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="A ps_config JSON file, or --type instead.")] = None,
    type: Annotated[str | None, typer.Option(help="Type of one tier to measure instead of those of a config.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Key of the section of that tier; may be given several times.")
    ] = None,
    tier: TierName = None,
    rows: Annotated[int, typer.Option(min=1, max=2**31, help="Most rows in the table.")] = 100_000,
    dim: Annotated[int, typer.Option(min=1, max=1 << 20, help="Floats in a row.")] = 32,
    batch_size: Annotated[list[str] | None, typer.Option(help="Keys in a call, by default 1,64,1024,16384.")] = None,
    seconds: Annotated[float, typer.Option(min=0.001, max=3600, help="Most seconds for one measurement.")] = 2.0,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast tiers insert, overwrite, fetch and erase rows.

    A table of its own is written in each tier that can be written, and removed afterwards. Some rows are compared with what
    was written: the exit code is 1 if one is wrong.
    """
    source = config if type is None else _config_of(type, option or [], dim)
    if source is None or (config is not None and type is not None):
        raise typer.BadParameter("expected either a config or --type", param_hint="CONFIG")
    if option and type is None:
        raise typer.BadParameter("is an option for --type only", param_hint="--option")
    sizes = _sizes(batch_size)
    chosen = chosen_tiers(configured_tiers(source, allow_code=allow_code), tier)
    results = [_measured(one, rows, dim, sizes, seconds, show=not as_json) for one in chosen]
    measured = done_tiers(results, "measure")
    wrong = sum(one["wrong_rows"] for one in measured)
    if as_json:
        print_json({"rows": rows, "dim": dim, "ok": not wrong, "tiers": results})
    else:
        _show(measured, dim)
    if wrong:
        raise typer.Exit(1)


def _config_of(kind: str, options: list[str], dim: int) -> ServerConfig:
    """A config with one tier, and a model that is never opened, as a config has to have one."""
    from hps_numba.config import read_config

    section: dict[str, Any] = {"type": kind}
    for text in options:
        key, equals, value = text.partition("=")
        if not (key and equals) or key == "type":
            raise typer.BadParameter(f"expected KEY=VALUE, got {text!r}", param_hint="--option")
        try:
            section[key] = json.loads(value)
        except (ValueError, RecursionError):
            section[key] = value
    model = {
        "model": "benchmark",
        "sparse_files": ["benchmark.model"],
        "embedding_vecsize_per_table": [dim],
        "maxnum_catfeature_query_per_table_per_sample": [1],
        "default_value_for_each_table": [0.0],
        "deployed_device_list": [],
    }
    return read_config({"supportlonglong": True, "models": [model], "tiers": [section]})


def _sizes(given: list[str] | None) -> tuple[int, ...]:
    words = [word.strip() for text in given or ["1,64,1024,16384"] for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 9 and 0 < int(word) <= _MAX_BATCH):
            raise typer.BadParameter(f"expected a number in 1..{_MAX_BATCH}, got {word!r}", param_hint="--batch-size")
    return tuple(int(word) for word in words)


def _measured(
    tier: ConfiguredTier, rows: int, dim: int, sizes: tuple[int, ...], seconds: float, *, show: bool
) -> dict[str, Any]:
    from hps_numba.cli._tier_rates import TierRates

    if getattr(tier.section, "read_only", False):
        return tier.skipped("it is read only")
    with tier.open(read_only=False) as opened, console(stderr=True).status(tier.name) if show else nullcontext() as status:
        if opened.read_only:
            return tier.skipped("it is read only")
        say = (lambda text: None) if status is None else (lambda text: status.update(f"{tier.name}: {text}"))
        rates = TierRates(rows=rows, dim=dim, sizes=sizes, seconds=seconds, key_bits=tier.key_bits, say=say)
        return {**tier.facts, "results": rates.run(opened), "wrong_rows": rates.wrong}


def _show(measured: list[dict[str, Any]], dim: int) -> None:
    print_facts((one["tier"], label(one)) for one in measured)
    typer.echo("")
    print_table(
        ("tier", "operation", "batch", "calls", "found", "keys/s", "rows", "p50", "p99"),
        [_line(one["tier"], line) for one in measured for line in one["results"]],
        left=2,
    )
    typer.echo("")
    typer.echo(f"rows: bytes of rows of {dim} float32 that were written or found in a second. p50, p99: of a call.")
    wrong = sum(one["wrong_rows"] for one in measured)
    typer.echo(f"FAILED: {wrong:,} rows differ from what was written" if wrong else "every row that was checked is right")


def _line(tier: str, line: dict[str, Any]) -> tuple[str, ...]:
    share = line["found"] / max(1, line["keys"])
    seconds = [human_seconds(line[f"{name}_seconds"]) for name in ("p50", "p99")]
    rate = human_rate(line["keys_per_second"], "").strip()
    return (
        tier, line["operation"], f"{line['batch_size']:,}", f"{line['calls']:,}", f"{share:.0%}",
        rate, human_rate(line["bytes_per_second"], "B/s") if line["bytes_per_second"] else "", *seconds,
    )  # fmt: skip
