"""``hps-numba load``: writes a sparse model to the tiers of a config, without a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._output import AsJson, human_rate, human_seconds, print_json
from hps_numba.cli._tiers import (
    DUMP_SUFFIXES,
    AllowCode,
    ConfiguredTier,
    TableTag,
    chosen_table,
    chosen_tiers,
    configured_tiers,
    done_tiers,
    is_private,
)
from hps_numba.errors import ConfigError, ModelFileError, TierError

if TYPE_CHECKING:
    import numpy as np

    from hps_numba.config import ServerConfig
    from hps_numba.storage.tiers._checked import CheckedTier

__all__ = ["PLUGIN"]


def load(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A sparse model of any format, or a dump (.bin, .sst).")],
    into: Annotated[
        str,
        typer.Option(metavar="CONFIG[:TIER]", help="A ps_config JSON file and, optionally, number, type or place of a tier."),
    ],
    table: TableTag = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Expected width of MODEL.")] = None,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a sparse model, or a dump of a table, to the tiers of a config.

    Without TIER, every tier that can be written and that other processes see is filled, the slowest first. Without --table,
    the rows go to the table of the config whose sparse file MODEL is. Rows are streamed. Rows that a tier has already are
    overwritten, so that a load that was interrupted is repeated by the same command; other rows stay.
    """
    path, name = _config_and_tier(into)
    tiers = configured_tiers(path, allow_code=allow_code)
    chosen = chosen_tiers(tiers, name, "--into")
    tag, expected = _table(tiers[0].config, table, model)
    if dim is not None and expected not in (None, dim):
        raise typer.BadParameter(f"expected {expected}, the width of {tag} in the config, got {dim}", param_hint="--dim")
    results = [_load_one(tier, model, dim or expected, tag, named=name is not None) for tier in reversed(chosen)]
    done = done_tiers(results, "load into")
    report = {"model": model, "table": tag, "tiers": results}
    if as_json:
        print_json(report)
    else:
        for one in done:
            _show(one, tag)


PLUGIN = load


def _config_and_tier(text: str) -> tuple[Path, str | None]:
    """The shortest head of ``text`` that is a file, and what follows it after a colon."""
    words = text.split(":")
    for count in range(1, len(words)):
        path = Path(":".join(words[:count]))
        try:
            if path.is_file():
                return path, ":".join(words[count:])
        except (OSError, ValueError):  # not the name of a file: read_config says why
            break
    return Path(text), None


def _table(config: ServerConfig, name: str | None, model: Path) -> tuple[str, int | None]:
    """Tag and, if it is known, width of the table to load."""
    if name is not None:
        tag, spec = chosen_table(config, name)
        return tag, None if spec is None else spec.dim
    found = [spec for spec in config.tables() if Path(spec.source).resolve() == model.resolve()]
    if len(found) == 1:
        return found[0].tag, found[0].dim
    several = ", ".join(spec.tag for spec in found or config.tables())
    why = f"{model} is the sparse file of {len(found)} tables" if found else f"{model} is not a sparse file of the config"
    raise typer.BadParameter(f"expected one of {several}: {why}", param_hint="--table")


def _load_one(tier: ConfiguredTier, model: Path, dim: int | None, tag: str, *, named: bool) -> dict[str, Any]:
    with tier.open(read_only=False) as opened:
        why = "it is read only" if opened.read_only else ""
        if is_private(opened):
            why = "its rows live only as long as their process"
        if why and named:
            raise ConfigError(f"{tier.name}: cannot be loaded into: {why}")
        if why:
            return tier.skipped(why)
        started = time.perf_counter()
        facts = {**tier.facts, **_write(opened, model, dim, tag, tier)}
        return {**facts, "size": opened.size(tag), "seconds": time.perf_counter() - started}


def _write(opened: CheckedTier, model: Path, dim: int | None, tag: str, tier: ConfiguredTier) -> dict[str, int]:
    """Insert all rows; how many, how many were new, and their width."""
    from hps_numba.runtime.progress import rows_progress

    done = new = 0
    with _rows_of(opened, model, dim, tier.key_bits) as (rows, dim, chunks), rows_progress(rows) as advance:
        for keys, part in chunks:
            try:
                new += opened.insert(tag, keys, part)
            except TierError as problem:
                again = "the same command writes all of them again"
                raise TierError(f"{problem} ({done:,} of {rows:,} rows are written; {again})") from problem
            done += len(keys)
            advance(tier.name, len(keys))
    return {"rows": done, "new": new, "dim": dim}


@contextmanager
def _rows_of(
    opened: CheckedTier, model: Path, dim: int | None, key_bits: int
) -> Iterator[tuple[int, int, Iterator[tuple[np.ndarray, np.ndarray]]]]:
    """Number, width and chunks of the rows of a sparse model, or of a dump of a database."""
    from hps_numba.storage.loading import stream_table
    from hps_numba.storage.model_files import open_model

    if model.suffix.lower() in DUMP_SUFFIXES:
        dump = opened.open_dump(model)
        if dump.pairs and dim not in (None, dump.dim):
            raise ModelFileError(f"{model}: expected rows of width {dim}, got {dump.dim}")
        yield dump.pairs, dump.dim, dump.chunks()
        return
    with open_model(model, dim) as reader:
        yield reader.rows, reader.dim, stream_table(reader, reader.rows, key_bits=key_bits)


def _show(one: dict[str, Any], tag: str) -> None:
    rate = human_rate(one["rows"] / max(one["seconds"], 1e-9), "rows/s")
    counts = f"{one['rows']:,} rows x {one['dim']} written, {one['new']:,} of them new"
    typer.echo(f"{one['tier']}: {tag}: {counts}, in {human_seconds(one['seconds'])}, {rate}")
    if one["size"] < one["rows"]:
        why = "of equal keys, the last is kept, and a tier with a bound drops rows"
        typer.echo(f"{one['tier']}: {tag}: has {one['size']:,} rows now: {why}")
