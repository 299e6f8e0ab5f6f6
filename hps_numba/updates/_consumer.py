"""Reads a source and applies what it gives: two threads, so that a slow tier keeps neither lookups nor the bus waiting.

One thread polls the source and commits; the other decodes and writes. Between them is a backlog with a bound: when it is full
nothing is polled, and the bus keeps the rest. What was applied is committed after ``max_commit_interval`` messages or when
nothing more comes. A tier that fails is tried again after ``failure_backoff_ms``, for as long as it takes; meanwhile other keys
go on (``_row_writer``), nothing is committed and no key gets an older row. A message that can never be applied is counted with
a reason and passed over. Where the bus has dropped updates, files are loaded again (``_recovery``).

Whatever goes wrong here stays here: lookups go on with the rows that are there. The threads know the tables of a server and
not the server itself, so they end when it is closed or forgotten, and in a forked child they do not exist.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from hps_numba.errors import ClosedError, TierError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.threads import start_thread
from hps_numba.server.update_stats import SourceStats
from hps_numba.updates._backlog import Backlog, Item
from hps_numba.updates._manifests import is_manifest
from hps_numba.updates._model_changes import ModelChanges
from hps_numba.updates._polled import Polled
from hps_numba.updates._recovery import Recovery, Reload
from hps_numba.updates._row_writer import RowWriter
from hps_numba.updates._source_counts import SourceCounts
from hps_numba.updates._update import Lost, Message, Position, Update
from hps_numba.updates._wire.messages import Skip

if TYPE_CHECKING:
    from hps_numba.server.update_targets import UpdateTargets

__all__ = ["Consumer"]

log = logging.getLogger(__name__)
_GRACE_SECONDS = 30.0  # that ``close`` waits for what is being applied
_LONGEST_POLL = 1.0  # seconds: a source that cannot be woken keeps ``close`` waiting for so long
_LOOK_AGAIN = 0.002  # seconds between two looks whether everything was applied
_LAG_SECONDS = 1.0  # between two questions how much is on the bus
_UNKNOWN_LAG_SECONDS = 0.1  # the same, while the source cannot tell yet
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
        self._noticed = 0  # what ``_dropped`` was when the thread that applies last dropped what it holds
        source.drained = self._drain
        self._sleeps: SimpleQueue[None] = SimpleQueue()  # entries only end a sleep
        self._stopping = False
        self._reader: threading.Thread | None = None
        self._applier: threading.Thread | None = None
        self._in_child = False
        self._counts = SourceCounts(name)
        self._writer = RowWriter(targets, self._section, self._counts, self._backoff)
        self._ahead: dict[int | str, int] = {}  # what was applied while something before it is held
        self._ahead_count = 0
        self._applied: dict[int | str, int] = {}
        self._committed: dict[int | str, int] = {}
        self._handled = 0  # messages that were applied or passed over; written by the thread that applies
        self._told = 0  # those of them that the bus was told of; written by the thread that reads
        self._lag: Mapping[str, int] | int | None = None
        self._recovery: Recovery | None = None
        self._changes = ModelChanges(name, targets, self._counts, self._sleep, self._check_open)
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
                    self._lag = self._source.lag()
                    next_lag = time.monotonic() + (_LAG_SECONDS if self._lag is not None else _UNKNOWN_LAG_SECONDS)
                idle = self._read_some()
                failures = 0
            except BaseException as problem:
                failures += 1
                self._counts.failed_reads += 1
                self._counts.add_problem("cannot be read", problem)
                self._sleep(failures)
                idle = True
            if self._handled - self._told >= (1 if idle else self._section.max_commit_interval):
                self._commit()
        applier.join()
        self._commit()
        try:
            self._source.close()
        except BaseException as problem:
            self._counts.add_problem("cannot be closed", problem)

    def _read_some(self) -> bool:
        """Poll once, or wait for room; returns whether nothing came."""
        if self._recovery is not None:
            if self._recovery.go_on():
                self._recovery = None
            return True
        if self._backlog.full:
            self._source.keep_alive()
            self._backlog.wait_for_room(_LONGEST_POLL)
            return True
        items = self._source.poll(min(self._section.poll_timeout_ms / 1000, _LONGEST_POLL))
        known = [item for item in items if isinstance(item, (Update, Message))]
        lost = [item for item in items if isinstance(item, Lost)]
        recovers = bool(lost) and self._recovers
        for gap in lost:  # before lookups see what came after it
            self._counts.add_loss(gap, "files are loaded again" if recovers else "load the last snapshot")
        if recovers:
            self._recovery = Recovery(self._source, self._backlog, lost, self._drop, self._forget)
        else:
            for item in known:
                self._counts.of(item.table).received += 1
            self._backlog.put(known)
        if lost and not recovers:
            self._source.losses_handled()
        if known and not self._source.has_more and not self._stopping:
            time.sleep(self._section.batch_interval_ms / 1000)
        if len(known) + len(lost) < len(items):
            raise TierError(f"{type(self._source).__name__}.poll: expected Update, Message or Lost, got something else")
        return not items

    @property
    def _recovers(self) -> bool:
        """Whether files are loaded again after a loss: rows that outlive the process may be newer than the files, by far."""
        wanted = self._section.on_loss == "reload" or (self._section.on_loss == "auto" and not self._source.resume)
        return wanted and self._source.starts_over and self._targets.one_source

    def _drop(self) -> None:
        """What waits is not applied any more."""
        self._dropped = self._backlog.added

    def _forget(self) -> None:
        """Of what was applied, some comes again; nothing is being applied."""
        self._applied, self._committed = {}, {}

    def _commit(self) -> None:
        handled, positions = self._handled, dict(self._applied)
        new = [
            Position(partition, offset) for partition, offset in positions.items() if self._committed.get(partition) != offset
        ]
        try:
            if new:
                self._source.commit(new)
        except BaseException as problem:
            self._counts.failed_commits += 1
            self._counts.add_problem("cannot be committed", problem)
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
            self._drop()
        self._commit()
        return done

    # -- applying ---------------------------------------------------------------------

    def _apply_all(self) -> None:
        try:
            while not self._stopping:
                due = self._writer.due
                patience = _LONGEST_POLL if due is None else min(max(0.0, due - time.monotonic()), _LONGEST_POLL)
                items = self._backlog.take(self._section.max_batch_size, patience)
                self._notice_dropped()
                if items:
                    if isinstance(items[0], Reload):  # nothing else waits then
                        self._changes.reload(items[0])
                    else:
                        self._apply([item for item in items if isinstance(item, (Update, Message))])
                    self._backlog.done(items)
                self._try_held_again()
        except _Stopped:
            log.debug("%s: stopped before everything that was read was applied", self.name)
        except BaseException as problem:  # a defect: nothing is committed that was not applied
            self._counts.add_problem("stopped", problem)
            log.exception("%s: updates end", self.name)
            self._stopping = True

    def _apply(self, items: Sequence[Item]) -> None:
        """Apply what came, each table's in order; returns when it is in every tier, was passed over, or is not ours now."""
        dropped = self._dropped
        gone = min(max(0, dropped - self._backlog.finished), len(items))
        self._counts.add_gone(items[:gone])
        items = items[gone:]
        for named, group in groupby(items, is_manifest):
            for some in [[item] for item in group] if named else [list(group)]:
                if named:
                    self._wait_for_held(some[0].table, dropped)
                if self._dropped != dropped:
                    self._counts.add_gone(some)
                elif named:
                    self._changes.take(some[0])  # type: ignore[arg-type]  # it is a Message
                else:
                    self._apply_rows(some, dropped)
        if self._dropped != dropped:  # all of them were read before that
            return
        self._ahead.update({item.position.partition: item.position.offset for item in items})
        self._ahead_count += len(items)
        self._settle()

    def _settle(self) -> None:
        """Everything that was applied may be committed, if nothing is held."""
        if self._writer.due is not None:
            self._backlog.hold(self._ahead_count, self._writer.held_bytes)
            return
        self._applied.update(self._ahead)
        self._handled += self._ahead_count
        self._ahead, self._ahead_count = {}, 0
        self._backlog.hold(0, 0)

    def _notice_dropped(self) -> None:
        """What is held was read before: it is dropped too."""
        if self._noticed != self._dropped:
            self._noticed = self._dropped
            self._writer.drop()
            self._ahead, self._ahead_count = {}, 0
            self._backlog.hold(0, 0)

    def _try_held_again(self) -> None:
        if self._writer.due is None:
            return
        dropped = self._dropped
        if dropped != self._noticed:
            return
        try:
            self._writer.try_again(lambda: self._dropped == dropped)
        except BaseException as problem:
            self._check_open(problem)
            self._counts.add_problem("what is held cannot be applied and is tried again", problem)
        if self._dropped == dropped:
            self._settle()

    def _wait_for_held(self, tag: str, dropped: int) -> None:
        """Until nothing is held of the model of a table: the updates before a version are applied before it is switched."""
        model = tag.split(".")[1] if "." in tag else ""
        while self._dropped == dropped and (due := self._writer.holds(model)) is not None:
            self._pause(max(0.0, due - time.monotonic()))
            self._try_held_again()

    def _apply_rows(self, items: Iterable[Item], dropped: int) -> None:
        by_table: dict[str, list[Update | Message]] = {}
        for item in items:
            by_table.setdefault(item.table, []).append(item)
        for tag, some in by_table.items():
            self._apply_to(tag, some, dropped)

    def _apply_to(self, tag: str, items: Sequence[Update | Message], dropped: int) -> None:
        counts, failures = self._counts.of(tag), 0
        while True:
            if self._dropped != dropped:
                self._counts.add_gone(items)
                return
            skips: list[tuple[Update | Message, Skip]] = []
            try:
                target = self._targets.find(tag)
                if isinstance(target, str):
                    skips = [(item, Skip(target, "expected a table that takes updates")) for item in items]
                else:
                    after, before = self._changes.split(tag, items)
                    older = Skip("older", "expected an update after the message that named the version in force")
                    skips = [(item, older) for item in before]
                    skips += self._writer.write(tag, target, after)
                break
            except BaseException as problem:
                self._check_open(problem)
                failures += 1
                counts.retries += 1
                self._counts.add_problem(f"{tag}: cannot be applied and is tried again", problem)
                self._sleep(failures)
        for item, skip in skips:
            self._counts.add_skip(item, skip, counts)
        counts.handled += len(items)

    def _check_open(self, problem: BaseException) -> None:
        """
        Raises:
            _Stopped: the server is being closed; a model that was unloaded meanwhile is not found the next time.
        """
        if self._stopping or (isinstance(problem, ClosedError) and self._targets.closed):
            raise _Stopped from problem

    def _sleep(self, failures: int) -> None:
        """Wait before the next attempt, longer after each failure, unless it is to stop.

        Raises:
            _Stopped: it is, and this is the thread that applies.
        """
        self._pause(self._backoff(failures))

    def _backoff(self, failures: int) -> float:
        """Seconds."""
        return self._section.failure_backoff_ms / 1000 * min(2 ** min(failures - 1, 10), _LONGEST_BACKOFF)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            try:
                self._sleeps.get(timeout=min(left, _LONGEST_POLL))
            except Empty:
                continue
        if self._stopping and threading.current_thread() is self._applier:
            raise _Stopped

    def stats(self) -> SourceStats:
        """A snapshot."""
        total = sum(self._lag.values()) if isinstance(self._lag, Mapping) else self._lag
        waiting, counts = self._backlog.messages, self._counts
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
            lost=counts.lost,
            reloads=counts.reloads,
            skipped=dict(counts.skipped),
            last_skipped=counts.last_skipped,
            failed_reads=counts.failed_reads,
            failed_commits=counts.failed_commits,
            retries=counts.retries,
            held_rows=counts.held_rows,
            last_problem=counts.last_problem,
            tables=counts.tables(self._lag),
        )
