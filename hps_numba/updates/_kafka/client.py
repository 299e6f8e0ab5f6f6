"""librdkafka (confluent-kafka) in one place: how a client is made, and what its errors mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hps_numba.errors import ConfigError, TierUnavailable

__all__ = ["Client"]

log = logging.getLogger(__name__)
#: settings that decide what is lost or doubled, and those that have a key of their own
_OURS = frozenset(
    {
        "auto.offset.reset",
        "bootstrap.servers",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "enable.partition.eof",
        "error_cb",
        "group.id",
        "group.protocol",
        "log_level",
        "logger",
        "message.timeout.ms",
        "metadata.broker.list",
        "on_commit",
        "partition.assignment.strategy",
    }
)


class _Quiet:
    """Takes the log of librdkafka: it says the same many times a second while brokers are down, and errors come as such too."""

    def log(self, level: int, text: str, *values: object) -> None:
        log.debug(text, *values)


class Client:
    """Makes consumers and producers.

    Args:
        brokers: ``host:port``, separated by commas, or by semicolons as in HugeCTR's documentation.
        properties: of the user, for librdkafka, such as ``security.protocol``.

    Raises:
        TierUnavailable: confluent-kafka is not installed.   ConfigError: ``properties`` has one that is set here.
    """

    def __init__(self, brokers: str, properties: Mapping[str, Any]) -> None:
        try:
            import confluent_kafka
            import confluent_kafka.admin
        except ImportError as problem:
            raise TierUnavailable(f"kafka_message_queue: needs hps-numba[kafka]: {problem}") from None
        if taken := sorted(_OURS & set(properties)):
            raise ConfigError(f"properties.{taken[0]}: expected a property that is not set by us, got this one")
        self.kafka = confluent_kafka
        self.codes: Any = confluent_kafka.KafkaError
        self.problems: tuple[type[Exception], ...] = (confluent_kafka.KafkaException,)
        names = map(str.strip, brokers.replace(";", ",").split(","))
        self._brokers = ",".join(filter(None, names))  # librdkafka knows commas only
        self._properties = dict(properties)

    def consumer(self, settings: Mapping[str, Any]) -> Any:
        """A ``confluent_kafka.Consumer``.

        Raises:
            ConfigError: a property does not exist or is out of range.
        """
        return self._made(self.kafka.Consumer, settings)

    def producer(self, settings: Mapping[str, Any]) -> Any:
        """A ``confluent_kafka.Producer``.

        Raises:
            ConfigError: a property does not exist or is out of range.
        """
        return self._made(self.kafka.Producer, settings)

    def create_topic(self, name: str, partitions: int, replicas: int, seconds: float) -> None:
        """Create a topic unless it exists.

        Raises:
            KafkaException: the brokers refuse, or do not answer.
        """
        admin = self._made(self.kafka.admin.AdminClient, {})
        topic = self.kafka.admin.NewTopic(name, num_partitions=partitions, replication_factor=replicas)
        try:
            admin.create_topics([topic], request_timeout=seconds)[name].result(seconds + 1)
        except self.problems as problem:
            if problem.args[0].code() != self.codes.TOPIC_ALREADY_EXISTS:
                raise

    def place(self, topic: str, partition: int, offset: int = -1001) -> Any:
        """A ``TopicPartition``."""
        return self.kafka.TopicPartition(topic, partition, offset)

    def _made(self, kind: Any, settings: Mapping[str, Any]) -> Any:
        every = {"bootstrap.servers": self._brokers, "log.connection.close": False, "reconnect.backoff.max.ms": 1000}
        try:
            return kind({**every, **settings, **self._properties}, logger=_Quiet())
        except Exception as problem:
            said = problem.args[0] if problem.args else problem
            raise ConfigError(f"properties: {said.str() if isinstance(said, self.codes) else said}") from problem
