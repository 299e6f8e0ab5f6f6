"""Open, write and convert sparse models of any format.

Formats are the files of :mod:`hps_numba.storage.formats`; the content of a file decides which one reads it, and its
name only where the content tells nothing. A model that is written appears whole or not at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from hps_numba import plugins
from hps_numba.config.arguments import as_count, as_flag, as_function, as_optional
from hps_numba.errors import HpsError, ModelFileError
from hps_numba.runtime.paths import checked_path
from hps_numba.runtime.replacing import Judge, leftovers, replacing
from hps_numba.storage.formats._chunks import checked_chunks, writing
from hps_numba.storage.formats._format import MAX_DIM, PathLike, Progress, SparseModelFormat, SparseModelReader, translated

__all__ = ["convert_model", "formats", "open_model", "write_model"]

log = logging.getLogger(__name__)
_PACKAGE = "hps_numba.storage.formats"
_FILES = {f"{name}{ending}" for name in ("key", "emb_vector", "meta") for ending in ("", ".npy")}


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
    path: PathLike, dim: int | None = None, *, format: str | None = None, allow_code: bool = False
) -> SparseModelReader:
    """Open a sparse model.

    Args:
        path: directory or file.
        dim: row width that it must have; None takes the file's.
        format: name of a format, or ``module:NAME`` or ``file.py:NAME`` of one's own; None detects it.
        allow_code: ``format`` may be a reference, which is imported.

    Returns:
        A reader, which is a context manager.

    Raises:
        ModelFileError: missing, damaged, of another width, or of no known format; or ``format`` is not one.
        ConfigError (a ValueError): ``dim`` is less than 1, or an argument is of another type.
    """
    where = checked_path(path)
    as_flag(allow_code, "allow_code")
    found = _format_of(where) if format is None else _named_format(format, allow_code)
    return found.open(where, dim)


def _named_format(name: str, allow_code: bool = False) -> SparseModelFormat:
    found = plugins.load(_PACKAGE, name, allow_code=allow_code, error=ModelFileError)
    if not isinstance(found, SparseModelFormat):
        raise ModelFileError(f"{name!r}: expected an instance of SparseModelFormat, got {found!r}")
    return found


def _format_of(path: Path) -> SparseModelFormat:
    every = formats()
    with translated(path):
        if not path.exists():
            raise ModelFileError(f"{path}: no such file or directory{_hint(path)}")
        for found in every:
            if found.detect(path):
                return found
    for found in every:
        if path.suffix.lower() in found.suffixes:
            return found
    raise ModelFileError(f"{path}: expected one of the known formats ({', '.join(found.name for found in every)})")


def _hint(path: Path) -> str:
    """Where an overwrite that was killed between its two renames left the old model, for a message."""
    kept = [workspace / "old" for workspace in leftovers(path) if (workspace / "old").exists()]
    return f"; an interrupted overwrite left the old one at {kept[0]}" if kept else ""


def write_model(
    path: PathLike,
    dim: int,
    chunks: Iterable[tuple[Any, ...]],
    *,
    format: str | None = None,
    rows: int | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Write a sparse model and return its number of rows.

    Everything is written to a hidden sibling first, flushed to the disk, and then renamed: whenever the process or the machine
    stops, ``path`` is the old model, the new one or (between two renames, when a directory is replaced) missing. Readers
    ignore what a killed writer left; the next writer of the same path removes it, and restores the old model if it is missing.

    Args:
        path: to be created.
        dim: floats in a row, at least 1.
        chunks: yields ``(keys int64[m], rows float32[m, dim])`` or ``(keys, rows, meta int64[m])``; float16 and float64
            rows and other integers are converted. A chunk is consumed before the next one is asked for, so its arrays may be
            reused.
        format: as in :func:`open_model`; None takes it from the suffix: none or ``.model`` a directory, ``.h5`` HDF5.
        rows: number of rows to come, if known; any other number is then an error.
        overwrite: replace an existing model; only a whole sparse model, and a directory that holds nothing else, is replaced.
        allow_code: ``format`` may be a reference, which is imported.
        on_progress: called with (rows done, ``rows`` or rows done) after each chunk.

    Raises:
        ModelFileError: ``path`` exists and may not be replaced, the format cannot write, a chunk does not fit, or the
            disk refuses.
        KeyDtypeError: keys are not integers.
        ConfigError (a ValueError): ``dim`` is less than 1, or an argument is of another type.
    """
    dim = as_count(dim, "dim", 1, MAX_DIM)
    rows = as_optional(rows, partial(as_count, low=0), "rows")
    overwrite, allow_code = as_flag(overwrite, "overwrite"), as_flag(allow_code, "allow_code")
    on_progress = as_optional(on_progress, as_function, "on_progress")
    target = checked_path(path)
    writer = _writing_format(target, format, allow_code)
    checked = checked_chunks(target, dim, chunks, rows, on_progress)
    with replacing(target, overwrite=overwrite, judge=_judge_for(writer)) as new, writing(target, checked) as source:
        return writer.write(new, dim, source)


def _writing_format(path: Path, name: str | None, allow_code: bool) -> SparseModelFormat:
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
            _reader_of(place, writer).open(place).close()
        except (HpsError, OSError) as problem:
            if not os.path.lexists(place):  # another writer is replacing it at this moment
                return None
            return f"is not a whole sparse model ({str(problem).removeprefix(f'{place}: ')})"
        return None

    return judge


def _reader_of(place: Path, writer: SparseModelFormat) -> SparseModelFormat:
    """The format that reads what is at ``place``, by its content; if none does, the one that is to write there."""
    return next((found for found in formats() if found.detect(place)), writer)


def convert_model(
    src: PathLike,
    dst: PathLike,
    *,
    dim: int | None = None,
    format: str | None = None,
    chunk_rows: int | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    on_progress: Progress | None = None,
) -> int:
    """Copy a model of any format to one that can be written, chunk by chunk, and return its number of rows.

    Args:
        src, dst: they may be the same with ``overwrite``.
        dim: width that ``src`` must have; needed only for a directory without rows.
        format: of ``dst``; None takes it from the name, as in :func:`write_model`.
        chunk_rows: rows at a time; None means about 8 MiB.
        overwrite, allow_code, on_progress: as in :func:`write_model`; ``src``'s number of rows is the total.

    Raises:
        ModelFileError, ConfigError: as in :func:`open_model` and :func:`write_model`.
    """
    chunk_rows = as_optional(chunk_rows, partial(as_count, low=1), "chunk_rows")
    source, target = (Path(os.path.realpath(checked_path(path))) for path in (src, dst))
    if source in target.parents:
        raise ModelFileError(f"{os.fspath(dst)}: expected a place outside the model to copy, {os.fspath(src)}")
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
        )
