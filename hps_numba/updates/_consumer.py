"""Reads a source and applies what it gives: two threads, so that a slow tier keeps neither lookups nor the bus waiting.

One thread polls the source and commits; the other decodes and writes. Between them is a backlog with a bound: when it is full
nothing is polled, and the bus keeps the rest. What was applied is committed after ``max_commit_interval`` messages or when
nothing more comes. A tier that fails is tried again after ``failure_backoff_ms``, for as long as it takes; meanwhile nothing is
committed and nothing is applied out of order. A message that can never be applied is counted with a reason and passed over.

Whatever goes wrong here stays here: lookups go on with the rows that are there. The threads know the tables of a server and
not the server itself, so they end when it is closed or forgotten, and in a forked child they do not exist.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from hps_numba.errors import ClosedError, TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread
from hps_numba.server.update_stats import SourceStats
from hps_numba.updates._backlog import Backlog, Item
from hps_numba.updates._batches import batch_of
from hps_numba.updates._counts import TableCounts
from hps_numba.updates._manifests import is_manifest, read_manifest
from hps_numba.updates._polled import Polled
from hps_numba.updates._update import Lost, Message, Position, Update
from hps_numba.updates._wire.messages import Skip

if TYPE_CHECKING:
    from hps_numba.server.update_targets import UpdateTarget, UpdateTargets

__all__ = ["Consumer"]

log = logging.getLogger(__name__)
_GRACE_SECONDS = 30.0  # that ``close`` waits for what is being applied
_LONGEST_POLL = 1.0  # seconds: a source that cannot be woken keeps ``close`` waiting for so long
_LOOK_AGAIN = 0.002  # seconds between two looks whether everything was applied
_SAY_AGAIN = 60.0  # seconds between two warnings of the same kind
_MAX_TABLES = 10_000  # that are counted one by one
_TRIES_OF_A_VERSION = 10  # that cannot be loaded
_LONGEST_BACKOFF = 40  # times ``failure_backoff_ms``, after several failures in a row


class _Stopped(Exception):
    """Ends the thread that applies."""


class Consumer:
    """Reads one source and applies its updates to the tables of a server.

    Args:
        source: open; it is closed with the consumer.   targets: the tables.   name: of the source, in stats and logs.

    Thread safety: every method.
    """

    def __init__(self, source: Polled, targets: UpdateTargets, name: str) -> None:
        self.name = name
        self._source, self._targets = source, targets
        self._section = source.section
        self._backlog = Backlog(source.section.max_backlog_bytes)
        self._dropped = 0  # items of the backlog before this number are not applied any more
        source.drained = self._drain
        self._sleeps: SimpleQueue[None] = SimpleQueue()  # entries only end a sleep
        self._stopping = False
        self._reader: threading.Thread | None = None
        self._applier: threading.Thread | None = None
        self._in_child = False
        self._tables: dict[str, TableCounts] = {}
        self._others = TableCounts(name)  # of tables beyond ``_MAX_TABLES``: topics that somebody made up
        self._applied: dict[int | str, int] = {}
        self._committed: dict[int | str, int] = {}
        self._handled = 0  # messages that were applied or passed over; written by the thread that applies
        self._told = 0  # those of them that the bus was told of; written by the thread that reads
        self._lag: Mapping[str, int] | int | None = None
        self._skipped: Counter[str] = Counter()
        self._last_skipped = self._last_problem = ""
        self._failed_reads = self._failed_commits = self._lost = 0
        self._said: dict[str, float] = {}
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """A forked child has neither the threads nor a connection of its own: it serves what there was."""
        if self._reader is not None:
            self._stopping = self._in_child = True

    # -- its life ---------------------------------------------------------------------

    def start(self) -> None:
        """Begin to read and apply.

        Raises:
            CapacityError: the system gives no thread.
        """
        name = f"hps_numba_updates_{self.name}"
        self._applier = start_thread(self._apply_all, (), name=f"{name}_apply", purpose="updates")
        self._reader = start_thread(self._read_all, (self._applier,), name=name, purpose="updates")

    def stop(self) -> None:
        """Ask it to end, without waiting."""
        self._stopping = True
        if not self._in_child:
            self._backlog.wake()
            self._sleeps.put(None)
            self._source.wake()

    def close(self) -> None:
        """End it: what is being applied is applied and committed, the rest stays on the bus. A second call does nothing."""
        if self._in_child:
            return
        self.stop()
        if self._reader is None:
            if self._applier is not None:  # there was no thread to read
                self._applier.join(_GRACE_SECONDS)
            self._source.close()
            return
        if threading.current_thread() not in (self._reader, self._applier):
            self._reader.join(_GRACE_SECONDS)
            if self._reader.is_alive():
                log.warning("%s: closed while updates were applied or read, after waiting %g s", self.name, _GRACE_SECONDS)

    # -- reading ---------------------------------------------------------------------

    def _read_all(self, applier: threading.Thread) -> None:
        failures, next_lag = 0, 0.0
        while not self._stopping:
            try:
                if time.monotonic() >= next_lag:
                    self._lag, next_lag = self._source.lag(), time.monotonic() + 1.0
                idle = self._read_some()
                failures = 0
            except BaseException as problem:
                failures += 1
                self._failed_reads += 1
                self._say("cannot be read", problem)
                self._sleep(failures)
                idle = True
            if self._handled - self._told >= (1 if idle else self._section.max_commit_interval):
                self._commit()
        applier.join()
        self._commit()
        try:
            self._source.close()
        except BaseException as problem:
            self._say("cannot be closed", problem)

    def _read_some(self) -> bool:
        """Poll once, or wait for room; returns whether nothing came."""
        if self._backlog.full:
            self._source.keep_alive()
            self._backlog.wait_for_room(_LONGEST_POLL)
            return True
        items = self._source.poll(min(self._section.poll_timeout_ms / 1000, _LONGEST_POLL))
        known = [item for item in items if isinstance(item, (Update, Message, Lost))]
        for item in known:
            if not isinstance(item, Lost):
                self._counts_of(item.table).received += 1
        self._backlog.put(known)
        if len(known) < len(items):
            raise TierError(f"{type(self._source).__name__}.poll: expected Update, Message or Lost, got something else")
        return not items

    def _commit(self) -> None:
        handled, positions = self._handled, dict(self._applied)
        new = [
            Position(partition, offset) for partition, offset in positions.items() if self._committed.get(partition) != offset
        ]
        try:
            if new:
                self._source.commit(new)
        except BaseException as problem:
            self._failed_commits += 1
            self._say("cannot be committed", problem)
            return
        self._committed = positions
        self._told = handled

    def _drain(self, seconds: float) -> bool:
        """What the source calls, from the thread that reads (``UpdateSource.drained``)."""
        end = time.monotonic() + seconds
        while self._backlog.messages and not self._stopping and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_AGAIN))
        done = not self._backlog.messages
        if not done:
            self._dropped = self._backlog.added
        self._commit()
        return done

    # -- applying ---------------------------------------------------------------------

    def _apply_all(self) -> None:
        try:
            while not self._stopping:
                items = self._backlog.take(self._section.max_batch_size, _LONGEST_POLL)
                if items:
                    self._apply(items)
                    self._backlog.done(items)
        except _Stopped:
            log.debug("%s: stopped before everything that was read was applied", self.name)
        except BaseException as problem:  # a defect: nothing is committed that was not applied
            self._say("stopped", problem)
            log.exception("%s: updates end", self.name)
            self._stopping = True

    def _apply(self, items: Sequence[Item]) -> None:
        """Apply what came, each table's in order; returns when it is in every tier, was passed over, or is not ours now."""
        dropped = self._dropped
        gone = min(max(0, dropped - self._backlog.finished), len(items))
        self._count_gone(items[:gone])
        items = items[gone:]
        for named, group in groupby(items, is_manifest):
            some = list(group)
            if self._dropped != dropped:
                self._count_gone(some)
            elif named:
                for item in some:
                    self._take_version(item)  # type: ignore[arg-type]  # it is a Message
            else:
                self._apply_rows(some, dropped)
        if self._dropped != dropped:  # all of them were read before that
            return
        count = 0
        for item in items:
            if not isinstance(item, Lost):
                self._applied[item.position.partition] = item.position.offset
                count += 1
        self._handled += count

    def _apply_rows(self, items: Iterable[Item], dropped: int) -> None:
        by_table: dict[str, list[Update | Message]] = {}
        for item in items:
            if isinstance(item, Lost):
                self._count_lost(item)
            else:
                by_table.setdefault(item.table, []).append(item)
        for tag, some in by_table.items():
            self._apply_to(tag, some, dropped)

    def _take_version(self, message: Message) -> None:
        """Switch to the version of a model that a message names; all updates before it are applied, and none after it.

        One whose files cannot be loaded, or that a function of the user's refuses, is tried some times and then passed over:
        the version in force stays. A tier that fails is waited for.
        """
        counts, failures = self._counts_of(message.table), 0
        try:
            manifest = read_manifest(message)
            while True:
                try:
                    reason = self._targets.take(message.table, manifest)
                    break
                except BaseException as problem:
                    if self._is_closed(problem):
                        raise _Stopped from problem
                    failures += 1
                    counts.retries += 1
                    self._say(f"{message.table}: version {manifest.version} cannot be taken", problem)
                    if failures >= _TRIES_OF_A_VERSION and not isinstance(problem, TierError):
                        self._targets.passed_over(manifest)
                        raise Skip("version", f"expected version {manifest.version} to be loaded, got {problem}") from problem
                    self._sleep(failures)
            if reason is not None:
                raise Skip(reason, f"expected a version that can be taken, got {manifest.to_dict()}")
        except Skip as skip:
            self._count_skip(message, skip, counts)
        counts.handled += 1
        counts.positions[message.position.partition] = message.position.offset

    def _apply_to(self, tag: str, items: Sequence[Update | Message], dropped: int) -> None:
        counts, failures = self._counts_of(tag), 0
        while True:
            if self._dropped != dropped:
                self._count_gone(items)
                return
            skips: list[tuple[Update | Message, Skip]] = []
            try:
                target = self._targets.find(tag)
                if isinstance(target, str):
                    skips = [(item, Skip(target, "expected a table that takes updates")) for item in items]
                else:
                    self._write(target, items, counts, skips)
                break
            except BaseException as problem:
                if self._is_closed(problem):
                    raise _Stopped from problem
                failures += 1
                counts.retries += 1
                self._say(f"{tag}: cannot be applied and is tried again", problem)
                self._sleep(failures)
        for item, skip in skips:
            self._count_skip(item, skip, counts)
        counts.handled += len(items)

    def _write(
        self,
        target: UpdateTarget,
        items: Sequence[Update | Message],
        counts: TableCounts,
        skips: list[tuple[Update | Message, Skip]],
    ) -> None:
        batch = batch_of(
            items,
            dim=target.dim,
            key_bytes=self._targets.key_bytes,
            finite=self._section.refuse_not_finite,
            on_skip=lambda item, skip: skips.append((item, skip)),
            refuses=target.refuses,
        )
        left_out = target.apply(batch.keys, batch.rows, batch.erased, batch.times) if batch.writes else 0
        if left_out:
            self._count_left_out(counts, left_out)
        counts.applied(batch, {item.position.partition: item.position for item in items})

    def _is_closed(self, problem: BaseException) -> bool:
        """Whether the server is being closed; a model that was unloaded meanwhile is not found the next time."""
        return self._stopping or (isinstance(problem, ClosedError) and self._targets.closed)

    def _sleep(self, failures: int) -> None:
        """Wait before the next attempt, longer after each failure, unless it is to stop.

        Raises:
            _Stopped: it is, and this is the thread that applies.
        """
        backoff = self._section.failure_backoff_ms / 1000 * min(2 ** min(failures - 1, 10), _LONGEST_BACKOFF)
        end = time.monotonic() + backoff
        while not self._stopping and (left := end - time.monotonic()) > 0:
            try:
                self._sleeps.get(timeout=min(left, _LONGEST_POLL))
            except Empty:
                continue
        if self._stopping and threading.current_thread() is self._applier:
            raise _Stopped

    # -- counting ---------------------------------------------------------------------

    def _count_gone(self, items: Sequence[Item]) -> None:
        """These wait no more: another process applies them, or they come again."""
        for item in items:
            if not isinstance(item, Lost):
                self._counts_of(item.table).handled += 1

    def _counts_of(self, tag: str) -> TableCounts:
        counts = self._tables.get(tag)
        if counts is None:
            if len(self._tables) >= _MAX_TABLES:
                return self._others
            counts = self._tables.setdefault(tag, TableCounts(self.name))
        return counts

    def _count_skip(self, item: Update | Message, skip: Skip, counts: TableCounts) -> None:
        counts.skipped[skip.reason] += 1
        self._skipped[skip.reason] += 1
        partition, offset = item.position
        self._last_skipped = f"{skip.reason}: {item.table}, partition {partition}, offset {offset}: {skip}"
        self._say_once(f"skipped {skip.reason}", f"an update is skipped: {self._last_skipped}")

    def _count_left_out(self, counts: TableCounts, keys: int) -> None:
        counts.skipped["read_only_keys"] += keys
        self._skipped["read_only_keys"] += keys

    def _count_lost(self, lost: Lost) -> None:
        self._lost += max(1, lost.messages or 0)
        how_many = "some" if lost.messages is None else f"{lost.messages:,}"
        log.error(
            "%s: partition %s: %s updates before offset %d are gone from the bus and were not applied: load the last snapshot",
            self.name,
            lost.position.partition,
            how_many,
            lost.position.offset,
        )

    def _say(self, what: str, problem: BaseException) -> None:
        text = " ".join(str(problem).split())[:500] or type(problem).__name__
        self._last_problem = f"{what}: {text}"
        self._say_once(what, self._last_problem)

    def _say_once(self, what: str, line: str) -> None:
        """A WARNING, unless there was one of that kind within the last minute."""
        now = time.monotonic()
        if now - self._said.get(what, -_SAY_AGAIN) >= _SAY_AGAIN:
            self._said[what] = now
            log.warning("%s: %s", self.name, line)
        else:
            log.debug("%s: %s", self.name, line)

    def stats(self) -> SourceStats:
        """A snapshot."""
        tables = dict(self._tables)
        by_table = self._lag if isinstance(self._lag, Mapping) else None
        total = sum(by_table.values()) if by_table is not None else self._lag
        waiting = self._backlog.messages
        return SourceStats(
            name=self.name,
            type=self._section.type,
            running=self._reader is not None and not self._stopping,
            resumes=self._source.resume,
            positions=dict(self._applied),
            committed=dict(self._committed),
            backlog_messages=waiting,
            backlog_bytes=self._backlog.bytes,
            lag_messages=None if not isinstance(total, int) else total + waiting,
            lost=self._lost,
            skipped=dict(self._skipped),
            last_skipped=self._last_skipped,
            failed_reads=self._failed_reads,
            failed_commits=self._failed_commits,
            retries=sum(counts.retries for counts in (self._others, *tables.values())),
            last_problem=self._last_problem,
            tables={
                tag: counts.read(lag=total if by_table is None else by_table.get(tag, 0))  # type: ignore[arg-type]
                for tag, counts in tables.items()
                if tag.count(".") >= 2
            },
        )
