"""Addresses of seeds, which node is believed about slots, and names of tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hps_numba.errors import TierUnavailable
from hps_numba.storage.redis.layout import partitions_of, read_name, table_pattern
from hps_numba.storage.redis.limits import Limits
from hps_numba.storage.redis.node import Node, NodeFailure
from hps_numba.storage.redis.topology import SLOTS, Topology, seeds_of


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


# -- which node is believed ---------------------------------------------------------------------

HALF = SLOTS // 2
WHOLE = [[0, HALF - 1, [b"a", 1]], [HALF, SLOTS - 1, [b"b", 2]]]
#: of a server that has no cluster
PLAIN = Exception("ERR This instance has cluster support disabled")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each node answers to CLUSTER SLOTS; those that are not named do not answer."""
    given: dict[str, Any] = {}

    def commands(node: Node, _: Any) -> list[Any]:
        if node.name not in given:
            raise NodeFailure(f"{node.name}: does not answer")
        return [given[node.name]]

    monkeypatch.setattr(Node, "commands", commands)
    return given


def topology_of(address: str) -> Topology:
    pool = SimpleNamespace(disconnect=lambda **_: None)
    client: Any = SimpleNamespace(who="redis_cluster", slot_of=len, pool=lambda *place: pool)
    return Topology(client, address, 1, Limits(refresh=0.0))


def owners(topology: Topology) -> list[str | None]:
    nodes = [topology.node_of(slot) for slot in (0, HALF - 1, HALF, SLOTS - 1)]
    return [None if node is None else node.name for node in nodes]


BOTH = ["a:1", "a:1", "b:2", "b:2"]


@pytest.mark.parametrize("bare", [[], [[0, 0, [b"a", 1]]], PLAIN], ids=["no slots", "one slot", "no cluster"])
def test_a_node_that_lost_its_slots_is_not_believed(answers: dict[str, Any], bare: Any) -> None:
    answers |= {"a:1": WHOLE, "b:2": WHOLE}
    topology = topology_of("a:1")
    answers["a:1"] = bare
    for _ in range(2):
        topology.refresh()
        assert (owners(topology), topology.covered, topology.in_cluster) == (BOTH, True, True)


def test_the_other_nodes_are_not_forgotten_while_only_a_bare_one_answers(answers: dict[str, Any]) -> None:
    answers |= {"a:1": WHOLE}
    topology = topology_of("a:1")
    answers["a:1"] = []
    topology.refresh()
    assert (owners(topology), topology.covered) == ([None] * 4, False)
    answers["b:2"] = WHOLE
    topology.refresh()
    assert owners(topology) == BOTH


def test_of_nodes_that_know_a_part_the_one_that_knows_most_is_believed(answers: dict[str, Any]) -> None:
    answers |= {"a:1": [[0, 9, [b"a", 1]]], "b:2": [[0, SLOTS - 2, [b"b", 2]]], "c:3": []}
    topology = topology_of("a:1,b:2,c:3")
    assert owners(topology) == ["b:2", "b:2", "b:2", None]
    assert topology.in_cluster and not topology.covered


def test_a_bare_seed_is_passed_over_at_the_start(answers: dict[str, Any]) -> None:
    answers |= {"a:1": [], "b:2": WHOLE}
    assert owners(topology_of("a:1,b:2")) == BOTH


def test_nodes_that_left_the_cluster_are_forgotten(answers: dict[str, Any]) -> None:
    answers |= {"a:1": WHOLE, "b:2": WHOLE}
    topology = topology_of("a:1")
    left = topology.node("b", 2)
    answers["a:1"] = [[0, SLOTS - 1, [b"a", 1]]]
    topology.refresh()
    assert topology.node("b", 2) is not left


def test_a_plain_server_has_all_slots(answers: dict[str, Any]) -> None:
    answers |= {"b:2": PLAIN, "c:3": WHOLE}
    topology = topology_of("a:1,b:2,c:3")
    assert (owners(topology), topology.in_cluster, topology.covered) == (["b:2"] * 4, False, True)
