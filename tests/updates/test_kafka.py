"""Kafka as a bus, on a real broker and on a cluster that plays faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from support.kafka_brokers import MockCluster, Tansu, kafka, mock_cluster, tansu

from hps_numba.testing import SourceContract
from hps_numba.updates import Update
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, headers_of
from hps_numba.updates.kafka_message_queue import KafkaSource

#: a group is joined after half of the first on the real broker
QUICK = {"session.timeout.ms": 1500, "heartbeat.interval.ms": 300}


@pytest.fixture
def broker() -> Iterator[Tansu]:
    with tansu() as made:
        yield made


@pytest.fixture
def cluster() -> Iterator[MockCluster]:
    with mock_cluster() as made:
        yield made


class _Contract(SourceContract):
    @pytest.fixture
    def address(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def open_source(self, address: str) -> Iterator[Callable[..., KafkaSource]]:
        made: list[KafkaSource] = []

        def source(**more: Any) -> KafkaSource:
            made.append(
                KafkaSource.from_options(brokers=address, metadata_refresh_interval_ms=100, properties=QUICK, **more)
            )
            return made[-1]

        yield source
        for one in made:
            one.close()

    @pytest.fixture
    def publish(self, address: str) -> Callable[[Sequence[Update]], None]:
        producer = kafka().Producer({"bootstrap.servers": address})

        def publish(updates: Sequence[Update]) -> None:
            for one in updates:
                if one.rows is None:
                    value, headers = encode_erasures(one.keys, 3)
                else:
                    value, headers = encode_rows(one.keys, one.rows), {}
                more = headers_of(event_time_ms=one.event_time_ms, version=one.version)
                producer.produce(one.table, value, partition=0, headers={**headers, **more})
            assert producer.flush(self.patience) == 0

        return publish


class TestOnABroker(_Contract):
    @pytest.fixture
    def address(self, broker: Tansu) -> str:
        return broker.address


class TestOnAMockCluster(_Contract):
    @pytest.fixture
    def address(self, cluster: MockCluster) -> str:
        return cluster.address
