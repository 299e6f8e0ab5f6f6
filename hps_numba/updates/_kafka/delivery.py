"""Messages on their way to the brokers: in the order given, none twice, and none gone without a word."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from hps_numba.errors import TierError
from hps_numba.runtime.immortal import keep_forever
from hps_numba.updates._kafka.client import Client
from hps_numba.updates._producer import Outgoing

__all__ = ["Delivery"]


class Delivery:
    """An idempotent producer that never gives up on a message by itself.

    A message waits for its broker without a limit. The brokers can refuse it (it is too large, or not allowed); that is said
    once, and it is dropped. After an error that ends a producer (its brokers have forgotten it), what was not delivered is sent
    again by a new one, in order.

    Args:
        settings: of librdkafka.

    Thread safety: one thread at a time.
    """

    def __init__(self, client: Client, settings: Mapping[str, Any]) -> None:
        self._client = client
        self._settings = {**settings, "enable.idempotence": True, "message.timeout.ms": 0, "error_cb": self._on_error}
        self._again: deque[tuple[Outgoing, int]] = deque()  # to be sent once more, oldest first
        self._refused: list[str] = []
        self._fatal = False
        self.last_problem = ""
        self._producer: Any = client.producer(self._settings)

    @property
    def waiting(self) -> int:
        """Messages that were taken and are not delivered."""
        return len(self._producer) + len(self._again)

    def partitions_of(self, topic: str, seconds: float) -> int:
        """How many a topic has; 0 if it does not exist.

        Raises:
            TierError: no broker answers.
        """
        try:
            found = self._producer.list_topics(topic, timeout=seconds).topics.get(topic)
        except self._client.problems as problem:
            raise TierError(f"{topic}: {problem.args[0].str()}{self._said()}") from problem
        return 0 if found is None or found.error is not None else len(found.partitions)

    def take(self, message: Outgoing, partition: int) -> bool:
        """Take a message, unless there is no room."""
        self.serve(0)
        if self._fatal or self._again:
            return False
        return self._put(message, partition)

    def serve(self, seconds: float) -> None:
        """Hear what became of messages, and wait for that if there is nothing to hear."""
        self._producer.poll(seconds)
        if self._fatal:
            self._reopen()
        while self._again and self._put(*self._again[0]):
            self._again.popleft()

    def raise_refused(self) -> None:
        """
        Raises:
            TierError: brokers have refused messages since it was called last.
        """
        refused, self._refused = self._refused, []
        if refused:
            raise TierError(f"{len(refused)} messages were refused and are not on the bus: {refused[0]}")

    def raise_waiting(self, seconds: float) -> None:
        """
        Raises:
            TierError: messages wait after so many seconds.
        """
        if self.waiting:
            raise TierError(f"{self.waiting} messages are not delivered after {seconds:g} s, and are kept{self._said()}")

    def close(self) -> None:
        """Drop what waits, and release everything."""
        self._producer.purge()
        self._producer.poll(0)
        self._producer = None

    def leak(self) -> None:
        """For a forked child, as ``Reader.leak``."""
        keep_forever(self._producer)

    def _said(self) -> str:
        return f": {self.last_problem}" if self.last_problem else ""

    def _put(self, message: Outgoing, partition: int) -> bool:
        told = partial(self._on_delivery, message, partition)
        headers = list(message.headers.items())
        try:
            self._producer.produce(message.table, message.value, partition=partition, headers=headers, on_delivery=told)
        except BufferError:
            return False
        except self._client.problems as problem:
            error = problem.args[0]
            if error.fatal():
                self._fatal = True
                return False
            self._refused.append(f"{message.table}[{partition}]: {error.str()}")
        return True

    def _on_delivery(self, message: Outgoing, partition: int, error: Any, sent: Any) -> None:
        if error is None:
            self.last_problem = ""
        elif self._fatal or error.fatal() or error.code() == self._client.codes._FATAL:
            self._fatal = True
            self._again.append((message, partition))
        elif error.code() not in (self._client.codes._PURGE_QUEUE, self._client.codes._PURGE_INFLIGHT):
            self._refused.append(f"{message.table}[{partition}]: {error.str()}")

    def _on_error(self, error: Any) -> None:
        self.last_problem = error.str()
        if error.fatal() or error.code() == self._client.codes._FATAL:
            self._fatal = True

    def _reopen(self) -> None:
        """A new producer for one that has ended; what it has not delivered was told before it is gone."""
        self._producer.flush(1.0)
        if len(self._producer):
            return
        self._producer = self._client.producer(self._settings)
        self._fatal = False
