"""``hps-numba convert``: copies a sparse model to another format."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from hps_numba.cli._models import Overwrite, RowDtype, WriteFormat, counted, describe, size_on_disk
from hps_numba.cli._output import AsJson, human_seconds, print_json

__all__ = ["PLUGIN"]


def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A sparse model of any format: a directory, a file or a URL; FILE#TABLE.")
    ],
    dst: Annotated[
        str, typer.Argument(metavar="DST", help="The copy; its name decides the format (.h5: HDF5, else a directory).")
    ],
    dim: Annotated[int | None, typer.Option(min=1, help="Expected width of SRC.")] = None,
    format: WriteFormat = None,
    dtype: RowDtype = "float32",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy a sparse model to another format.

    Rows are streamed. DST appears only when it is complete. With --dtype, rows are rounded, and the largest error is printed.
    """
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.storage.model_files import convert_model, open_model
    from hps_numba.storage.urls import place_of

    source, target, losses = place_of(src, "SRC"), place_of(dst, "DST"), [0.0]
    with open_model(source, dim) as model:
        rows, dim, dropped = model.rows, model.dim, list(model.ignored)
    started = time.perf_counter()
    with rows_progress(rows) as advance:
        convert_model(
            source,
            target,
            dim=dim,
            format=format,
            overwrite=overwrite,
            on_progress=counted(advance, "converting"),
            dtype=dtype,
            on_loss=losses.append,
        )
    seconds = time.perf_counter() - started
    if as_json:
        print_json(
            {
                "source": str(source),
                "path": str(target),
                "rows": rows,
                "dim": dim,
                "bytes": size_on_disk(target),
                "dtype": dtype,
                "largest_error": losses[-1],
                "dropped": dropped,
                "seconds": seconds,
            }
        )
        return
    typer.echo(f"{describe(target, rows, dim)}, converted in {human_seconds(seconds)}")
    if dtype != "float32":
        typer.echo(f"rounded to {dtype}: the largest error of a value is {losses[-1]:.4g}")
    if dropped:
        typer.echo(f"not copied: {', '.join(dropped)}, as a sparse model has key, emb_vector and meta only", err=True)


PLUGIN = convert
