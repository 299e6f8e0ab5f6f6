"""From updates and messages of one table, in the order of the source, to what is to be written: the last write of each key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from hps_numba.updates._update import NO_TIME, Message, Update, now_ms
from hps_numba.updates._wire.codec import NOT_FINITE, decode_messages, mark_last_writes, take_last_writes
from hps_numba.updates._wire.messages import Content, Skip, read_message

__all__ = ["OnSkip", "TableBatch", "batch_of"]

OnSkip = Callable[[Update | Message, Skip], object]
"""Told of each update that is not applied, and why."""


def _takes_all(version: int | None, event_ms: int) -> None:
    """Nothing is left out."""


@dataclass(frozen=True, slots=True)
class TableBatch:
    """Changes of one table; no key is in it twice.

    Attributes:
        keys: int64 ``[n]``.   rows: float32 ``[n, dim]``.   erased: int64 ``[m]``.
        writes, deletions: how many there were, deletions counted in both, before the last of each key was chosen.
        messages: they came in.
        times: int64 ``[n + m]``: of the events of ``keys`` and then of ``erased``; now, if they have none; ``NO_TIME`` for
            those that name a version, as they are of no other one.
        oldest_ms, newest_ms: times of the first and the last event, or ``NO_TIME``.
        version: the newest of the model that one of them is of, or None.
    """

    keys: np.ndarray
    rows: np.ndarray
    erased: np.ndarray
    times: np.ndarray
    writes: int = 0
    deletions: int = 0
    messages: int = 0
    oldest_ms: int = NO_TIME
    newest_ms: int = NO_TIME
    version: int | None = None


def batch_of(
    items: Sequence[Update | Message],
    *,
    dim: int,
    key_bytes: int,
    finite: bool,
    on_skip: OnSkip,
    refuses: Callable[[int | None, int], str | None] = _takes_all,
) -> TableBatch:
    """Decode what came for one table; what is malformed is left out.

    Args:
        items: in order.   dim: elements of a row.   finite: leave out what has NaN or infinity.
        refuses: why what is of this version and time is left out, or None.
    """
    contents: list[tuple[Update | Message, Update | Content]] = []
    for item in items:
        try:
            content = _checked(item, dim, key_bytes)
            reason = refuses(content.version, content.event_time_ms)
            if reason is not None:
                raise Skip(reason, f"expected the version in force, got {_told(content)}")
            contents.append((item, content))
        except Skip as skip:
            on_skip(item, skip)
    writes = _Writes(sum(_size(content) for _, content in contents), dim)
    now = now_ms()
    applied: list[Update | Content] = []
    for encoded, some in groupby(contents, lambda pair: isinstance(pair[1], Content)):
        group = list(some)
        put = writes.decode if encoded else writes.copy
        places = put([(content, _time_of(content, now)) for _, content in group], key_bytes, finite)
        for (item, content), start in zip(group, places):
            if start == NOT_FINITE:
                on_skip(item, Skip("not_finite", "expected finite values, got NaN or infinity"))
            else:
                applied.append(content)
    times = [content.event_time_ms for content in applied if content.event_time_ms != NO_TIME]
    versions = [content.version for content in applied if content.version is not None]
    keys, rows, erased, of_events, deletions = writes.last()
    return TableBatch(
        keys,
        rows,
        erased,
        of_events,
        writes=writes.at,
        deletions=deletions,
        messages=len(applied),
        oldest_ms=min(times, default=NO_TIME),
        newest_ms=max(times, default=NO_TIME),
        version=max(versions, default=None),
    )


def _time_of(content: Update | Content, now: int) -> int:
    if content.version is not None:
        return NO_TIME
    return now if content.event_time_ms == NO_TIME else content.event_time_ms


def _told(content: Update | Content) -> str:
    version = "no version" if content.version is None else f"version {content.version}"
    return f"{version}, {content.event_time_ms} ms"


def _size(content: Update | Content) -> int:
    return content.size if isinstance(content, Content) else len(content.keys)


def _checked(item: Update | Message, dim: int, key_bytes: int) -> Update | Content:
    if isinstance(item, Message):
        return read_message(item, dim=dim, key_bytes=key_bytes)
    if item.rows is not None and item.rows.shape[1] != dim:
        raise Skip("width", f"expected rows of {4 * dim} bytes, got {4 * item.rows.shape[1]}")
    if key_bytes == 4 and len(item.keys) and not 0 <= item.keys.min() <= item.keys.max() < 2**32:
        raise Skip("key", "expected keys of 32 bits, got a wider one")
    return item


class _Writes:
    """All writes of a batch, in order: keys, rows, which of them are deletions, and times; the next one goes to ``at``."""

    def __init__(self, room: int, dim: int) -> None:
        self.keys, self.rows = np.empty(room, np.int64), np.empty((room, dim), np.float32)
        self.erased, self.times = np.empty(room, np.bool_), np.empty(room, np.int64)
        self.at = 0

    def decode(self, contents: Sequence[tuple[Any, int]], key_bytes: int, finite: bool) -> list[int]:
        """Add messages, each with its time; where each begins, or NOT_FINITE."""
        places = np.empty(len(contents), np.int64)
        parts = np.array([(*content.place, time) for content, time in contents], np.int64)
        rows, erased, times = self.rows, self.erased, self.times
        as_bytes = rows.view(np.uint8)
        self.at = decode_messages(parts, key_bytes, finite, self.keys, as_bytes, rows, erased, times, self.at, places)
        found: list[int] = places.tolist()
        return found

    def copy(self, updates: Sequence[tuple[Any, int]], key_bytes: int, finite: bool) -> list[int]:
        """``decode`` of updates that are arrays."""
        places: list[int] = []
        for update, time in updates:
            if finite and update.rows is not None and not np.isfinite(update.rows).all():
                places.append(NOT_FINITE)
                continue
            part = slice(self.at, self.at + len(update.keys))
            self.keys[part], self.erased[part], self.times[part] = update.keys, update.rows is None, time
            if update.rows is not None:
                self.rows[part] = update.rows
            places.append(self.at)
            self.at = part.stop
        return places

    def last(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Keys and rows to be written, keys to be deleted, the times of both, and how many deletions there were in all."""
        n = self.at
        keys, rows, erased, times = self.keys[:n], self.rows[:n], self.erased[:n], self.times[:n]
        kept = np.empty(n, np.bool_)
        slots = np.full(1 << max(3, (2 * n - 1).bit_length()), -1, np.int64)
        count, deleting, deletions = mark_last_writes(keys, erased, slots, kept)
        if count == n and not deletions:
            return keys, rows, keys[:0], times, 0
        written = count - deleting
        out, out_times, out_rows = (
            np.empty(count, np.int64),
            np.empty(count, np.int64),
            np.empty((written, rows.shape[1]), np.float32),
        )
        take_last_writes(keys, rows.view(np.uint8), erased, times, kept, out, out_rows.view(np.uint8), out_times)
        return out[:written], out_rows, out[written:], out_times, int(deletions)
