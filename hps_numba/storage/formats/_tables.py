"""Files and folders that hold several tables: one of them is named as ``path#table``.

A local file whose own name holds a ``#`` is that file; only where there is none, what follows the last ``#`` names a table.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from hps_numba.errors import ModelFileError
from hps_numba.storage.urls import Place, UrlPath

__all__ = ["pick_table", "split_table"]

_SHOWN = 12
T = TypeVar("T")


def split_table(path: Place) -> tuple[Place, str | None]:
    """The file or folder, and the table after the ``#``, if one is named."""
    if isinstance(path, UrlPath):
        return path.split_fragment()
    head, mark, table = os.fspath(path).rpartition("#")
    if not (mark and head and table) or os.path.lexists(path) or not os.path.lexists(head):
        return path, None
    return Path(head), table


def pick_table(path: Place, tables: Mapping[str, T], name: str | None, more: Iterable[str] = ()) -> T:
    """The table of a name, or the only one.

    Args:
        more: further names that there are, for the message.

    Raises:
        ModelFileError: there are several and none is named, or none of this name.
    """
    if name is None and len(tables) == 1:
        return next(iter(tables.values()))
    if name is not None and name in tables:
        return tables[name]
    names = sorted({*tables, *more})
    shown = ", ".join(other if other.isprintable() else repr(other) for other in names[:_SHOWN])[:400] or "none"
    shown += f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    if name is None:
        raise ModelFileError(f"{path}: expected one table, or the name of one as {path}#TABLE, found {shown}")
    raise ModelFileError(f"{path}: has no table {name!r}, found {shown}")
