"""CSV: one column of integers, selected by its name in the header or by its number, counted from 0; by default ``key``,
``item_id``, ``id``, ``obj_id`` or the only column. Separated by commas, semicolons or tabs.

A name in the header may be followed by a colon and a type, as in RecBole's ``item_id:token``; it is also found without them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import Blocks, TraceFormat
from hps_numba.traces.formats._numbers import first_invalid, parse_integers

__all__ = ["PLUGIN"]

_ROWS = 1 << 17  # read at a time
_DEFAULT_COLUMNS = ("key", "item_id", "id", "obj_id")


def _open(path: Path, column: str | None) -> tuple[None, Blocks]:
    with _reader(path) as rows:
        first = next(rows, [])
    if not first:
        raise TraceError(f"{path}: expected a header or rows, got an empty file")
    at, header = _column(path, [name.strip() for name in first], column)

    def blocks() -> Iterator[np.ndarray]:
        with _reader(path) as rows:
            line = 1
            if header:
                next(rows)
                line = 2
            while some := list(islice(rows, _ROWS)):
                yield _keys_of(some, at, path, line)
                line += len(some)

    return None, blocks


def _keys_of(rows: list[list[str]], column: int, path: Path, line: int) -> np.ndarray:
    """The keys of some rows, the first of which is at ``line``; empty rows are skipped."""
    try:
        words = [row[column] for row in rows if row]
    except IndexError:
        short = next(i for i, row in enumerate(rows) if row and len(row) <= column)
        count = len(rows[short])
        raise TraceError(f"{path}:{line + short}: expected {column + 1} or more columns, got {count}") from None
    keys = parse_integers(words)
    if keys is None:
        invalid = first_invalid(words)
        assert invalid is not None
        at = [i for i, row in enumerate(rows) if row][invalid]
        raise TraceError(f"{path}:{line + at}: expected a 64-bit integer, got {words[invalid][:40]!r}")
    return keys


@contextmanager
def _reader(path: Path) -> Iterator[Iterator[list[str]]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            head = file.readline()
            delimiter = max(",;\t", key=head.count)
            file.seek(0)
            yield csv.reader(_clean(file, path), delimiter=delimiter)
        except (UnicodeDecodeError, csv.Error) as problem:
            raise TraceError(f"{path}: expected a CSV file in UTF-8: {problem}") from None


def _clean(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for line in file:
        if "\0" in line:
            raise TraceError(f"{path}: expected a CSV file, got one with zero bytes")
        yield line


def _column(path: Path, first: list[str], column: str | None) -> tuple[int, bool]:
    """Number of the column of keys, and whether there is a header."""
    header = first_invalid(first) is not None
    names = [name.partition(":")[0].lower() for name in first]
    if column is not None and column.isdigit():
        if int(column) >= len(first):
            raise TraceError(f"{path}: column: expected 0 to {len(first) - 1}, got {column}")
        return int(column), parse_integers([first[int(column)]]) is None
    if not header:
        if column is not None:
            raise TraceError(f"{path}: column: expected a number, as there is no header, got {column!r}")
        if len(first) > 1:
            raise TraceError(f"{path}: expected the number of a column (--column), as there are {len(first)} and no header")
        return 0, False
    accepted = [column] if column is not None else [*_DEFAULT_COLUMNS] + first * (len(first) == 1)
    for name in accepted:
        for number, (full, short) in enumerate(zip(first, names)):
            if name == full or name.lower() == short:
                return number, True
    raise TraceError(f"{path}: column (--column): expected one of {', '.join(first)}, got {column or 'key'!r}")


PLUGIN = TraceFormat((".csv", ".tsv", ".inter"), _open)
