"""CSV: one column of integers, by its name in the header or its number from 0; else ``key``, ``item_id``, ``id``, ``obj_id``
or the only one. Commas, semicolons or tabs.

A name may have a type behind a colon, as RecBole's ``item_id:token``, and is found without it too.
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
from hps_numba.traces.formats._numbers import first_wrong, integers

__all__ = ["PLUGIN"]

_ROWS = 1 << 17  # read at a time
_USUAL = ("key", "item_id", "id", "obj_id")


def _open(path: Path, column: str | None) -> tuple[None, Blocks]:
    with _reader(path) as rows:
        first = next(rows, [])
    if not first:
        raise TraceError(f"{path}: is empty, wanted a header or rows")
    at, header = _column(path, [name.strip() for name in first], column)

    def blocks() -> Iterator[np.ndarray]:
        with _reader(path) as rows:
            line = 1
            if header:
                next(rows)
                line = 2
            while some := list(islice(rows, _ROWS)):
                try:
                    words = [row[at] for row in some if row]
                except IndexError:
                    short = next(i for i, row in enumerate(some) if row and len(row) <= at)
                    raise TraceError(f"{path}:{line + short}: {len(some[short])} columns, wanted {at + 1} or more") from None
                keys = integers(words)
                if keys is None:
                    wrong = first_wrong(words)
                    assert wrong is not None
                    row = [i for i, row in enumerate(some) if row][wrong]
                    raise TraceError(f"{path}:{line + row}: {words[wrong][:40]!r}, wanted an integer of 64 bits")
                yield keys
                line += len(some)

    return None, blocks


@contextmanager
def _reader(path: Path) -> Iterator[Iterator[list[str]]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            head = file.readline()
            delimiter = max(",;\t", key=head.count)
            file.seek(0)
            yield csv.reader(_clean(file, path), delimiter=delimiter)
        except (UnicodeDecodeError, csv.Error) as problem:
            raise TraceError(f"{path}: not a CSV file in UTF-8: {problem}") from None


def _clean(file: io.TextIOWrapper, path: Path) -> Iterator[str]:
    for line in file:
        if "\0" in line:
            raise TraceError(f"{path}: not a CSV file: it has zero bytes")
        yield line


def _column(path: Path, first: list[str], column: str | None) -> tuple[int, bool]:
    """Number of the column of keys, and whether there is a header."""
    header = first_wrong(first) is not None
    names = [name.partition(":")[0].lower() for name in first]
    if column is not None and column.isdigit():
        if int(column) >= len(first):
            raise TraceError(f"{path}: column {column} of {len(first)}, counted from 0")
        return int(column), integers([first[int(column)]]) is None
    if not header:
        if column is not None:
            raise TraceError(f"{path}: column {column!r}, but there is no header; wanted a number from 0")
        if len(first) > 1:
            raise TraceError(f"{path}: {len(first)} columns and no header, wanted the number of one (--column)")
        return 0, False
    wanted = [column] if column is not None else [*_USUAL] + first * (len(first) == 1)
    for name in wanted:
        for place, (full, short) in enumerate(zip(first, names)):
            if name == full or name.lower() == short:
                return place, True
    raise TraceError(f"{path}: column {column or 'key'!r} is none of {', '.join(first)} (--column names one)")


PLUGIN = TraceFormat((".csv", ".tsv", ".inter"), _open)
