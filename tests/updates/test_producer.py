"""Producers: partitions and messages of HugeCTR, buffers that are sent when full or old, and no loss without an error."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.oracles import rows_of
from support.updates import fresh_bus
from support.waiting import join_all, wait_until

from hps_numba.errors import ArrayError, ClosedError, ConfigError, KeyDtypeError, TierError, TierUnavailable
from hps_numba.kernels.hashing import partition_hash
from hps_numba.updates import Message, Outgoing, Position, ProducerOptions, UpdateProducer, open_producer
from hps_numba.updates._batches import batch_of
from hps_numba.updates.in_process import InProcessProducer


class ListProducer(UpdateProducer):
    """Puts what it is given into a list, unless it is told to fail."""

    def __init__(self, **keys: Any) -> None:
        self.sent: list[Outgoing] = []
        self.fails: BaseException | None = None
        self.settled = self.released = 0
        super().__init__(ProducerOptions(**{"linger_ms": 0, **keys}))

    def _send(self, messages: Sequence[Outgoing]) -> int:
        if self.fails is not None:
            raise self.fails
        self.sent += messages[:3]
        return min(3, len(messages))

    def _settle(self, seconds: float) -> None:
        self.settled += 1

    def _close(self) -> None:
        self.released += 1


def content_of(sent: Sequence[Outgoing], dim: int = 3, key_bytes: int = 8) -> dict[str, dict[int, bytes]]:
    """Table -> key -> bits of its row, as a server would have them."""
    tables: dict[str, dict[int, bytes]] = {}
    for one in sent:
        message = Message(one.table, one.value, Position(0, 0), one.headers)
        batch = batch_of([message], dim=dim, key_bytes=key_bytes, finite=False, on_skip=lambda *what: pytest.fail(str(what)))
        table = tables.setdefault(one.table, {})
        table.update((int(key), row.tobytes()) for key, row in zip(batch.keys, batch.rows))
        for key in batch.erased.tolist():
            table.pop(key, None)
    return tables


def partition_of(key: int) -> int:
    with np.errstate(over="ignore"):
        return int(partition_hash(np.uint64(key & (2**64 - 1)))) % 8


def test_u03_a_key_goes_to_one_of_eight_partitions_by_the_hash_of_hugectr() -> None:
    keys = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 500)
    with ListProducer() as producer:
        producer.update("m", "a", keys, rows_of(keys, 3))
    assert {one.table for one in producer.sent} == {"hps_et.m.a"}
    assert {one.partition for one in producer.sent} == set(range(8))
    for one in producer.sent:
        assert one.value is not None and one.value[:8] == b"HCTR" + struct.pack("<I", 12)
        there = [struct.unpack_from("<q", one.value, at)[0] for at in range(8, len(one.value), 20)]
        assert {partition_of(key) for key in there} == {one.partition}
        positions = [keys.tolist().index(key) for key in there]
        assert positions == sorted(positions), "in the order given"
    assert content_of(producer.sent) == {"hps_et.m.a": {int(key): row.tobytes() for key, row in zip(keys, rows_of(keys, 3))}}


@pytest.mark.parametrize("key_bits", [64, 32])
def test_messages_are_as_large_as_the_buffer_at_most(key_bits: int) -> None:
    keys = np.arange(1000)
    size = 8 + 5 * (key_bits // 8 + 12)
    with ListProducer(key_bits=key_bits, send_buffer_size=size + 3) as producer:
        producer.update("m", "a", keys, rows_of(keys, 3))
        sizes = [len(one.value or b"") for one in producer.sent]
        assert set(sizes) == {size}, "what is full was sent at once"
        assert len(sizes) >= 1000 // 5 - 8
    assert max(len(one.value or b"") for one in producer.sent) == size
    assert len(content_of(producer.sent, key_bytes=key_bits // 8)["hps_et.m.a"]) == 1000


def test_changes_of_a_key_stay_in_order_whatever_they_are() -> None:
    random = np.random.default_rng(2)
    expected: dict[int, bytes] = {}
    with ListProducer(send_buffer_size=100) as producer:
        for step in range(300):
            keys = random.integers(0, 30, int(random.integers(0, 5)))
            if random.random() < 0.4:
                producer.erase("m", "a", keys)
                for key in keys.tolist():
                    expected.pop(key, None)
            else:
                rows = rows_of(keys, 3, step % 20)
                producer.update("m", "a", keys, rows, version=int(random.integers(0, 2)))
                expected.update((int(key), row.tobytes()) for key, row in zip(keys, rows))
    assert content_of(producer.sent)["hps_et.m.a"] == expected


def test_headers_tell_the_oldest_event_of_a_message_and_its_version() -> None:
    with ListProducer() as producer:
        for time_ms, version in ((50, 1), (40, 1), (60, 2)):
            producer.update("m", "a", [1], rows_of([1], 3), event_time_ms=time_ms, version=version)
    assert [one.headers for one in producer.sent] == [
        {"hps-time-ms": b"40", "hps-version": b"1"},
        {"hps-time-ms": b"60", "hps-version": b"2"},
    ]


def test_deletions_of_a_table_of_unknown_width_have_no_value() -> None:
    with ListProducer() as producer:
        producer.erase("m", "a", [1], event_time_ms=7)
        producer.update("m", "b", [1], rows_of([1], 3))
        producer.erase("m", "b", [1])
    assert [(one.table[-1], one.value) for one in producer.sent if "hps-erased" in one.headers] == [
        ("a", None),
        ("b", b"HCTR" + struct.pack("<I", 12)),
    ]


def test_what_the_bus_does_not_take_is_an_error_and_is_kept() -> None:
    producer = ListProducer(send_buffer_size=8 + 20)
    producer.fails = TierUnavailable("away")
    with pytest.raises(TierUnavailable, match="away"):
        producer.update("m", "a", [1, 2, 3], rows_of([1, 2, 3], 3))
    with pytest.raises(TierUnavailable, match="away"):
        producer.update("m", "a", [4], rows_of([4], 3))  # not taken
    with pytest.raises(TierUnavailable, match="away"):
        producer.flush()
    producer.fails = None
    producer.flush()
    assert set(content_of(producer.sent)["hps_et.m.a"]) == {1, 2, 3}
    assert producer.settled == 1
    producer.close()


def test_closing_raises_what_was_not_delivered_and_releases_the_bus() -> None:
    producer = ListProducer()
    producer.update("m", "a", [1], rows_of([1], 3))
    producer.fails = TierError("away")
    with pytest.raises(TierError, match="away"):
        producer.close()
    assert producer.released == 1
    producer.close()
    for call in (
        producer.flush,
        lambda: producer.update("m", "a", [1], rows_of([1], 3)),
        lambda: producer.erase("m", "a", [1]),
    ):
        with pytest.raises(ClosedError):
            call()
    assert producer.released == 1


def test_what_lingers_is_sent_and_a_failure_meanwhile_is_raised_by_the_next_call() -> None:
    producer = ListProducer(linger_ms=5)
    producer.update("m", "a", [1], rows_of([1], 3))
    wait_until(lambda: producer.sent)
    producer.fails = TierError("away")
    producer.update("m", "a", [2], rows_of([2], 3))
    wait_until(lambda: producer._problem)
    producer.fails = None
    with pytest.raises(TierError, match="an update published before was not sent yet: away"):
        producer.erase("m", "a", [1])
    producer.close()
    assert set(content_of(producer.sent)["hps_et.m.a"]) == {1, 2}


def test_threads_publish_at_a_time() -> None:
    with ListProducer(send_buffer_size=200, linger_ms=1) as producer:

        def publish(first: int) -> None:
            for key in range(first, first + 300):
                producer.update("m", "a", [key], rows_of([key], 3))

        threads = [threading.Thread(target=publish, args=(1000 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        join_all(*threads)
    assert len(content_of(producer.sent)["hps_et.m.a"]) == 1200


def test_a_forked_child_does_not_send_what_its_parent_was_given() -> None:
    producer = ListProducer()
    producer.update("m", "a", [1], rows_of([1], 3))

    def work() -> bool:
        producer.flush()
        return producer.sent == []

    assert in_child(work) == 0
    producer.close()
    assert set(content_of(producer.sent)["hps_et.m.a"]) == {1}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.update("m", "a", [1.5], rows_of([1], 3)), KeyDtypeError, r"keys: expected integers \[n\], got float64"),
        (lambda p: p.update("m", "a", [[1]], rows_of([1], 3)), KeyDtypeError, r"got int64\[1, 1\]"),
        (
            lambda p: p.update("m", "a", [1], rows_of([1, 2], 3)),
            ArrayError,
            r"rows: expected float32\[1, dim\], got float32\[2, 3\]",
        ),
        (lambda p: p.update("m", "a", [1], np.zeros((1, 3))), ArrayError, "got float64"),
        (lambda p: p.update("m", "a.b", [1], rows_of([1], 3)), ConfigError, "table: expected 1 to 120 of the characters"),
        (lambda p: p.erase("", "a", [1]), ConfigError, "model: expected 1 to 120 of the characters"),
        (lambda p: p.update("m", "a", [1], rows_of([1], 30)), ConfigError, "send_buffer_size: expected at least 136 for a row"),
    ],
)
def test_what_is_wrong_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with ListProducer(send_buffer_size=100) as producer, pytest.raises(error, match=message):
        call(producer)
    assert producer.sent == []


def test_narrow_keys_are_checked() -> None:
    with ListProducer(key_bits=32) as producer, pytest.raises(KeyDtypeError, match="32 bits"):
        producer.erase("m", "a", [2**32])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"key_bits": 16}, "key_bits: expected 32 or 64, got 16"),
        ({"send_buffer_size": 7}, "send_buffer_size: expected at least 8, got 7"),
        ({"linger_ms": -1}, "linger_ms: expected at least 0, got -1"),
        ({"lingerms": 1}, "lingerms: unknown key, did you mean 'linger_ms'"),
        ({"bus": 1}, "bus: expected a string, got 1"),
    ],
)
def test_options_are_checked(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InProcessProducer.from_options(**keys)


def test_the_producer_of_a_bus_is_found_by_its_type() -> None:
    bus = fresh_bus()
    with open_producer({"type": "in_process", "bus": bus.name}) as producer:
        assert isinstance(producer, InProcessProducer)
        producer.update("m", "a", [1], rows_of([1], 3))
    (message,) = bus.read(0, 10, 0, lambda: False)
    assert isinstance(message, Message) and message.table == "hps_et.m.a"
    with pytest.raises(TierUnavailable, match="'no_bus' is unknown, known are files, in_process"):
        open_producer({"type": "no_bus"})
    with pytest.raises(ConfigError, match=r"expected a bus with a producer, got 'support.updates:ListSource'"):
        open_producer({"type": "support.updates:ListSource"}, allow_code=True)
    with pytest.raises(TierUnavailable, match="pass allow_code=True if you trust it"):
        open_producer({"type": "support.updates:ListSource"})
