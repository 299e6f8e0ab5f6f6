"""Lookups of several tables in one launch: a row of the grid takes a table.

``tables`` is where the tables of a group are described (``layouts.cache``); what varies from call to call, the keys, their
number and the place of the answer of each, comes as arguments, so that no call has to send anything to the device first. A
table without keys is left alone.
"""

from __future__ import annotations

import numpy as np

from hps_numba.kernels.cache.batch import touch_batch
from hps_numba.kernels.cache.insert import insert_batch
from hps_numba.kernels.cache.lookup import answer_batch
from hps_numba.kernels.layouts.cache import (
    TABLE_BYTES,
    TABLE_CAPACITY,
    TABLE_DEFAULT,
    TABLE_LINES,
    TABLE_ROWS,
    TABLE_SETS,
    TABLE_STAGE,
    TABLE_STAGE_STRIDE,
    TABLE_STATE,
    TABLE_WORDS,
    TABLE_WORKSPACE,
)
from hps_numba.kernels.simt.reference import bits_float, grid_dependency_sync, grid_row, grid_rows, ld64

__all__ = ["insert_tables_kernel", "lookup_tables_kernel", "touch_tables_kernel"]

ONE_GROUP = False  # bound when specialized: the grid has a row for each table


def lookup_tables_kernel(tables, count, words):
    """``lookup_kernel`` for ``count`` tables.

    Args:
        tables: address of their descriptions.   words: int64 ``[MAX_TABLES * TABLE_WORDS]``: keys, n and out of each.

    **Writes:** as ``lookup_kernel``.
    """
    grid_dependency_sync()
    row = grid_row()
    while row < count:
        table = tables + TABLE_BYTES * row
        keys, n, out = words[TABLE_WORDS * row], words[TABLE_WORDS * row + 1], words[TABLE_WORDS * row + 2]
        if n > 0:
            lines, rows, sets = ld64(table + TABLE_LINES), ld64(table + TABLE_ROWS), ld64(table + TABLE_SETS)
            default = np.float32(bits_float(ld64(table + TABLE_DEFAULT)))
            state, workspace = ld64(table + TABLE_STATE), ld64(table + TABLE_WORKSPACE)
            answer_batch(lines, rows, sets, state, keys, n, out, default, workspace)
        if ONE_GROUP:
            break
        row += grid_rows()


def touch_tables_kernel(tables, count):
    """``touch_kernel`` for ``count`` tables.   **Writes:** as it does."""
    grid_dependency_sync()
    row = grid_row()
    while row < count:
        table = tables + TABLE_BYTES * row
        touch_batch(ld64(table + TABLE_LINES), ld64(table + TABLE_STATE), ld64(table + TABLE_WORKSPACE))
        if ONE_GROUP:
            break
        row += grid_rows()


def insert_tables_kernel(tables, count, words):
    """``insert_kernel`` for ``count`` tables; the clock of each moves on as far as for a lookup of its own.

    **Writes:** as ``insert_kernel``.
    """
    grid_dependency_sync()
    row = grid_row()
    while row < count:
        table = tables + TABLE_BYTES * row
        n = words[TABLE_WORDS * row + 1]
        if n > 0:
            lines, rows, state = ld64(table + TABLE_LINES), ld64(table + TABLE_ROWS), ld64(table + TABLE_STATE)
            stage, stride, workspace = (
                ld64(table + TABLE_STAGE),
                ld64(table + TABLE_STAGE_STRIDE),
                ld64(table + TABLE_WORKSPACE),
            )
            advance = max(np.int64(1), 4 * n // ld64(table + TABLE_CAPACITY))
            insert_batch(lines, rows, state, stage, stride, workspace, advance)
        if ONE_GROUP:
            break
        row += grid_rows()
