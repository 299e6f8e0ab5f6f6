"""What key files hold: records of rows and of erasures, in the order of commits; and how they are read after a crash or damage.

Rows are on the disk before their record is written, and a record is there before its insert returns. So:

* A record of rows that is damaged, or missing between others, is rebuilt from its slots, whose checksums cover their keys.
* An erasure has a second copy right behind it.
* The end of a file that is no whole record is a *torn tail*: nobody was told that it is there. The writer looks behind the last
  committed row: rows that are whole there are kept (their record may have been whole before it was damaged), the rest is cut. A
  read-only opener leaves tails alone, as a writer may be at work there: a commit may extend over several segments.
* Anything else is an error that names the file and the offset.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import numpy as np

from hps_numba.errors import TierError
from hps_numba.kernels.host.row_log import row_log_find_record, row_log_record, row_log_valid_slots
from hps_numba.kernels.layouts.row_log import ERASURE, PUT, RECORD_WORDS
from hps_numba.storage.row_log.segment import Segment, aligned

__all__ = ["Record", "read_records", "record_bytes", "recover_tail"]

log = logging.getLogger(__name__)
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Record:
    """One commit.

    Attributes:
        unit: of the first slot of the rows; -1 for an erasure.   keys: int64 ``[n]``.
    """

    unit: int
    keys: np.ndarray

    @property
    def is_erasure(self) -> bool:
        """The keys were erased."""
        return self.unit < 0


def record_bytes(segment: Segment, position: int, number: int, unit: int, keys: np.ndarray) -> bytes:
    """The record of rows whose first slot is at ``unit``, or with -1 of an erasure, to be written at byte ``position``."""
    record = np.empty(RECORD_WORDS + len(keys), np.int64)
    record[:4] = ERASURE if unit < 0 else PUT, number, max(unit, 0), len(keys)
    record[RECORD_WORDS:] = keys
    row_log_record(record, position // 8, segment.seed)
    return record.tobytes()


def read_records(segment: Segment, slot_size: int, *, is_sealed: bool) -> list[Record]:
    """The records behind those committed; the ``ends`` of the segment move on.

    Args:
        is_sealed: nobody writes to the segment, so that a record without all its keys is damaged, not unfinished.

    Raises:
        TierError: a record is damaged and cannot be rebuilt, or the file cannot be read.
    """
    base = segment.ends.keys
    words = np.frombuffer(_read(segment, base), np.int64)
    seed = segment.seed + base // 8
    records: list[Record] = []
    position = search = 0
    while True:
        found, whole = row_log_find_record(words, search, seed)
        if found < 0:
            break
        kind, number, unit, count = (int(word) for word in words[found : found + 4])
        after = found + RECORD_WORDS + count
        if number < segment.ends.records:  # the second copy of an erasure
            position = search = min(after, len(words)) if whole else found + RECORD_WORDS
            segment.ends = segment.ends._replace(keys=base + 8 * position)
            continue
        if number > segment.ends.records:
            records.append(_lost_record(segment, slot_size, number, unit if kind == PUT else None, base + 8 * position))
            _commit(segment, records[-1], slot_size)
        keys = words[found + RECORD_WORDS : after].copy() if whole else None
        is_cut = after > len(words) or (after == len(words) and not is_sealed)
        if keys is None and (kind == ERASURE or is_cut):
            search = found + 1
            continue
        if keys is None:
            keys = _keys_of_slots(segment, slot_size, unit, count)
            if len(keys) < count:
                search = found + 1
                continue
            log.warning("%s: offset %d: a damaged record was rebuilt from its rows", segment.keys_path, base + 8 * found)
        elif found > position:
            log.warning("%s: offset %d: a damaged copy of an erasure was skipped", segment.keys_path, base + 8 * position)
        records.append(Record(unit if kind == PUT else -1, keys))
        _commit(segment, records[-1], slot_size)
        position = search = min(after, len(words))
        segment.ends = segment.ends._replace(keys=base + 8 * position)
    return records


def recover_tail(segment: Segment, slot_size: int) -> list[Record]:
    """Rows behind the last committed one that are whole, a record for each group; for the writer, when it opens.

    The ``ends`` of the segment move on, but for that of its records.
    """
    records: list[Record] = []
    size = os.fstat(segment.rows_fd).st_size
    while aligned(segment.ends.rows) < size:
        unit = segment.next_unit
        keys = _keys_of_slots(segment, slot_size, unit, (size - 8 * unit) // slot_size)
        if not len(keys):
            break
        records.append(Record(unit, keys))
        _commit(segment, records[-1], slot_size)
    return records


def _commit(segment: Segment, record: Record, slot_size: int) -> None:
    rows = segment.ends.rows if record.is_erasure else 8 * record.unit + slot_size * len(record.keys)
    segment.ends = segment.ends._replace(rows=rows, records=segment.ends.records + 1)


def _lost_record(segment: Segment, slot_size: int, number: int, unit: int | None, offset: int) -> Record:
    """The one record before that with ``number``, whose rows begin at ``unit`` if it is one of rows."""
    start = segment.next_unit
    end = os.fstat(segment.rows_fd).st_size if unit is None else 8 * unit
    keys = _keys_of_slots(segment, slot_size, start, max(0, end - 8 * start) // slot_size)
    if number != segment.ends.records + 1 or not len(keys):
        raise TierError(
            f"{segment.keys_path}: offset {offset}: expected record {segment.ends.records}, got a damaged one, "
            f"and {segment.rows_path} has no rows to rebuild it from: restore the file from a copy"
        )
    log.warning("%s: offset %d: a damaged record was rebuilt from its rows", segment.keys_path, offset)
    return Record(start, keys)


def _keys_of_slots(segment: Segment, slot_size: int, unit: int, most: int) -> np.ndarray:
    """Keys of the whole slots from ``unit`` on, up to one that is damaged, at most ``most``."""
    found: list[np.ndarray] = [np.empty(0, np.int64)]
    step = max(1, _READ_BYTES // slot_size)
    while most > 0:
        n = min(step, most)
        content = _pread(segment.rows_fd, n * slot_size, 8 * unit, segment.rows_path)
        keys = np.empty(n, np.int64)
        words = np.frombuffer(content[: len(content) // 8 * 8], np.int64)
        whole = row_log_valid_slots(words, slot_size, segment.seed, unit, n, keys)
        found.append(keys[:whole])
        if whole < n:
            break
        most -= n
        unit += n * slot_size // 8
    return np.concatenate(found)


def _read(segment: Segment, offset: int) -> bytes:
    """The key file from ``offset`` on, in whole words."""
    size = os.fstat(segment.keys_fd).st_size - offset
    content = _pread(segment.keys_fd, max(0, size), offset, segment.keys_path)
    return content[: len(content) // 8 * 8]


def _pread(descriptor: int, size: int, offset: int, path: object) -> bytes:
    parts: list[bytes] = []
    while size > 0:
        try:
            part = os.pread(descriptor, size, offset)
        except OSError as problem:
            raise TierError(f"{path}: offset {offset}: cannot be read: {problem.strerror}") from problem
        if not part:
            break
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
