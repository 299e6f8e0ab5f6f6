"""The wire format: messages built byte by byte after its description are decoded, and ours are what a plain script expects."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
import pytest
from support.oracles import assert_same_bits, rows_of

from hps_numba.updates import Message, Position, Update
from hps_numba.updates._batches import TableBatch, batch_of
from hps_numba.updates._wire.messages import encode_erasures, encode_rows, header_of, headers_of

TABLE = "hps_et.m.a"
FUZZED = int(os.environ.get("HPS_NUMBA_FUZZED_MESSAGES", "3000"))
WIDE = [0, -1, 1, 2**63 - 1, -(2**63), 2**32, 7]
NARROW = [0, 1, 2**31, 2**32 - 1, 7]


def by_hand(pairs: Any, *, dim: int = 3, key: str = "q") -> bytes:
    """A value, one field after the other."""
    value = bytearray(b"HCTR")
    value += struct.pack("<I", 4 * dim)
    for number, row in pairs:
        value += struct.pack("<" + key, number)
        for element in row:
            value += struct.pack("<f", element)
    return bytes(value)


def message(value: bytes | None, offset: int = 0, **more: Any) -> Message:
    return Message(TABLE, value, Position(0, offset), **more)


def decoded(*items: Message | Update, dim: int = 3, key_bytes: int = 8, finite: bool = False) -> tuple[TableBatch, list[str]]:
    skipped: list[str] = []
    batch = batch_of(items, dim=dim, key_bytes=key_bytes, finite=finite, on_skip=lambda item, skip: skipped.append(skip.reason))
    return batch, skipped


@pytest.mark.parametrize(("key_bytes", "key", "keys"), [(8, "q", WIDE), (4, "I", NARROW)])
def test_a_message_built_byte_by_byte_is_decoded(key_bytes: int, key: str, keys: list[int]) -> None:
    rows = rows_of(keys, 3)
    batch, skipped = decoded(message(by_hand(zip(keys, rows), key=key)), key_bytes=key_bytes)
    assert batch.keys.tolist() == keys
    assert_same_bits(batch.rows, rows)
    assert (batch.writes, batch.messages, batch.erased.tolist(), skipped) == (len(keys), 1, [], [])


@pytest.mark.parametrize(("key_bytes", "key", "keys"), [(8, "q", WIDE), (4, "I", NARROW)])
@pytest.mark.parametrize("dim", [1, 3, 32])
def test_our_messages_are_what_a_plain_script_expects(key_bytes: int, key: str, keys: list[int], dim: int) -> None:
    rows = rows_of(keys, dim)
    assert encode_rows(np.array(keys, np.int64), rows, key_bytes=key_bytes) == by_hand(zip(keys, rows), dim=dim, key=key)


def test_rows_are_opaque_bits() -> None:
    patterns = np.array([[0x7FC00001, 0xFFC12345, 0x7F800001], [0x80000000, 1, 0xFFFFFFFF]], np.uint32).view(np.float32)
    batch, _ = decoded(message(encode_rows(np.array([1, 2]), patterns)))
    assert_same_bits(batch.rows, patterns)


def test_deletions_are_in_a_header_and_the_value_is_one_that_hugectr_ignores() -> None:
    value, headers = encode_erasures(np.array(WIDE), 3)
    assert value == by_hand([])
    assert headers == {"hps-erased": b"".join(struct.pack("<q", key) for key in WIDE)}
    batch, skipped = decoded(message(value, headers=headers))
    assert (batch.keys.tolist(), batch.erased.tolist(), batch.writes, skipped) == ([], WIDE, len(WIDE), [])
    batch, skipped = decoded(message(None, headers=headers))  # a tombstone of Kafka
    assert (batch.erased.tolist(), skipped) == (WIDE, [])


def test_rows_of_a_message_come_before_its_deletions() -> None:
    value = by_hand([(1, [1, 2, 3]), (2, [4, 5, 6])])
    batch, _ = decoded(message(value, headers={"hps-erased": struct.pack("<q", 2)}))
    assert (batch.keys.tolist(), batch.erased.tolist()) == ([1], [2])


def test_the_last_write_of_a_key_wins() -> None:
    value, headers = encode_erasures(np.array([1, 2]), 1)
    batch, _ = decoded(
        message(by_hand([(1, [1]), (2, [2]), (1, [3]), (3, [4])], dim=1), 0),
        message(value, 1, headers=headers),
        message(by_hand([(2, [5]), (4, [6])], dim=1), 2),
        Update(TABLE, np.array([4, 5]), np.array([[7], [8]], np.float32), Position(0, 3)),
        Update(TABLE, np.array([5]), None, Position(0, 4)),
        dim=1,
    )
    assert dict(zip(batch.keys.tolist(), batch.rows[:, 0].tolist())) == {2: 5.0, 3: 4.0, 4: 7.0}
    assert sorted(batch.erased.tolist()) == [1, 5]
    assert (batch.writes, batch.messages) == (11, 5)


def test_headers_tell_time_and_version_of_a_change() -> None:
    value = by_hand([(1, [1, 2, 3])])
    assert headers_of(event_time_ms=1700000000123, version=7) == {"hps-time-ms": b"1700000000123", "hps-version": b"7"}
    batch, _ = decoded(
        message(value, 0, headers=headers_of(event_time_ms=50, version=2), time_ms=99),
        message(value, 1, headers=headers_of(version=1), time_ms=60),
        message(value, 2),
    )
    assert (batch.oldest_ms, batch.newest_ms, batch.version) == (50, 60, 2)


GOOD = by_hand([(1, [1, 2, 3])])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (message(None), "tombstone"),
        (message(b""), "short"),
        (message(GOOD[:7]), "short"),
        (message(by_hand([])), "beacon"),
        (message(b"HCTS" + GOOD[4:]), "magic"),
        (message(by_hand([(1, [1, 2])], dim=2)), "width"),
        (message(GOOD[:4] + struct.pack("<I", 0) + GOOD[8:]), "width"),
        (message(GOOD[:4] + struct.pack("<I", 2**32 - 1) + GOOD[8:]), "width"),
        (message(GOOD[:-1]), "ragged"),
        (message(GOOD + b"\0"), "ragged"),
        (message(GOOD, key=b""), "keyed"),
        (message(GOOD, headers={"hps-time-ms": b"-1"}), "header"),
        (message(GOOD, headers={"hps-time-ms": b"9" * 19}), "header"),
        (message(GOOD, headers={"hps-version": b"9" * 5000}), "header"),
        (message(GOOD, headers={"hps-erased": b"1234567"}), "header"),
        (message(by_hand([]), headers={"hps-erased": b""}), "header"),
        (message(by_hand([(1, [1, np.nan, 3])])), "not_finite"),
        (message(by_hand([(1, [1, -np.inf, 3])])), "not_finite"),
        (Update(TABLE, np.array([1]), np.zeros((1, 4), np.float32), Position(0, 0)), "width"),
        (Update(TABLE, np.array([1]), np.full((1, 3), np.inf, np.float32), Position(0, 0)), "not_finite"),
    ],
)
def test_what_is_malformed_is_skipped_and_its_neighbours_are_not(bad: Message | Update, reason: str) -> None:
    before, after = message(by_hand([(5, [1, 2, 3])]), 0), message(by_hand([(6, [4, 5, 6])]), 2)
    batch, skipped = decoded(before, bad, after, finite=True)
    assert skipped == [reason]
    assert dict(zip(batch.keys.tolist(), batch.rows.tolist())) == {5: [1, 2, 3], 6: [4, 5, 6]}
    assert (batch.messages, batch.writes) == (2, 2)


def test_a_wide_key_is_none_of_a_server_of_narrow_keys() -> None:
    for key in (2**32, -1):
        batch, skipped = decoded(Update(TABLE, np.array([key]), None, Position(0, 0)), key_bytes=4)
        assert (skipped, batch.erased.tolist()) == (["key"], [])


def test_what_is_left_out_leaves_no_gap_between_messages_and_arrays() -> None:
    nan = np.full((2, 3), np.nan, np.float32)
    keys = [np.array([10 * i, 10 * i + 1]) for i in range(8)]
    rows = [rows_of(some, 3) for some in keys]
    erased = {"hps-erased": struct.pack("<q", 31)}
    items: list[Message | Update] = [
        message(encode_rows(keys[0], rows[0])),
        message(encode_rows(keys[1], nan), headers={"hps-erased": struct.pack("<q", 0)}),
        message(encode_rows(keys[2], rows[2])),
        Update(TABLE, keys[3], rows[3], Position(0, 3)),
        Update(TABLE, keys[4], nan, Position(0, 4)),
        Update(TABLE, keys[5], rows[5], Position(0, 5)),
        message(encode_rows(keys[6], nan)),
        message(encode_rows(keys[7], rows[7]), headers=erased),
    ]
    batch, skipped = decoded(*items, finite=True)
    there = [0, 2, 3, 5, 7]
    expected = np.concatenate([keys[i] for i in there])
    kept = expected != 31
    assert skipped == ["not_finite"] * 3
    assert (batch.keys.tolist(), batch.erased.tolist()) == (expected[kept].tolist(), [31])
    assert_same_bits(batch.rows, np.concatenate([rows[i] for i in there])[kept])
    assert (batch.writes, batch.deletions, batch.messages, len(batch.times)) == (11, 1, 5, 10)


def test_values_that_are_not_finite_are_rows_like_others_unless_it_is_asked_for() -> None:
    batch, skipped = decoded(message(by_hand([(1, [np.nan, np.inf, 3])])))
    assert (batch.keys.tolist(), skipped) == ([1], [])


def fuzzed(random: np.random.Generator) -> Message:
    """A message that may be whole, or damaged at any place in any way."""
    n, dim = int(random.integers(0, 6)), int(random.choice([1, 3, 3, 3, 3, 4]))
    keys = random.integers(-4, 5, n)
    value: bytes | None = encode_rows(keys, random.standard_normal((n, dim)).astype(np.float32))
    headers = headers_of(event_time_ms=int(random.integers(0, 2**62)), version=None)
    if random.random() < 0.3:
        headers["hps-erased"] = header_of(random.integers(-4, 5, int(random.integers(0, 4))))
    assert value is not None
    damage = int(random.integers(0, 9))
    if damage == 0:
        value = value[: int(random.integers(0, len(value) + 1))]
    elif damage == 1:
        value += random.bytes(int(random.integers(1, 20)))
    elif damage == 2:
        at = int(random.integers(0, len(value)))
        value = value[:at] + random.bytes(1) + value[at + 1 :]
    elif damage == 3:
        value = random.bytes(int(random.integers(0, 64)))
    elif damage == 4:
        name = str(random.choice(["hps-erased", "hps-version", "hps-time-ms", "other"]))
        headers[name] = random.bytes(int(random.integers(0, 24)))
    elif damage == 5:
        value = None
    key = random.bytes(2) if random.random() < 0.03 else None
    return message(value, headers=headers, key=key)


def by_the_book(one: Message, table: dict[int, list[bytes]]) -> bool:
    """Apply a message to a dict of bits, one field after the other; False if it is malformed or empty."""
    value, erased = one.value, one.headers.get("hps-erased")
    numbers = [one.headers[name] for name in ("hps-version", "hps-time-ms") if name in one.headers]
    if one.key is not None or (value is None and erased is None):
        return False
    if any(not all(48 <= c <= 57 for c in digits) or not 0 < len(digits) < 20 or int(digits) >> 63 for digits in numbers):
        return False
    if erased is not None and (not erased or len(erased) % 8):
        return False
    pairs = []
    if value is not None:
        if len(value) < 8 or value[:4] != b"HCTR" or value[4:8] != struct.pack("<I", 12) or (len(value) - 8) % 20:
            return False
        pairs = [value[at : at + 20] for at in range(8, len(value), 20)]
    if not pairs and erased is None:
        return False
    for pair in pairs:
        table[struct.unpack("<q", pair[:8])[0]] = [pair[8:12], pair[12:16], pair[16:]]
    for at in range(0, len(erased or b""), 8):
        table.pop(struct.unpack("<q", (erased or b"")[at : at + 8])[0], None)
    return True


def test_fuzzed_messages_are_applied_or_counted() -> None:
    random = np.random.default_rng(1)
    table: dict[int, list[bytes]] = {}
    ours: dict[int, list[bytes]] = {}
    good = bad = left = 0
    while left < FUZZED:
        some = [fuzzed(random) for _ in range(int(random.integers(1, 9)))]
        left += len(some)
        fine = [by_the_book(one, table) for one in some]
        batch, skipped = decoded(*some)
        assert batch.messages == sum(fine)
        assert len(skipped) == len(some) - sum(fine)
        good, bad = good + sum(fine), bad + len(skipped)
        for key in batch.erased.tolist():
            ours.pop(key, None)
        for key, row in zip(batch.keys.tolist(), batch.rows):
            ours[key] = [element.tobytes() for element in row]
        assert ours == table
    assert good > FUZZED / 5 and bad > FUZZED / 5
