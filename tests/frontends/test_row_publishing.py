"""What a trainer publishes: the last row of every key that steps changed, nothing older, and nothing lost on the way."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.factories import Workshop
from support.oracles import assert_same_bits
from support.updates import fresh_bus, source_of
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.errors import ClosedError, ConfigError, TierError
from hps_numba.frontends._row_publishing import RowPublisher
from hps_numba.training.trainer import Adagrad, RowTrainer, Sgd
from hps_numba.updates import Message, UpdateProducer, open_producer
from hps_numba.updates._wire.messages import read_message
from hps_numba.updates.in_process import Bus

DIM, KEYS = 3, 200


class Scene:
    """A server that is trained, a bus, and a server that reads it."""

    def __init__(self, workshop: Workshop, rule: Any = None, **entry: Any) -> None:
        self.bus = fresh_bus()
        self.entry = workshop.model((range(9), DIM), (range(9), DIM), **entry)
        self.trained = workshop.open(self.entry)
        self.served = workshop.open(self.entry, update_source=source_of(self.bus))
        rule = rule or Sgd(lr=1.0)
        self.trainers = [RowTrainer(self.trained, "m", table, rule) for table in (0, 1)]

    def publisher(self, **more: Any) -> RowPublisher:
        return RowPublisher(self.trainers, {"type": "in_process", "bus": self.bus.name, "linger_ms": 0}, **more)

    def settle(self) -> None:
        """Wait until the server has everything that is on the bus."""
        wait_until(lambda: self.bus.behind(self.served.update_stats()[0].committed.get(0, -1) + 1) == 0)

    def check(self) -> None:
        """Both servers have the same rows."""
        self.settle()
        for table in (0, 1):
            with self.trained.locked_table("m", table) as (keys, rows_at):
                rows = rows_at(keys)
            assert_same_bits(self.served.lookup(keys, "m", table), rows)
            with self.served.locked_table("m", table) as (there, _):
                assert keys.tolist() == there.tolist()


def messages(bus: Bus) -> list[Message]:
    return [item for item in bus.read(0, 10_000, 0.0, lambda: True) if isinstance(item, Message)]


@pytest.mark.parametrize("rule", [Sgd(lr=0.5), Adagrad(lr=0.1)], ids=["sgd", "adagrad"])
def test_steps_of_several_threads_reach_another_server(workshop: Workshop, rule: Any) -> None:
    scene = Scene(workshop, rule)

    def train(number: int) -> None:
        rng = np.random.default_rng(number)
        for _ in range(40):
            keys = rng.choice(KEYS, 20, replace=False).astype(np.int64)
            scene.trainers[number % 2].step(keys, rng.normal(size=(20, DIM)).astype(np.float32))
            keys[:] = -1  # the caller's array is the caller's

    with scene.publisher(interval_ms=2) as publisher:
        threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        join_all(*threads)
        scene.trained.erase([3, 4], "m", 0)
        scene.trainers[0].step(np.array([3]), np.ones((1, DIM), np.float32))
        publisher.flush()
        assert publisher.published >= 2 and publisher.failures == 0
    scene.settle()
    scene.served.erase([4], "m", 0)  # an erasure is no step: it is not published
    scene.check()


def test_a_row_is_sent_once_an_interval_with_the_time_of_its_first_step(workshop: Workshop) -> None:
    scene = Scene(workshop)
    scene.served.close()
    before = time.time_ns() // 1_000_000
    with scene.publisher(interval_ms=1e7, version=5) as publisher:
        for _ in range(10):
            scene.trainers[0].step(np.arange(4), np.ones((4, DIM), np.float32))
        after = time.time_ns() // 1_000_000
        publisher.flush()
        assert publisher.published == 4
        contents = [read_message(message, dim=DIM, key_bytes=8) for message in messages(scene.bus)]
        assert sum(content.pairs for content in contents) == 4 and {content.version for content in contents} == {5}
        assert all(before <= content.event_time_ms <= after for content in contents)
        scene.trainers[0].step(np.array([100]), np.ones((1, DIM), np.float32))
        scene.trained.erase([100], "m", 0)
        publisher.flush()
        last = read_message(messages(scene.bus)[-1], dim=DIM, key_bytes=8)
        assert (last.pairs, last.erased) == (0, 1)
    count = len(messages(scene.bus))
    scene.trainers[0].step(np.arange(4), np.ones((4, DIM), np.float32))
    with pytest.raises(ClosedError, match="publisher"):
        publisher.flush()
    publisher.close()
    assert len(messages(scene.bus)) == count


class Failing(UpdateProducer):
    """A bus that is down while ``down`` is true."""

    down = False

    def __init__(self) -> None:
        self.inner = None
        self.sent = 0
        super().__init__()

    def _send(self, messages: Any) -> int:
        if self.down:
            raise TierError("bus: expected an answer, got none")
        self.sent += len(messages)
        return len(messages)


def test_a_bus_that_is_down_keeps_no_step_waiting_and_gets_the_rows_later(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(workshop)
    with Failing() as producer:
        publisher = RowPublisher(scene.trainers, producer, interval_ms=2)
        producer.down = True
        for _ in range(3):
            failures = publisher.failures
            scene.trainers[1].step(np.arange(5), np.ones((5, DIM), np.float32))
            wait_until(lambda: publisher.failures > failures)  # noqa: B023
        assert "expected an answer" in publisher.last_problem and sum("not published" in line for line in caplog.messages) == 1
        with pytest.raises(TierError, match="expected an answer"):
            publisher.flush()
        assert producer.sent == 0
        producer.down = False
        publisher.close()
        assert producer.sent > 0
        producer.update("m", "x", [1], np.ones((1, 2), np.float32))  # it stays open


def test_a_snapshot_is_written_while_steps_go_on(workshop: Workshop) -> None:
    scene = Scene(workshop)
    names = [trainer.spec.name for trainer in scene.trainers]
    ones = np.ones((20, DIM), np.float32)
    with scene.publisher(interval_ms=2) as publisher:
        scene.trainers[0].step(np.arange(20), ones)
        since = publisher.announce_snapshot(2)["m"]
        files = {}
        for table, name in enumerate(names):
            with scene.trained.locked_table("m", table) as (keys, rows_at):
                files[name] = str(workshop.folder / f"snapshot-{name}.model")
                hps_numba.write_model(files[name], DIM, [(keys, rows_at(keys))])
            scene.trainers[0].step(np.arange(10, 30), ones)
            scene.trainers[1].step(np.arange(100, 120), ones)
        publisher.replace_model("m", 2, files, since_ms=since)
        scene.trainers[0].step(np.arange(5), ones[:5])
    scene.check()
    assert scene.served.model_version("m") == 2 and not scene.served.update_stats()[0].skipped


def test_a_forked_child_publishes_nothing(workshop: Workshop) -> None:
    scene = Scene(workshop)
    with scene.publisher(interval_ms=1e7) as publisher:
        scene.trainers[0].step(np.arange(4), np.ones((4, DIM), np.float32))

        def child() -> bool:
            publisher.flush()
            return publisher.published == 0

        assert in_child(child) == 0
    scene.check()


def test_arguments(workshop: Workshop) -> None:
    scene = Scene(workshop)
    for more, expected in (({"interval_ms": 0}, "interval_ms: expected at least 1, got 0"), ({"version": -1}, "version")):
        with pytest.raises(ConfigError, match=expected):
            scene.publisher(**more)
    producer = open_producer({"type": "in_process", "bus": scene.bus.name})
    with producer, RowPublisher(scene.trainers, producer):
        assert scene.trained.models == ("m",)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_optimizers_of_the_front_ends_publish(workshop: Workshop, framework: str) -> None:
    """A layer in a server of the registry is trained; a server that reads the bus has its rows."""
    pytest.importorskip(framework)
    from hps_numba.server.registry import SERVERS

    bus = fresh_bus()
    entry = workshop.model((range(9), DIM))
    config = {"supportlonglong": True, "models": [entry]}
    served = workshop.open(entry, update_source=source_of(bus))
    section = {"type": "in_process", "bus": bus.name, "linger_ms": 0}
    try:
        rows = (_with_torch if framework == "torch" else _with_tensorflow)(config, section)
        wait_until(lambda: bus.behind(served.update_stats()[0].committed.get(0, -1) + 1) == 0)
        assert_same_bits(served.lookup([1, 2, 50], "m", 0), rows)
        assert not (rows == -7.5).any()
    finally:
        SERVERS.close()


def _with_torch(config: Any, section: Any) -> np.ndarray:
    import torch

    from hps_numba.frontends import torch as hps

    layer = hps.LookupLayer(config, "m", 0, DIM, trainable=True)
    optimizer = hps.SGD(layer, lr=0.5)
    with hps.publish_rows(optimizer, section, interval_ms=5):
        for _ in range(3):
            layer(torch.tensor([1, 2, 2, 50])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(ConfigError, match="optimizer: expected SGD"):
        hps.publish_rows(torch.optim.SGD([torch.zeros(1)]), section)  # type: ignore[arg-type]
    return np.asarray(hps.server_of(config).lookup([1, 2, 50], "m", 0))


def _with_tensorflow(config: Any, section: Any) -> np.ndarray:
    import tensorflow as tf

    from hps_numba.frontends import tensorflow as hps

    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=config, train_rows=True)
    optimizer = hps.SGD(layer, lr=0.5)
    with hps.publish_rows(optimizer, section, interval_ms=5):
        for _ in range(3):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(layer(tf.constant([1, 2, 2, 50], tf.int64), training=True) ** 2)
            tape.gradient(loss, layer.trainable_variables)
            optimizer.step()
    with pytest.raises(ConfigError, match="optimizer: expected one of"):
        hps.publish_rows(object(), section)  # type: ignore[arg-type]
    return np.asarray(hps.server_of(config).lookup([1, 2, 50], "m", 0))
