"""``hps-numba verify``: compares the tiers of a config with its sparse models, without a server."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._output import AsJson, print_json, print_table
from hps_numba.cli._tiers import (
    AllowCode,
    Config,
    ConfiguredTier,
    TierName,
    chosen_tiers,
    configured_tiers,
    done_tiers,
    is_private,
)
from hps_numba.errors import ConfigError, TierError

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig, TableSpec
    from hps_numba.storage.tiers._checked import CheckedTier

__all__ = ["PLUGIN"]

_SAMPLE = 10_000
_KINDS = ("missing", "wrong", "extra")


def verify(
    config: Config,
    model: Annotated[str | None, typer.Option(help="Model of the config; by default, all of them.")] = None,
    tier: TierName = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help=f"Rows of each table to compare, at random places; by default {_SAMPLE:,}.")
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Compare every row, and look for keys that the model lacks.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")] = 0,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Compare the tiers of a config with its sparse models.

    Counts the rows of the models that a tier lacks (missing), those that differ in a bit (wrong) and, with --whole, the keys
    of the tier that the model lacks (extra), and lists the first few. The exit code is 1 if there is any, or if a tier cannot
    be compared because it is down: the others are.
    """
    if whole and sample is not None:
        raise typer.BadParameter("is an option without --whole only", param_hint="--sample")
    tiers = configured_tiers(config, allow_code=allow_code)
    tables = _tables(tiers[0].config, model)
    rows = None if whole else sample or _SAMPLE
    results: list[dict[str, Any]] = []
    failed: list[TierError] = []
    for one in chosen_tiers(tiers, tier):
        try:
            results += _compared(one, tables, rows, seed, named=tier is not None)
        except TierError as problem:
            failed.append(problem)
            results.append({**one.facts, "error": str(problem)})
    if failed and all("error" in result or "skipped" in result for result in results):
        raise failed[0]
    compared = done_tiers([result for result in results if "error" not in result], "compare")
    ok = not failed and not any(result[kind] for result in compared for kind in _KINDS)
    if as_json:
        print_json({"config": config, "ok": ok, "sample": rows, "results": results})
    else:
        _show(compared, whole)
        for failure in failed:
            typer.echo(f"NOT COMPARED: {failure}")
    if not ok:
        raise typer.Exit(1)


PLUGIN = verify


def _tables(config: ServerConfig, model: str | None) -> list[TableSpec]:
    tables = [spec for spec in config.tables() if model in (None, spec.model)]
    if not tables:
        known = ", ".join(one.model for one in config.models)
        raise typer.BadParameter(f"expected one of {known}, got {model!r}", param_hint="--model")
    return tables


def _compared(
    tier: ConfiguredTier, tables: list[TableSpec], sample: int | None, seed: int, *, named: bool
) -> list[dict[str, Any]]:
    """What was found in each table of one tier."""
    with tier.open(read_only=True) as opened:
        if is_private(opened):
            why = "its rows live in the memory of one process; here it is empty"
            if named:
                raise ConfigError(f"{tier.name}: cannot be compared: {why}")
            return [tier.skipped(why)]
        rate = getattr(tier.section, "initial_cache_rate", 1.0)
        facts = {**tier.facts, "initial_cache_rate": rate}
        return [{**facts, **_table(opened, spec, tier.key_bits, sample, seed)} for spec in tables]


def _table(opened: CheckedTier, spec: TableSpec, key_bits: int, sample: int | None, seed: int) -> dict[str, Any]:
    from hps_numba.cli._tier_compare import compare_table
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import open_model

    with open_model(spec.source, spec.dim) as reader:
        total = min(sample, reader.rows) if sample else reader.rows + opened.size(spec.tag)
    with rows_progress(total, doing="comparing") as advance:
        found = compare_table(
            opened,
            spec.tag,
            spec.source,
            spec.dim,
            key_bits=key_bits,
            sample=sample,
            seed=seed,
            on_rows=partial(advance, spec.tag),
        )
    return {"table": spec.tag, **asdict(found)}


def _show(compared: list[dict[str, Any]], whole: bool) -> None:
    kinds = _KINDS if whole else _KINDS[:2]
    lines = [
        (one["tier"], one["table"], f"{one['rows']:,}", f"{one['compared']:,}", *(f"{one[kind]:,}" for kind in kinds))
        for one in compared
    ]
    print_table(("tier", "table", "rows of the model", "compared", *kinds), lines, left=2)
    for one in compared:
        for kind in kinds:
            if one[kind]:
                keys = one[f"{kind}_keys"]
                more = ", ..." if one[kind] > len(keys) else ""
                typer.echo(f"{kind} in {one['tier']}, {one['table']}: keys {', '.join(map(str, keys))}{more}")
        if one["missing"] and one["initial_cache_rate"] < 1:
            rate = one["initial_cache_rate"]
            typer.echo(f"{one['tier']}: a server starts it with the first {rate:.1%} of the rows (initial_cache_rate)")
    different = sum(any(one[kind] for kind in kinds) for one in compared)
    equal = "every row that was compared is equal, bit by bit"
    typer.echo(f"DIFFERENT: {different} of {len(compared)} tables" if different else equal)
