"""Replace the whole content of tables: all of them, or, whatever goes wrong on the way, none.

Problem: a table is written in many calls, through tiers that may fail at any of them, and a table with some rows of a
checkpoint and some older ones is worse than the error. Choice: before rows are written, those that were there are noted, and if
anything is raised they are written back, last ones first. Notes stay in memory up to 64 MiB and continue in a temporary file.
Turned down: a second store that takes the place of the first (slower tiers have none), and a copy in memory, which doubles it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from hps_numba.errors import CapacityError
from hps_numba.runtime.interrupts import interrupts_held
from hps_numba.server.hps import HPS
from hps_numba.storage.distinct import distinct_keys

__all__ = ["TableContent", "replace_tables"]

log = logging.getLogger(__name__)
_CHUNK_ROWS = 1 << 16
_MEMORY_BYTES = 64 << 20
_ATTEMPTS = 3


@dataclass(frozen=True)
class TableContent:
    """What a table is to hold.

    Attributes:
        server, model, table: the table.
        keys: int64 ``[n]``, all keys of the new content.
        chunks: the content: some of the keys, int64 ``[m]``, and their rows, float32 ``[m, dim]``.
    """

    server: HPS
    model: str
    table: int | str
    keys: np.ndarray
    chunks: Iterable[tuple[np.ndarray, np.ndarray]]

    @property
    def order(self) -> tuple[str, int]:
        """The same in every thread that locks several tables, so that none deadlock."""
        return self.server.direct.table_spec(self.model, self.table).tag, id(self.server)


def replace_tables(contents: Sequence[TableContent], then: Callable[[], None] = lambda: None) -> None:
    """Replace the content of tables.

    Other writes wait; lookups go on, and may see old and new rows side by side.

    Args:
        then: called when all rows are written; if it raises, they are taken back.

    Raises:
        As ``HPS.insert`` and ``HPS.erase``; CapacityError if the old rows cannot be noted; what ``then``, the chunks or a
            signal handler raises. All tables have their old rows then. Rows that a tier does not take back are logged as an
            ERROR, and the exception has a note about them.
    """
    with ExitStack() as held:
        tables = {content.order: content for content in contents}
        locked: dict[tuple[str, int], _Locked] = {}
        for order in sorted(tables):
            content = tables[order]
            found = held.enter_context(content.server.locked_table(content.model, content.table))
            locked[order] = _Locked(content, *found)
        notes = held.enter_context(_Notes())
        let_in = held.enter_context(interrupts_held())
        try:
            for content in contents:
                for write in _writes(locked[content.order], content, notes):
                    write()
                    let_in()
                locked[content.order].present = distinct_keys(content.keys)
            then()
        except BaseException as problem:
            notes.write_back(problem)
            raise


@dataclass
class _Locked:
    """A table to which nobody else writes.

    Attributes:
        present: int64, ascending: the keys that it has.   read: from int64 keys ``[m]`` to their rows, float32 ``[m, dim]``.
    """

    content: TableContent
    present: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def insert(self, keys: np.ndarray, rows: np.ndarray) -> None:
        self.content.server.insert(keys, rows, self.content.model, self.content.table)

    def erase(self, keys: np.ndarray) -> None:
        self.content.server.erase(keys, self.content.model, self.content.table)

    def has(self, keys: np.ndarray) -> np.ndarray:
        """bool ``[m]``: which of int64 keys ``[m]`` were there."""
        if not len(self.present):
            return np.zeros(len(keys), bool)
        places = np.searchsorted(self.present, keys).clip(max=len(self.present) - 1)
        found: np.ndarray = self.present[places] == keys
        return found


def _writes(table: _Locked, content: TableContent, notes: _Notes) -> Iterator[Callable[[], None]]:
    """The writes that make ``content`` of a table; each is noted before it is given."""
    stale = np.setdiff1d(table.present, distinct_keys(content.keys), assume_unique=True)  # without it, NumPy's own
    for start in range(0, len(stale), _CHUNK_ROWS):
        gone = stale[start : start + _CHUNK_ROWS]
        notes.take(table, gone)
        yield partial(table.erase, gone)
    for keys, rows in content.chunks:
        for start in range(0, len(keys), _CHUNK_ROWS):
            some = keys[start : start + _CHUNK_ROWS]
            notes.take(table, some)
            yield partial(table.insert, some, rows[start : start + _CHUNK_ROWS])


@dataclass(frozen=True)
class _Note:
    """Where the notes of one write are: the keys that had a row, those that had none, and the rows."""

    table: _Locked
    kept: int
    absent: int
    row_bytes: int
    offset: int


class _Notes:
    """Rows as they were before they were written."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MEMORY_BYTES)  # noqa: SIM115  # closed by __exit__
        self._notes: list[_Note] = []

    def __enter__(self) -> _Notes:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def take(self, table: _Locked, keys: np.ndarray) -> None:
        """Note the rows of some keys, and which have none.

        Raises:
            CapacityError: there is no room.   TierError: they cannot be read.
        """
        there = table.has(keys)
        kept, absent = keys[there], keys[~there]
        rows = table.read(kept)
        try:
            offset = self._file.seek(0, os.SEEK_END)
            for array in (kept, absent, rows):
                self._file.write(array.tobytes())
        except (OSError, MemoryError) as problem:
            place = f"{table.content.model}: {table.content.table}"
            where = f"in memory or in {tempfile.gettempdir()} (TMPDIR)"
            raise CapacityError(f"{place}: no room {where} for the rows that are to be replaced: {problem}") from problem
        self._notes.append(_Note(table, len(kept), len(absent), 4 * rows.shape[1], offset))

    def write_back(self, reason: BaseException) -> None:
        """Undo all writes that were noted, last ones first; raises nothing."""
        for note in reversed(self._notes):
            problems = [_tried(partial(undo, note)) for undo in (self._put_back, self._take_out)]
            problem = next(filter(None, problems), None)
            if problem is not None:
                table, keys = note.table.content, note.kept + note.absent
                text = f"{table.model}: {table.table}: {keys} keys could not be brought back to their old rows: {problem}"
                log.error("%s", text)
                reason.add_note(text)

    def _put_back(self, note: _Note) -> None:
        if note.kept:
            self._file.seek(note.offset)
            kept = np.frombuffer(self._file.read(8 * note.kept), np.int64)
            self._file.seek(8 * note.absent, os.SEEK_CUR)
            rows = np.frombuffer(self._file.read(note.kept * note.row_bytes), np.float32)
            note.table.insert(kept, rows.reshape(note.kept, -1))

    def _take_out(self, note: _Note) -> None:
        if note.absent:
            self._file.seek(note.offset + 8 * note.kept)
            note.table.erase(np.frombuffer(self._file.read(8 * note.absent), np.int64))


def _tried(write: Callable[[], None]) -> Exception | None:
    """What the last attempt raised, or None: a tier that failed once may have recovered."""
    problem: Exception | None = None
    for _ in range(_ATTEMPTS):
        try:
            write()
        except Exception as again:  # a tier's, or that the temporary file cannot be read
            problem = again
        else:
            return None
    return problem
