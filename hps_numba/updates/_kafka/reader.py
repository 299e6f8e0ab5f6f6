"""A member of a consumer group: reads what its partitions hold, says what the brokers have dropped, and commits."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from hps_numba.errors import TierError
from hps_numba.runtime.immortal import keep_forever
from hps_numba.updates._kafka.client import Client
from hps_numba.updates._kafka.partitions import Partitions, Place, name_of
from hps_numba.updates._update import NO_TIME, Lost, Message, Position

__all__ = ["Hooks", "Reader"]

_OLDEST, _COMMITTED = -2, -1000  # stand for an offset, in librdkafka
_NO_TIMESTAMP = 0
_SLICE = 0.1  # seconds after which a poll looks whether it was woken
_ASK_SECONDS = 5.0  # that a question to the brokers may take
_COMMIT_SECONDS = 10.0


class Hooks(NamedTuple):
    """What a reader asks of who applies what it has read.

    Attributes:
        revoked: partitions go to another member: apply what was read, and commit it.
        lost: another member has them already: drop what was read and is not applied.
    """

    revoked: Callable[[], object]
    lost: Callable[[], object]


class Reader:
    """One consumer of librdkafka.

    Args:
        group: its id.   alone: no other process may be a member of the group.
        resume: go on where the group has committed; else partitions that this process has not had begin with the oldest.
        at_once: messages that are read together at most.

    Thread safety: one thread at a time.
    """

    def __init__(
        self,
        client: Client,
        settings: Mapping[str, Any],
        topics: Sequence[str],
        *,
        alone: bool,
        resume: bool,
        at_once: int,
        hooks: Hooks,
    ) -> None:
        self.ready: deque[Message | Lost] = deque()  # read, and not handed out
        self.has_more = True  # that librdkafka has fetched
        self.partitions = Partitions()
        self._client, self._settings, self._topics = client, settings, list(topics)
        self._alone, self._resume, self._at_once, self._hooks = alone, resume, at_once, hooks
        self._resets: set[Place] = set()  # their next offset is not on the bus
        self._lost: dict[Place, int] = {}  # where reading went on after a loss that was not handled
        self._problem: str = ""
        self._paused = self._fatal = self._closing = self._in_callback = self._assigned = False
        self._unchecked = False
        self._commits: dict[int, Any] = {}  # number -> error or None, of those that are waited for
        self._committing: deque[int] = deque()
        self._commit_number = 0
        self._consumer: Any = None
        self._open()

    def _open(self) -> None:
        more = {"error_cb": self._on_error, "on_commit": self._on_commit}
        self._committing.clear()
        self._consumer = self._client.consumer({**self._settings, **more})
        self._consumer.subscribe(self._topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
        self._fatal = self._paused = False

    def leak(self) -> None:
        """For a forked child: to release a client would wait for threads that do not exist there."""
        keep_forever(self._consumer)

    def close(self) -> None:
        """Leave the group; nothing is committed."""
        self._closing = True
        self._consumer.close()

    # -- reading ---------------------------------------------------------------------

    def read(self, seconds: float, woken: Callable[[], bool]) -> None:
        """Put what comes next into ``ready``; waits for it for so many seconds.

        Raises:
            TierError: the brokers do not answer, or refuse something.
        """
        self._go_on()
        end = time.monotonic() + seconds
        while not self.ready and not woken():
            left = end - time.monotonic()
            self._take(self._consumer.poll(max(0.0, min(left, _SLICE))))
            if not self.ready:
                self._raise_problem()
            if left <= 0:
                return

    def hold(self) -> None:
        """Stay a member of the group without reading more.

        Raises:
            TierError: as for ``read``.
        """
        if not self._paused:
            self._consumer.pause([self._client.place(*place) for place in self.partitions])
            self._paused = True
        self._take_one(self._consumer.poll(0))
        self._raise_problem()

    def _go_on(self) -> None:
        if self._fatal:
            self._consumer.close()
            self.partitions.assign(())
            self._open()
        if self._paused:
            self._consumer.resume([self._client.place(*place) for place in self.partitions])
            self._paused = False
        if self._resets:
            self._reset()
        if self._unchecked:
            self._check_alone()

    def _take(self, first: Any) -> None:
        self._take_one(first)
        if first is not None:
            some = self._consumer.consume(self._at_once, 0)
            self.has_more = len(some) == self._at_once
            for message in some:
                self._take_one(message)

    def _take_one(self, message: Any) -> None:
        if message is None:
            return
        error, place = message.error(), (message.topic(), message.partition())
        if error is None:
            if place in self.partitions:
                self.partitions.read(place, message.offset())
                self.ready.append(_message(message))
        elif error.code() == self._client.codes._PARTITION_EOF:
            if place in self.partitions:
                self.partitions.go_on(place, message.offset())
        elif error.code() == self._client.codes._AUTO_OFFSET_RESET:
            self._resets.add(place)
        elif error.code() != self._client.codes.UNKNOWN_TOPIC_OR_PART or not str(place[0]).startswith("^"):
            self._on_error(error)  # a pattern that no topic matches yet is no error
            self._problem = self._problem or error.str()

    def _raise_problem(self) -> None:
        problem, self._problem = self._problem, ""
        if problem:
            raise TierError(problem)
        if self._resets:
            self._reset()

    def lag(self) -> dict[str, int] | None:
        """Messages of each topic that were not handed out, as far as the brokers have told; None before they have."""
        behind: dict[str, int] = {}
        if not self._assigned:
            return None
        for place in self.partitions:
            _, high = self._consumer.get_watermark_offsets(self._client.place(*place), cached=True) or (0, -1)
            start = self.partitions.next_in(place)
            if high < 0 or start is None:
                return None
            behind[place[0]] = behind.get(place[0], 0) + max(0, high - start)
        for item in self.ready:
            if isinstance(item, Message):
                behind[item.table] += 1
        return behind

    # -- what the brokers have dropped -----------------------------------------------------

    def _reset(self) -> None:
        """Go on where there is something, and say what is missing.

        Raises:
            TierError: the brokers do not say what they have.
        """
        places = [place for place in self._resets if place in self.partitions]
        starts: dict[Place, int] = {}
        losses: list[Lost] = []
        lost: dict[Place, int] = {}
        try:
            for place in places:
                low, high = self._ends(place)
                expected = self._expected(place, low)
                starts[place] = expected if low <= expected <= high else low
                if starts[place] != expected:
                    count = low - expected if expected < low else None
                    losses.append(Lost(Position(name_of(*place), low), count, place[0]))
                    lost[place] = low
            self._consumer.assign(
                [self._client.place(*place, starts.get(place, self._from(place))) for place in self.partitions]
            )
        except self._client.problems as problem:
            raise TierError(f"offsets: {problem.args[0].str()}") from problem
        for place, offset in starts.items():
            self.partitions.go_on(place, offset)
        self._resets.clear()
        self._lost.update(lost)
        self.ready.extend(losses)

    def _ends(self, place: Place) -> tuple[int, int]:
        """The offset of the first message that there is, and of the next one.

        Raises:
            TierError, KafkaException: the brokers do not answer.
        """
        ends = self._consumer.get_watermark_offsets(self._client.place(*place), timeout=_ASK_SECONDS)
        if ends is None:
            raise TierError(f"offsets: no broker tells those of {name_of(*place)} within {_ASK_SECONDS:g} s")
        low, high = ends
        return low, high

    def start_over(self, lost: Container[str]) -> None:
        """Go on with the first message of every partition; commit that, but for those whose names are in ``lost``.

        Raises:
            TierError: the brokers do not answer.
        """
        try:
            lows = {place: self._ends(place)[0] for place in self.partitions}
            self._commit([self._client.place(*place, low) for place, low in lows.items() if name_of(*place) not in lost])
            places = [self._client.place(*place, low) for place, low in lows.items() if place in self.partitions]
            self._consumer.assign(places)
            if self._paused:
                self._consumer.resume(places)
        except self._client.problems as problem:
            raise TierError(f"offsets: {problem.args[0].str()}") from problem
        self._paused = False
        for place, low in lows.items():
            if place in self.partitions:
                self.partitions.go_on(place, low)
        self._resets.clear()
        self._lost = {place: low for place, low in lows.items() if name_of(*place) in lost}
        self.ready.clear()

    def losses_handled(self) -> None:
        """Commit where reading goes on after losses, as nothing may come there that is committed.

        Raises:
            TierError: the brokers do not take it, or do not answer.
        """
        self._commit([self._client.place(*place, offset) for place, offset in self._lost.items() if place in self.partitions])
        self._lost.clear()

    def _expected(self, place: Place, low: int) -> int:
        """The offset that should come next; the oldest there is, if nothing was ever read."""
        known = self.partitions.next_in(place)
        if known is not None:
            return known
        return self._committed_offsets([place]).get(place, self.partitions.seen.get(place, low))

    def _committed_offsets(self, places: Sequence[Place]) -> dict[Place, int]:
        """Offsets to go on with, of those partitions that the group has committed some of.

        Raises:
            KafkaException: the brokers do not answer.
        """
        asked = [self._client.place(*place) for place in places if self._resume or place in self.partitions.seen]
        found = self._consumer.committed(asked, timeout=_ASK_SECONDS) if asked else ()
        for one in found:
            if one.error is not None:
                raise self._client.kafka.KafkaException(one.error)
        return {(one.topic, one.partition): int(one.offset) for one in found if one.offset >= 0}

    def _from(self, place: Place) -> int:
        """Where reading of a partition begins."""
        known = self.partitions.next_in(place)
        return _OLDEST if known is None else known

    # -- the group ---------------------------------------------------------------------

    def _on_assign(self, consumer: Any, assigned: Sequence[Any]) -> None:
        self.partitions.assign((one.topic, one.partition) for one in assigned)
        self._resets.clear()
        self._assigned = True
        self._paused = False
        self._unchecked = self._alone
        try:
            for place, offset in self._committed_offsets(list(self.partitions)).items():
                self.partitions.go_on(place, offset)
        except self._client.problems:  # librdkafka asks again; where it finds none, that is an error, and then so do we
            consumer.assign([self._client.place(*place, _COMMITTED) for place in self.partitions])
            return
        consumer.assign([self._client.place(*place, self._from(place)) for place in self.partitions])

    def _on_revoke(self, consumer: Any, revoked: Sequence[Any]) -> None:
        self._leave(self._hooks.revoked)

    def _on_lost(self, consumer: Any, lost: Sequence[Any]) -> None:
        self._leave(self._hooks.lost)

    def _leave(self, told: Callable[[], object]) -> None:
        self.ready.clear()  # what was not handed out comes again, here or elsewhere
        if not self._closing:
            self._in_callback = True
            try:
                told()
            finally:
                self._in_callback = False
        self.partitions.assign(())
        self._assigned = False  # until the next assignment nobody knows the lag
        self._resets.clear()

    def _check_alone(self) -> None:
        """
        Raises:
            TierError: another process has a part of the partitions, so that this one does not get everything.
        """
        try:
            topics = self._consumer.list_topics(timeout=_ASK_SECONDS).topics
        except self._client.problems as problem:
            raise TierError(f"topics: {problem.args[0].str()}") from problem
        self._unchecked = False
        split = self.partitions.split_topics({name: len(topic.partitions) for name, topic in topics.items()})
        if not self.partitions:
            split = sorted(name for name in topics if any(_is_meant(one, name) for one in self._topics))
        if split:
            raise TierError(
                f"group {self._settings['group.id']}: expected no other member, got only a part of {split[0]}: if another "
                "process has the same 'consumer', give each a name of its own"
            )

    # -- commits ---------------------------------------------------------------------

    def commit(self, positions: Sequence[Position]) -> None:
        """Tell the group how far it has come, in the partitions that this member has.

        Raises:
            TierError: the brokers do not take it, or do not answer.
        """
        places = [(self.partitions.named(partition), offset + 1) for partition, offset in positions]
        self._commit([self._client.place(*place, offset) for place, offset in places if place is not None])

    def _commit(self, offsets: Sequence[Any]) -> None:
        if not offsets:
            return
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except self._client.problems as problem:
            raise TierError(f"offsets: {problem.args[0].str()}") from problem
        self._commit_number += 1
        self._committing.append(self._commit_number)
        if not self._in_callback:  # inside of one it is sent before the partitions are given away
            self._wait_for_commit(self._commit_number)

    def _wait_for_commit(self, number: int) -> None:
        end = time.monotonic() + _COMMIT_SECONDS
        while number not in self._commits:
            if time.monotonic() > end:
                raise TierError(f"offsets: not committed after {_COMMIT_SECONDS:g} s: {self._problem or 'no answer'}")
            self._take_one(self._consumer.poll(0.02))
        error = self._commits.pop(number)
        self._commits.clear()
        if error is not None:
            raise TierError(f"offsets: {error.str()}")

    def _on_commit(self, error: Any, offsets: Sequence[Any]) -> None:
        refused = next((one.error for one in offsets or () if one.error is not None), None)
        if self._committing:
            self._commits[self._committing.popleft()] = error or refused

    def _on_error(self, error: Any) -> None:
        if error.fatal() or error.code() == self._client.codes._FATAL:
            self._fatal = True
        if self._fatal or error.code() != self._client.codes._TRANSPORT:  # one broker of several; the others are asked
            self._problem = error.str()


def _is_meant(topic: str, name: str) -> bool:
    """Whether an entry of ``topics`` means this topic."""
    return re.match(topic, name) is not None if topic.startswith("^") else topic == name


def _message(message: Any) -> Message:
    topic, (kind, time_ms) = message.topic(), message.timestamp()
    return Message(
        table=topic,
        value=message.value(),
        position=Position(name_of(topic, message.partition()), message.offset()),
        headers={name: value or b"" for name, value in message.headers() or ()},
        key=message.key(),
        time_ms=NO_TIME if kind == _NO_TIMESTAMP else time_ms,
    )
