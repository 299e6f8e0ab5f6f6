"""What online updates did: snapshots of a source, and of what it did to one table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SourceStats", "TableUpdates"]


@dataclass(frozen=True, kw_only=True)
class TableUpdates:
    """What one source did to one table since the server started.

    Attributes:
        source: name of the source.
        messages: updates or messages that were applied, but for rows that are held.
        rows: rows that they wrote; of several rows for a key that were applied together, the last is written, and each counts.
        erased: deletions among them.
        rows_per_second: rows and deletions, over the last ten seconds.
        positions: offset of the last one that was applied, by partition.
        lag_messages: that wait to be applied, those on the bus included (of all tables, if it does not tell them apart), or
            None if the source does not tell.
        lag_seconds: age of the newest applied event while others wait; 0 if none waits, None if events have no time.
        event_time_ms: of the newest event that was applied, in ms since 1970, or None.
        age_seconds: from then until now.
        freshness_seconds: from the oldest event of the last batch until lookups saw it in every tier and cache.
        version: newest version of the model that an update named, or None.
        skipped: updates that were not applied, by reason.
        retries: failed attempts to apply, each of which was repeated.
        held_rows: rows and deletions that a slower tier cannot take now; they are as they were until it can.
    """

    source: str
    messages: int = 0
    rows: int = 0
    erased: int = 0
    rows_per_second: float = 0.0
    positions: Mapping[int | str, int] = field(default_factory=dict)
    lag_messages: int | None = None
    lag_seconds: float | None = None
    event_time_ms: int | None = None
    age_seconds: float | None = None
    freshness_seconds: float | None = None
    version: int | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    retries: int = 0
    held_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class SourceStats:
    """One source of online updates since the server started.

    Attributes:
        name: of the source.   type: of its plugin.
        running: it reads and applies; False once the server is closed, and in a forked child.
        resumes: it goes on after what was applied before; else it started with the oldest update.
        positions: offset of the last one that was applied, by partition.
        committed: the same, of those that the bus was told of.
        backlog_messages, backlog_bytes: read and not applied yet, or held in part.
        lag_messages: on the bus and not applied yet, or None if the source does not tell.
        lost: messages that the bus had dropped before they were read, as far as it tells how many; each gap counts at least 1.
        reloads: how often the files of the models were loaded again for that.
        skipped: updates that were not applied, by reason, also those of tables that the server does not have.
        last_skipped: reason, table, partition and offset of the last of them.
        failed_reads, failed_commits: attempts that failed; each is repeated.
        retries: failed attempts to apply, each of which was repeated.
        held_rows: rows and deletions of all tables that a slower tier cannot take now.
        last_problem: the last failure in words, or empty.
        tables: what it did to each table, by tag.
    """

    name: str
    type: str
    running: bool
    resumes: bool
    positions: Mapping[int | str, int]
    committed: Mapping[int | str, int]
    backlog_messages: int
    backlog_bytes: int
    lag_messages: int | None
    lost: int
    reloads: int
    skipped: Mapping[str, int]
    last_skipped: str
    failed_reads: int
    failed_commits: int
    retries: int
    held_rows: int
    last_problem: str
    tables: Mapping[str, TableUpdates]
