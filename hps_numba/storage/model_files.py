"""Open, write and convert sparse models of any format.

Formats are the files of :mod:`hps_numba.storage.formats`; the content of a file decides which one reads it, and its
name only where the content tells nothing. A model that is written appears whole or not at all. Every path may be a URL
(:mod:`hps_numba.storage.urls`), and ``path#table`` names one of several tables.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hps_numba import plugins
from hps_numba.config.arguments import as_count, as_flag, as_function, as_optional
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, HpsError, ModelFileError
from hps_numba.runtime.replacing import Judge, leftovers
from hps_numba.storage.formats._arrays import NAMES, ROW_DTYPES
from hps_numba.storage.formats._chunks import checked_chunks, writing
from hps_numba.storage.formats._format import MAX_DIM, PathLike, Progress, SparseModelFormat, SparseModelReader, translated
from hps_numba.storage.formats._rounding import checked_rounding
from hps_numba.storage.formats._tables import split_table
from hps_numba.storage.replacing import replacing
from hps_numba.storage.urls import Place, UrlPath, place_of

__all__ = ["convert_model", "formats", "open_model", "write_model"]

log = logging.getLogger(__name__)
_PACKAGE = "hps_numba.storage.formats"
_NOT_ONLY = "may hold more than one sparse model"
_FILES = {"dtype", *(f"{name}{ending}" for name in NAMES for ending in ("", ".npy"))}


def formats() -> list[SparseModelFormat]:
    """All formats, by name; an installed one that cannot be loaded, or is none, is logged as a WARNING and left out."""
    found = []
    for name in plugins.names(_PACKAGE):
        try:
            found.append(_named_format(name))
        except ModelFileError as problem:
            log.warning("format %s", problem)
    return found


def open_model(
    path: PathLike | UrlPath, dim: int | None = None, *, format: str | None = None, allow_code: bool = False
) -> SparseModelReader:
    """Open a sparse model.

    Args:
        path: directory or file, or its URL; ``path#table`` for one of the tables of a dump or checkpoint that holds several.
        dim: row width that it must have; None takes the file's.
        format: name of a format, or ``module:NAME`` or ``file.py:NAME`` of one's own; None detects it.
        allow_code: ``format`` may be a reference, which is imported.

    Returns:
        A reader, which is a context manager.

    Raises:
        ModelFileError: missing, damaged, of another width, or of no known format; or ``format`` is not one.
        ConfigError (a ValueError): ``dim`` is less than 1, or an argument is of another type.
    """
    where = place_of(path)
    as_flag(allow_code, "allow_code")
    found = _format_of(where) if format is None else _named_format(format, allow_code)
    return found.open(where, dim)


def _named_format(name: str, allow_code: bool = False) -> SparseModelFormat:
    found = plugins.load(_PACKAGE, name, allow_code=allow_code, error=ModelFileError)
    if not isinstance(found, SparseModelFormat):
        raise ModelFileError(f"{name!r}: expected an instance of SparseModelFormat, got {found!r}")
    return found


def _format_of(given: Place) -> SparseModelFormat:
    path, _ = split_table(given)
    every = formats()
    named = [found for found in every if path.suffix.lower() in found.suffixes]
    with translated(given):
        if not path.exists():
            raise ModelFileError(f"{given}: no such file or directory{_hint(path)}")
        for found in [*named, *every] if isinstance(path, UrlPath) else every:  # at a URL, each question is a request
            if (found.reads_urls or not isinstance(path, UrlPath)) and found.detect(path):
                return found
    if named:
        return named[0]
    raise ModelFileError(f"{given}: expected one of the known formats ({', '.join(found.name for found in every)})")


def _hint(path: Place) -> str:
    """Where an overwrite that was killed between its two renames left the old model, for a message."""
    if isinstance(path, UrlPath):
        return ""
    kept = [workspace / "old" for workspace in leftovers(path) if (workspace / "old").exists()]
    return f"; an interrupted overwrite left the old one at {kept[0]}" if kept else ""


def write_model(
    path: PathLike | UrlPath,
    dim: int,
    chunks: Iterable[tuple[Any, ...]],
    *,
    format: str | None = None,
    rows: int | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    on_progress: Progress | None = None,
    dtype: str = "float32",
    on_loss: Callable[[float], None] | None = None,
) -> int:
    """Write a sparse model and return its number of rows.

    Everything is written to a hidden sibling first, flushed to the disk, and then renamed: whenever the process or the machine
    stops, ``path`` is the old model, the new one or (between two renames, when a directory is replaced) missing. Readers
    ignore what a killed writer left; the next writer of the same path removes it, and restores the old model if it is missing.
    At a URL, everything is written to a temporary directory first and then sent; where a directory is replaced there, its old
    ``key`` goes first and the new one comes last, so that there is a whole model or none.

    Args:
        path: to be created; a local path or a URL.
        dim: floats in a row, at least 1.
        chunks: yields ``(keys int64[m], rows float32[m, dim])`` or ``(keys, rows, meta int64[m])``; float16 and float64
            rows and other integers are converted. A chunk is consumed before the next one is asked for, so its arrays may be
            reused.
        format: as in :func:`open_model`; None takes it from the suffix: none or ``.model`` a directory, ``.h5`` HDF5.
        rows: number of rows to come, if known; any other number is then an error.
        overwrite: replace an existing model; only a whole sparse model, and a directory that holds nothing else, is replaced.
        allow_code: ``format`` may be a reference, which is imported.
        on_progress: called with (rows done, ``rows`` or rows done) after each chunk.
        dtype: what rows are stored as: ``float32``; ``float16`` or ``int8`` (with a scale a row) in a directory or HDF5 file;
            ``bfloat16`` in a directory. Rows are rounded, and readers give them as float32 again.
        on_loss: called once, with the largest absolute error of a value that rounding made.

    Raises:
        ModelFileError: ``path`` exists and may not be replaced, the format cannot write (this ``dtype``), a chunk does not fit,
            a value cannot be stored as ``dtype``, or the disk or store refuses.
        KeyDtypeError: keys are not integers.
        ConfigError (a ValueError): ``dim`` is less than 1, or an argument is of another type.
    """
    dim = as_count(dim, "dim", 1, MAX_DIM)
    rows = as_optional(rows, partial(as_count, low=0), "rows")
    overwrite, allow_code = as_flag(overwrite, "overwrite"), as_flag(allow_code, "allow_code")
    on_progress = as_optional(on_progress, as_function, "on_progress")
    on_loss = as_optional(on_loss, as_function, "on_loss")
    target = place_of(path)
    writer = _writing_format(target, format, allow_code)
    options = _row_options(target, writer, dtype)
    checked = checked_chunks(target, dim, chunks, rows, on_progress)
    with (
        replacing(target, overwrite=overwrite, judge=_judge_for(writer), url_judge=_url_judge) as new,
        writing(target, checked_rounding(target, checked, dtype, on_loss)) as source,
    ):
        return writer.write(new, dim, source, **options)


def _row_options(path: Place, writer: SparseModelFormat, dtype: str) -> dict[str, Any]:
    """What ``write`` of the format takes beside the chunks."""
    if not isinstance(dtype, str) or dtype not in ROW_DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(ROW_DTYPES)}, got {show(dtype)}")
    if dtype not in writer.row_dtypes:
        able = ", ".join(found.name for found in formats() if found.can_write and dtype in found.row_dtypes)
        raise ModelFileError(f"{path}: expected a format that can write {dtype} rows ({able}), got {writer.name}")
    return {} if dtype == "float32" else {"dtype": dtype}


def _writing_format(path: Place, name: str | None, allow_code: bool) -> SparseModelFormat:
    if name is not None:
        found = _named_format(name, allow_code)
    else:
        matches = [found for found in formats() if path.suffix.lower() in found.suffixes]
        if not matches:
            raise ModelFileError(f"{path}: expected a suffix of {_writable()} or format=, got {path.suffix!r}")
        found = matches[0]
    if not found.can_write:
        raise ModelFileError(f"{path}: expected a format that can write ({_writable()}), got {found.name}")
    return found


def _writable() -> str:
    choices = [
        f"{found.name} ({', '.join(suffix or 'no suffix' for suffix in found.suffixes)})"
        for found in formats()
        if found.can_write
    ]
    return ", ".join(choices)


def _judge_for(writer: SparseModelFormat) -> Judge:
    """Only a whole sparse model may be replaced, and a directory only if there is nothing else in it."""

    def judge(place: Path) -> str | None:
        try:
            if place.is_dir():
                entries = list(place.iterdir())
                strangers = [entry.name for entry in entries if entry.name not in _FILES or not entry.is_file()]
                if strangers:
                    return f"holds {min(strangers)!r}, which is not part of a sparse model"
                if not any(entry.stat().st_size for entry in entries):
                    return None
            with _reader_of(place, writer).open(place) as model:
                return None if model.is_model else _NOT_ONLY
        except (HpsError, OSError) as problem:
            if not os.path.lexists(place):  # another writer is replacing it at this moment
                return None
            return f"is not a whole sparse model ({str(problem).removeprefix(f'{place}: ')})"
        return None

    return judge


def _url_judge(place: UrlPath) -> str | None:
    """The same at a URL."""
    if place.is_dir() and (strangers := place.names() - _FILES):
        return f"holds {min(strangers)!r}, which is not part of a sparse model"
    try:
        with open_model(place) as model:
            return None if model.is_model else _NOT_ONLY
    except HpsError as problem:
        return f"is not a whole sparse model ({str(problem).removeprefix(f'{place}: ')})"
    return None


def _reader_of(place: Path, writer: SparseModelFormat) -> SparseModelFormat:
    """The format that reads what is at ``place``, by its content; if none does, the one that is to write there."""
    return next((found for found in formats() if found.detect(place)), writer)


def convert_model(
    src: PathLike | UrlPath,
    dst: PathLike | UrlPath,
    *,
    dim: int | None = None,
    format: str | None = None,
    chunk_rows: int | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    on_progress: Progress | None = None,
    dtype: str = "float32",
    on_loss: Callable[[float], None] | None = None,
) -> int:
    """Copy a model of any format to one that can be written, chunk by chunk, and return its number of rows.

    Args:
        src, dst: they may be the same with ``overwrite``.
        dim: width that ``src`` must have; needed only for a directory without rows.
        format: of ``dst``; None takes it from the name, as in :func:`write_model`.
        chunk_rows: rows at a time; None means about 8 MiB.
        overwrite, allow_code, on_progress, dtype, on_loss: as in :func:`write_model`; ``src``'s number of rows is the total.

    Raises:
        ModelFileError, ConfigError: as in :func:`open_model` and :func:`write_model`.
    """
    chunk_rows = as_optional(chunk_rows, partial(as_count, low=1), "chunk_rows")
    source, target = place_of(src), place_of(dst)
    if _is_within(target, source):
        raise ModelFileError(f"{target}: expected a place outside the model to copy, {source}")
    with open_model(src, dim) as model:
        chunks = model.chunks(chunk_rows)
        return write_model(
            dst,
            model.dim,
            chunks,
            format=format,
            rows=model.rows,
            overwrite=overwrite,
            allow_code=allow_code,
            on_progress=on_progress,
            dtype=dtype,
            on_loss=on_loss,
        )


def _is_within(inner: Place, outer: Place) -> bool:
    outer, _ = split_table(outer)
    if isinstance(inner, UrlPath) or isinstance(outer, UrlPath):
        return isinstance(inner, UrlPath) and isinstance(outer, UrlPath) and inner.is_within(outer)
    return Path(os.path.realpath(outer)) in Path(os.path.realpath(inner)).parents
