"""U-C over Kafka: consumers and the broker are killed at any time; in the end the rows are those of an oracle."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.kafka_brokers import Tansu, kafka, tansu
from support.oracles import rows_of
from support.processes import environment
from support.redis_servers import PATIENT, one_server
from support.trainers import KEYS, KILLS, TRAINED_DIM, Oracle, Trainer, content_of, kill_consumers
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.kernels.hashing import partition_hash
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier
from hps_numba.updates.kafka_message_queue import KafkaProducer

TOPICS = [f"hps_et.m.sparse_embedding{number}" for number in range(2)]
PARTITIONS = 8
#: a member that was killed is given up after that, and the first of a group waits for half of it
QUICK = {"session.timeout.ms": 2000, "heartbeat.interval.ms": 300, "reconnect.backoff.max.ms": 200}


class Offsets:
    """What a group has committed, asked by a client that stays."""

    def __init__(self, address: str, group: str) -> None:
        self._client = kafka().Consumer({"bootstrap.servers": address, "group.id": group, "reconnect.backoff.max.ms": 200})
        self._places = [kafka().TopicPartition(topic, number) for topic in TOPICS for number in range(PARTITIONS)]

    def committed(self) -> int:
        """Messages that are committed, and 1; 0 if that is not known."""
        try:
            return 1 + sum(max(0, place.offset) for place in self._client.committed(self._places, timeout=HANG_SECONDS))
        except kafka().KafkaException:
            return 0

    def close(self) -> None:
        self._client.close()


def section(broker: Tansu, **more: Any) -> dict[str, Any]:
    """Of the config."""
    short = {"metadata_refresh_interval_ms": 100, "poll_timeout_ms": 20, "failure_backoff_ms": 5, "max_batch_size": 300}
    return {"type": "kafka", "brokers": broker.address, "properties": QUICK, "group": "kills", **short, **more}


def kill_broker(broker: Tansu, trainer: Trainer, kill: int) -> None:
    """Every other time; it is down for a moment, in which the trainer begins to send.

    Nothing is being sent when it is killed: this broker notes that a message has come before it has stored it, and one that was
    on its way at that moment is a duplicate to it when it comes again, which it acknowledges and has not.
    """
    if kill % 2 == 0:
        with trainer.between_rounds:
            broker.kill()
        threading.Event().wait(random.Random(kill).uniform(0, 0.5))
        broker.start()


@contextmanager
def trained(broker: Tansu, oracle: Oracle) -> Iterator[Trainer]:
    """A trainer publishes meanwhile; at the end the broker has everything."""
    properties = {"reconnect.backoff.max.ms": 200}
    with KafkaProducer.from_options(brokers=broker.address, linger_ms=0, properties=properties) as producer:
        trainer = Trainer(producer, oracle, pause=0.2)
        trainer.start()
        try:
            yield trainer
            wait_until(trainer.enough)
        finally:
            trainer.stopping = True
            join_all(trainer)
        assert trainer.problem is None


def compare_at_the_end(server: hps_numba.HPS, broker: Tansu, oracle: Oracle) -> None:
    """The rows become those of the oracle, in which the last message of every partition has keys that no other one has."""
    last = np.arange(KEYS, KEYS + 200)
    assert len(set((partition_hash(last.astype(np.uint64)) % PARTITIONS).tolist())) == PARTITIONS
    rows = rows_of(last, TRAINED_DIM)
    with KafkaProducer.from_options(brokers=broker.address, linger_ms=0) as producer:
        for number, table in enumerate(oracle):
            producer.update("m", f"sparse_embedding{number}", last, rows)
            table.update((int(key), row.tobytes()) for key, row in zip(last, rows))
        producer.flush(HANG_SECONDS)
    wait_until(lambda: all(content_of(server, table) == oracle[table] for table in range(2)))
    wait_until(lambda: server.update_stats()[0].lag_messages == 0)
    (stats,) = server.update_stats()
    assert (stats.lost, stats.skipped, stats.retries) == (0, {}, 0)


def test_killed_consumers_and_a_killed_broker_lose_nothing_and_change_no_order(workshop: Workshop) -> None:
    log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
    with ExitStack() as ending:
        broker = ending.enter_context(tansu(keeps=True))
        config: dict[str, Any] = {
            "models": [workshop.model((range(9), TRAINED_DIM), (range(9), TRAINED_DIM))],
            "tiers": [COLD, log],
            "update_source": section(broker),
        }
        path = workshop.folder / "ps.json"
        path.write_text(json.dumps(config))
        offsets = Offsets(broker.address, "kills")
        ending.callback(offsets.close)
        oracle: Oracle = [{}, {}]
        with trained(broker, oracle) as trainer:
            kill_consumers(path, offsets.committed, partial(kill_broker, broker, trainer))
        server = ending.enter_context(hps_numba.HPS(path))
        assert server.update_stats()[0].resumes
        compare_at_the_end(server, broker, oracle)
        assert offsets.committed() > 10 * KILLS


def reached(offsets: Offsets, target: int) -> bool:
    return offsets.committed() >= target


def started(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "support.update_consumer", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


def test_three_consumers_of_one_group_that_are_killed_in_turn_leave_the_rows_of_one(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PATIENT)
    with ExitStack() as ending:
        broker = ending.enter_context(tansu(keeps=True))
        redis = ending.enter_context(one_server(workshop.folder / "redis"))
        tier = {"type": "redis_cluster", "address": redis.address, "initialize_after_startup": False}
        config: dict[str, Any] = {
            "models": [workshop.model((range(9), TRAINED_DIM), (range(9), TRAINED_DIM))],
            "tiers": [tier],
            "update_source": section(broker, scope="shared"),
        }
        path = workshop.folder / "ps.json"
        path.write_text(json.dumps(config))
        offsets = Offsets(broker.address, "kills")
        ending.callback(offsets.close)
        numbers, oracle = random.Random(5), [{}, {}]  # type: ignore[var-annotated]
        consumers = [started(path) for _ in range(3)]
        try:
            with trained(broker, oracle) as trainer:
                for kill in range(max(2, KILLS // 2)):
                    target = offsets.committed() + numbers.randrange(2, 200)
                    wait_until(partial(reached, offsets, target))
                    threading.Event().wait(numbers.uniform(0, 0.3))
                    victim = consumers.pop(numbers.randrange(3))
                    victim.send_signal(signal.SIGKILL)
                    victim.communicate(timeout=HANG_SECONDS)
                    kill_broker(broker, trainer, kill)
                    consumers.append(started(path))
        finally:
            for child in consumers:
                child.send_signal(signal.SIGKILL)
                child.communicate(timeout=HANG_SECONDS)
        server = ending.enter_context(hps_numba.HPS(path))
        compare_at_the_end(server, broker, oracle)
        assert offsets.committed() > 10 * KILLS
