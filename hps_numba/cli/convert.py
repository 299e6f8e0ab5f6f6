"""``hps-numba convert``: copies a sparse model to another format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hps_numba.cli._models import Overwrite, WriteFormat, counted, describe, size_on_disk
from hps_numba.cli._output import AsJson, human_seconds, print_json

__all__ = ["PLUGIN"]


def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A sparse model of any format: a directory or a file.")],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="The copy; its name decides the format (.h5: HDF5, else a directory).")
    ],
    dim: Annotated[int | None, typer.Option(min=1, help="Expected width of SRC.")] = None,
    format: WriteFormat = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy a sparse model to another format.

    Rows are streamed. DST appears only when it is complete.
    """
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import convert_model, open_model

    with open_model(src, dim) as model:
        rows, dim, dropped = model.rows, model.dim, list(model.ignored)
    started = time.perf_counter()
    with rows_progress(rows) as advance:
        convert_model(src, dst, dim=dim, format=format, overwrite=overwrite, on_progress=counted(advance, "converting"))
    seconds = time.perf_counter() - started
    if as_json:
        size = size_on_disk(dst)
        print_json(
            {"source": src, "path": dst, "rows": rows, "dim": dim, "bytes": size, "dropped": dropped, "seconds": seconds}
        )
    else:
        typer.echo(f"{describe(dst, rows, dim)}, converted in {human_seconds(seconds)}")
        if dropped:
            typer.echo(f"not copied: {', '.join(dropped)}, as a sparse model has key, emb_vector and meta only", err=True)


PLUGIN = convert
