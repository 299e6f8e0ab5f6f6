"""Addresses of seeds, and names of tables."""

from __future__ import annotations

import pytest

from hps_numba.errors import TierUnavailable
from hps_numba.storage.redis.layout import partitions_of, read_name, table_pattern
from hps_numba.storage.redis.topology import seeds_of


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("127.0.0.1:7000", [("127.0.0.1", 7000)]),
        ("a:1, b:2;c", [("a", 1), ("b", 2), ("c", 6379)]),
        ("[::1]:7000,[fe80::2]", [("::1", 7000), ("fe80::2", 6379)]),
        ("a:1,", [("a", 1)]),
    ],
)
def test_seeds_are_separated_by_commas_or_semicolons(text: str, seeds: list[tuple[str, int]]) -> None:  # D17
    assert seeds_of(text) == seeds


@pytest.mark.parametrize("text", ["a:b", "a:0", "a:65536", "a:-1"])
def test_a_port_has_to_be_one(text: str) -> None:
    with pytest.raises(TierUnavailable, match=f"redis_cluster: address: expected host:port, got '{text}'"):
        seeds_of(text)


def test_names_are_hugectrs_and_read_back() -> None:  # D15
    (part,) = partitions_of("hps_et.m.sparse_embedding0", 1, lambda name: len(name))
    assert part.rows == b"hps_et{hps_et.m.sparse_embedding0/p0}v"
    assert part.uses == b"hps_et{hps_et.m.sparse_embedding0/p0}t"
    assert read_name(part.rows, lambda name: len(name)) == part
    for other in (part.uses, b"hps_et{x}v", b"xhps_et{x/p1}v", b"hps_et{x/p}v", b"hps_et{x/p1}vv"):
        assert read_name(other, len) is None
    assert str(part) == "redis_cluster: hps_et.m.sparse_embedding0: partition 0"


def test_patterns_take_special_characters_as_they_are() -> None:
    assert table_pattern() == b"hps_et{hps_et.*/p*}v"
    assert table_pattern(r"hps_et.m.[a]*?\x") == rb"hps_et{hps_et.m.\[a\]\*\?\\x/p*}v"
