"""What a consumer counts of its source, and says in the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hps_numba.updates._counts import TableCounts
from hps_numba.updates._update import Lost, Message, Update
from hps_numba.updates._wire.messages import Skip

if TYPE_CHECKING:
    from hps_numba.server.update_stats import TableUpdates

__all__ = ["SourceCounts"]

log = logging.getLogger(__name__)
_SAY_AGAIN = 60.0  # seconds between two warnings of the same kind
_MAX_TABLES = 10_000  # that are counted one by one


class SourceCounts:
    """Counts of a source.

    Attributes:
        skipped: updates, and each key of those that were held, by reason.   last_skipped, last_problem: in words.
        failed_reads, failed_commits, lost, reloads: as in ``SourceStats``.

    Thread safety: each number is changed by one thread; others read, and what they see may be a moment old.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tables: dict[str, TableCounts] = {}
        self._others = TableCounts(name)  # of tables beyond ``_MAX_TABLES``: topics that somebody made up
        self._said: dict[str, float] = {}
        self.skipped: Counter[str] = Counter()
        self.last_skipped = self.last_problem = ""
        self.failed_reads = self.failed_commits = self.lost = self.reloads = 0

    def of(self, tag: str) -> TableCounts:
        """The counts of a table."""
        counts = self._tables.get(tag)
        if counts is None:
            if len(self._tables) >= _MAX_TABLES:
                return self._others
            counts = self._tables.setdefault(tag, TableCounts(self._name))
        return counts

    @property
    def retries(self) -> int:
        """Failed attempts to apply."""
        return sum(counts.retries for counts in (self._others, *dict(self._tables).values()))

    @property
    def held_rows(self) -> int:
        """Rows and deletions of all tables that wait for a tier."""
        return sum(counts.held_rows for counts in (self._others, *dict(self._tables).values()))

    def tables(self, lag: Mapping[str, int] | int | None) -> dict[str, TableUpdates]:
        """A snapshot of those that are tables by their tags; ``lag``: messages not handed over yet, of each table or of all."""
        return {
            tag: counts.read(lag=lag.get(tag, 0) if isinstance(lag, Mapping) else lag)
            for tag, counts in dict(self._tables).items()
            if tag.count(".") >= 2
        }

    # -- what happened ---------------------------------------------------------------------

    def add_gone(self, items: Iterable[Update | Message]) -> None:
        """These wait no more: another process applies them, or they come again."""
        for item in items:
            self.of(item.table).handled += 1

    def add_skip(self, item: Update | Message, skip: Skip, counts: TableCounts) -> None:
        """An update is not applied."""
        counts.skipped[skip.reason] += 1
        self.skipped[skip.reason] += 1
        partition, offset = item.position
        self.last_skipped = f"{skip.reason}: {item.table}, partition {partition}, offset {offset}: {skip}"
        self._say_once(f"skipped {skip.reason}", f"an update is skipped: {self.last_skipped}")

    def add_held_skip(self, tag: str, rows: int, skip: Skip) -> None:
        """Rows and deletions that were held are not applied; each is counted, as it is not known how many updates they were."""
        if not rows:
            return
        self.of(tag).skipped[skip.reason] += rows
        self.skipped[skip.reason] += rows
        self.last_skipped = f"{skip.reason}: {tag}: {rows} that were held: {skip}"
        self._say_once(f"skipped {skip.reason}", f"updates are skipped: {self.last_skipped}")

    def add_left_out(self, keys: int, counts: TableCounts) -> None:
        """Keys that a read-only tier would serve again."""
        counts.skipped["read_only_keys"] += keys
        self.skipped["read_only_keys"] += keys

    def add_loss(self, lost: Lost, answer: str) -> None:
        """The bus has dropped updates; ``answer``: what is done about it."""
        self.lost += max(1, lost.messages or 0)
        how_many = "some" if lost.messages is None else f"{lost.messages:,}"
        log.error(
            "%s: partition %s: %s updates before offset %d are gone from the bus and were not applied: %s",
            self._name,
            lost.position.partition,
            how_many,
            lost.position.offset,
            answer,
        )

    def add_problem(self, what: str, problem: BaseException) -> None:
        """Something failed, and is tried again."""
        text = " ".join(str(problem).split())[:500] or type(problem).__name__
        self.last_problem = f"{what}: {text}"
        self._say_once(what, self.last_problem)

    def _say_once(self, what: str, line: str) -> None:
        """A WARNING, unless there was one of that kind within the last minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_AGAIN) >= _SAY_AGAIN:
            self._said[what] = now
            log.warning("%s: %s", self._name, line)
        else:
            log.debug("%s: %s", self._name, line)
