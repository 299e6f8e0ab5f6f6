"""``kafka_message_queue``: Kafka as a bus, with the topics, messages and groups of HugeCTR.

A topic a table. Offsets are committed when the rows are in every tier and cache. Each process has a consumer group of its own
and gets every update, unless the config says that processes share their rows.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hps_numba.errors import ConfigError, TierError, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.updates._kafka.client import Client
from hps_numba.updates._kafka.delivery import Delivery
from hps_numba.updates._kafka.reader import Hooks, Reader
from hps_numba.updates._producer import Outgoing, ProducerOptions, UpdateProducer
from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import Lost, Message, Position

__all__ = ["PLUGIN", "KafkaProducer", "KafkaSource", "Options"]

_MORE_BYTES = 1024  # of a message beyond its buffer
_LEAST_FETCH = 1 << 20  # bytes that are asked of a partition at once
_HOLD_AFTER = 2.0  # seconds without a poll, after which reading is paused so that the group does not wait for this member
_DRAIN_SECONDS = 60.0  # that what was read may take to be applied before its partitions go to another member
_SLICE = 0.1

_Property = str | int | float | bool


@dataclass(frozen=True, kw_only=True)
class KafkaProducerOptions(ProducerOptions):
    """Keys of the producer.

    Attributes:
        brokers: ``host:port`` of one or more, separated by commas or semicolons.
        topic_partitions: of a topic that does not exist yet and is created; 0 creates none.
        topic_replicas: of such a topic; -1: as the brokers are configured.
        send_timeout_ms: that a call waits while ``num_send_buffers`` messages are on their way.
        properties: of librdkafka, such as ``security.protocol``, ``sasl.username``, ``compression.type``.
    """

    brokers: str = "127.0.0.1:9092"
    topic_partitions: int = 8
    topic_replicas: int = -1
    send_timeout_ms: float = 30_000.0
    properties: Mapping[str, _Property] = field(default_factory=dict)


class KafkaProducer(UpdateProducer):
    """Publishes to the topics of tables. What was taken is kept until the brokers have it, however long that takes."""

    Options = KafkaProducerOptions

    def __init__(self, options: Any = None) -> None:
        self._delivery: Delivery | None = None
        self._partitions: dict[str, int] = {}
        self._forked = False
        super().__init__(options)
        chosen: KafkaProducerOptions = self.options
        try:
            for name, least in (("topic_partitions", 0), ("topic_replicas", -1), ("send_timeout_ms", 0)):
                if getattr(chosen, name) < least:
                    raise ConfigError(f"{name}: expected at least {least}, got {getattr(chosen, name)}")
            self._client = Client(chosen.brokers, chosen.properties)
            settings = {
                "message.max.bytes": min(10**9, max(1000, chosen.send_buffer_size + 2 * _MORE_BYTES)),
                "queue.buffering.max.messages": min(chosen.num_send_buffers, 10_000_000),
                "queue.buffering.max.kbytes": 2**21 - 1,
                "allow.auto.create.topics": False,  # brokers would choose the number of partitions
                "linger.ms": 1,  # messages are filled before they come here
            }
            self._delivery = Delivery(self._client, settings)
        except BaseException:
            self._timer.close()
            raise

    def reset_after_fork(self) -> None:
        super().reset_after_fork()
        if self._delivery is not None:
            self._forked = True
            self._delivery.leak()

    def _send(self, messages: Sequence[Outgoing]) -> int:
        delivery = self._mine()
        delivery.raise_refused()
        end = time.monotonic() + self.options.send_timeout_ms / 1000
        taken = 0
        for message in messages:
            count = self._partitions.get(message.table)
            if count is None:
                if taken:
                    break
                count = self._partitions[message.table] = self._topic(delivery, message.table)
            while not delivery.take(message, message.partition % count):
                if taken:
                    return taken
                if time.monotonic() > end:
                    delivery.raise_waiting(self.options.send_timeout_ms / 1000)
                delivery.serve(_SLICE)
            taken += 1
        return taken

    def _topic(self, delivery: Delivery, topic: str) -> int:
        """Partitions of a topic, which is created if it is missing.

        Raises:
            TierError: it cannot be, or no broker answers.
        """
        end = time.monotonic() + self.options.send_timeout_ms / 1000
        wanted = self.options.topic_partitions
        count = delivery.partitions_of(topic, max(1.0, end - time.monotonic()))
        if not count and wanted:
            try:
                self._client.create_topic(topic, wanted, self.options.topic_replicas, max(1.0, end - time.monotonic()))
            except self._client.problems as problem:
                raise TierError(f"{topic}: cannot be created: {problem.args[0].str()}") from problem
        while not count:
            if time.monotonic() > end:
                raise TierError(f"{topic}: expected a topic, got none after {self.options.send_timeout_ms:g} ms")
            count = delivery.partitions_of(topic, max(1.0, end - time.monotonic()))
            if not count:
                delivery.serve(_SLICE)
        return count

    def _settle(self, seconds: float) -> None:
        delivery = self._mine()
        end = time.monotonic() + seconds
        while delivery.waiting and (left := end - time.monotonic()) > 0:
            delivery.serve(min(left, _SLICE))
        delivery.serve(0)
        delivery.raise_refused()
        delivery.raise_waiting(seconds)

    def _close(self) -> None:
        if self._delivery is not None and not self._forked:
            self._delivery.close()
            self._delivery = None

    def _mine(self) -> Delivery:
        if self._delivery is None or self._forked:
            raise TierUnavailable("kafka_message_queue: expected the process that opened it, got a child forked from it")
        return self._delivery


@dataclass(frozen=True)
class Options:
    """Keys of an ``update_source`` of this type, beside those of HugeCTR.

    Attributes:
        scope: who shares the updates: ``process``: every process gets all of them; ``host``, ``shared``: the processes of a
            host, or all, get each update once, as they share the rows (in shared memory or in Redis) and have no others.
        consumer: names this process among those of its host whose rows outlive them, so that it finds its place again.
        group: id of the consumer group, instead of HugeCTR's names.
        topics: regular expressions, which begin with ``^``, or names.
        properties: of librdkafka, such as ``security.protocol``, ``sasl.username``, ``session.timeout.ms``.
    """

    scope: Literal["process", "host", "shared"] = "process"
    consumer: str = ""
    group: str = ""
    topics: tuple[str, ...] = (r"^hps_et\..+\..+$",)
    properties: Mapping[str, _Property] = field(default_factory=dict)


class KafkaSource(UpdateSource):
    """Reads the topics of tables.

    Attributes:
        group: id of its consumer group.
    """

    Options = Options
    Producer = KafkaProducer

    def __init__(self, section: Any, *, resume: bool = True, key_bytes: int = 8) -> None:
        super().__init__(section, resume=resume, key_bytes=key_bytes)
        options: Options = self.options
        if not options.topics:
            raise ConfigError("topics: expected at least one, got none")
        self.group = options.group or group_of(options, resume)
        self._woken = self._closed = False
        self.starts_over = options.scope == "process"  # else others have written rows that would be taken back
        self._polled = time.monotonic()
        message = section.receive_buffer_size + _MORE_BYTES
        self._reader = Reader(
            Client(section.brokers, options.properties),
            self._settings(message),
            options.topics,
            alone=options.scope == "process" and resume,
            resume=resume,
            at_once=max(1, min(256, section.max_backlog_bytes // message)),
            hooks=Hooks(revoked=lambda: self.drained(_DRAIN_SECONDS), lost=lambda: self.drained(0.0)),
        )
        register_fork_reset(self)

    def _settings(self, message: int) -> dict[str, _Property]:
        section = self.section
        return {
            "group.id": self.group,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "error",  # offsets that are gone are not passed over silently
            "partition.assignment.strategy": "range,roundrobin",
            "session.timeout.ms": 30_000,
            "topic.metadata.refresh.interval.ms": section.metadata_refresh_interval_ms,
            "message.max.bytes": message,
            "fetch.message.max.bytes": max(message, _LEAST_FETCH),
            "queued.max.messages.kbytes": max(1024, min(section.max_backlog_bytes >> 10, 2**21 - 1)),
            "fetch.wait.max.ms": 100,
        }

    def reset_after_fork(self) -> None:
        """A forked child reads nothing."""
        self._closed = True
        self._reader.leak()

    def poll(self, seconds: float) -> Sequence[Message | Lost]:
        self._woken = False
        if not self._reader.ready:
            self._reader.read(seconds, lambda: self._woken)
        self._polled = time.monotonic()
        some = list(self._reader.ready)
        self._reader.ready.clear()
        self.has_more = self._reader.has_more
        return some

    def commit(self, positions: Sequence[Position]) -> None:
        self._reader.commit(positions)

    def start_over(self, lost: Sequence[Lost]) -> None:
        self._reader.start_over({str(one.position.partition) for one in lost})

    def losses_handled(self) -> None:
        self._reader.losses_handled()

    def keep_alive(self) -> None:
        if time.monotonic() - self._polled >= _HOLD_AFTER:
            self._reader.hold()

    def lag(self) -> Mapping[str, int] | None:
        return self._reader.lag()

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._reader.close()


def group_of(options: Options, resume: bool) -> str:
    """The consumer group, by HugeCTR's names: ``hps.persistent`` if it resumes, else ``hps.volatile``."""
    parts = ["hps.persistent" if resume else "hps.volatile"]
    if options.scope != "shared":
        parts.append(platform.node() or "localhost")
    if options.scope == "process":
        if not resume:
            parts.append(f"{os.getpid()}-{secrets.token_hex(4)}")  # its rows end with it, and so does its place
        elif options.consumer:
            parts.append(options.consumer)
    return ".".join(parts)


PLUGIN = KafkaSource
