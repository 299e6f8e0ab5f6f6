"""Shared by the commands that read and write sparse models: options, and the description of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from hps_numba.storage.formats._tables import split_table
from hps_numba.storage.urls import Place, UrlPath

__all__ = ["Overwrite", "RowDtype", "WriteFormat", "counted", "describe", "size_on_disk"]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing model or file.")]
WriteFormat = Annotated[str | None, typer.Option("--format", help="directory or hdf5; by default, the name decides.")]


RowDtype = Annotated[str, typer.Option("--dtype", help="Store rows as float32, float16, bfloat16 (directory) or int8.")]


def size_on_disk(given: Place) -> int:
    """Bytes of a file, or of all files in a directory; of one that holds several tables, of all of them."""
    path, _ = split_table(given)
    if isinstance(path, UrlPath):
        return path.size()
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size


def describe(path: Place, rows: int, dim: int) -> str:
    """``path: 1,000 rows x 16, 70.3 KiB``."""
    from hps_numba.device.host_memory import human_bytes

    return f"{path}: {rows:,} rows x {dim}, {human_bytes(size_on_disk(path))}"


def counted(advance: Callable[[str, int], None], what: str) -> Callable[[int, int], None]:
    """A callback for writers, which call it with (rows done, total rows); it advances a progress bar."""
    before = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal before
        advance(what, done - before)
        before = done

    return on_progress
