"""``hps-numba dump``: copies a table of a tier to a file, without a server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli._models import Overwrite, describe, size_on_disk
from hps_numba.cli._output import AsJson, human_seconds, print_json
from hps_numba.cli._tiers import (
    DUMP_SUFFIXES,
    AllowCode,
    Config,
    TierName,
    chosen_table,
    chosen_tiers,
    configured_tiers,
    is_private,
)
from hps_numba.errors import ModelFileError, TierError

if TYPE_CHECKING:
    import numpy as np

    from hps_numba.storage.tiers._checked import CheckedTier

__all__ = ["PLUGIN"]


def dump(
    config: Config,
    table: Annotated[str, typer.Option(help="The table: hps_et.MODEL.TABLE, or MODEL/TABLE of the config.")],
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write: .bin or .sst, a dump of a database; else a sparse model (.h5: HDF5, or a directory)."
        ),
    ],
    tier: TierName = None,
    overwrite: Overwrite = False,
    allow_code: AllowCode = False,
    as_json: AsJson = False,
) -> None:
    """Copy a table of a tier to a file.

    Rows are streamed; the file appears only when it is complete. The rows are those of the moment in which each was read: a
    table that a server writes meanwhile is not frozen.
    """
    tiers = chosen_tiers(configured_tiers(config, allow_code=allow_code), tier)
    if len(tiers) > 1:
        raise typer.BadParameter(
            f"expected one of {', '.join(one.name for one in tiers)}: the config has several", param_hint="--tier"
        )
    source = tiers[0]
    tag, _ = chosen_table(source.config, table)
    if os.path.lexists(out) and not overwrite:
        raise ModelFileError(f"{out}: exists already; pass --overwrite to replace it")
    started = time.perf_counter()
    with source.open(read_only=True) as opened:
        rows, dim = _copy(opened, tag, out, overwrite)
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                **source.facts,
                "table": tag,
                "path": out,
                "rows": rows,
                "dim": dim,
                "bytes": size_on_disk(out),
                "seconds": seconds,
            }
        )
    else:
        typer.echo(f"{describe(out, rows, dim)}, dumped from {source.name} in {human_seconds(seconds)}")


PLUGIN = dump


def _copy(tier: CheckedTier, tag: str, out: Path, overwrite: bool) -> tuple[int, int]:
    """Write all rows of a table to ``out``; their number and width."""
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import write_model

    dim = next((rows.shape[1] for _, rows in tier.scan(tag, 1)), None)
    if dim is None:
        why = " (its rows live only as long as their process)" if is_private(tier) else ""
        raise TierError(f"{tag}: expected one of the tables of the tier, {', '.join(tier.tables()) or 'which has none'}{why}")
    with rows_progress(tier.size(tag), doing="dumping") as advance:
        if out.suffix.lower() in DUMP_SUFFIXES:
            return _dump(tier, tag, out, advance), dim
        return write_model(out, dim, _counted(tier.scan(tag), advance), overwrite=overwrite), dim


def _dump(tier: CheckedTier, tag: str, out: Path, advance: Callable[[str, int], None]) -> int:
    """``Tier.dump``; the rows are counted as they are scanned, unless the tier has a way of its own to dump them."""
    from hps_numba.storage.tiers._tier import Tier
    from hps_numba.storage.tiers._wrappers import WrapperTier

    class Counting(WrapperTier):
        def scan(self, table: str, chunk_rows: int = 65536) -> Iterator[tuple[Any, Any]]:
            yield from _counted(super().scan(table, chunk_rows), advance)

    own_way = type(tier.inner).dump is not Tier.dump
    return tier.dump(tag, out) if own_way else Counting(tier).dump(tag, out)


def _counted(
    chunks: Iterator[tuple[np.ndarray, np.ndarray]], advance: Callable[[str, int], None]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for keys, rows in chunks:
        yield keys, rows
        advance("dumping", len(keys))
