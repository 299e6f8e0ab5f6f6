"""A node of Redis that dies, hangs, is full, or gives its slots away: its own keys are unanswered, all others exact."""

from __future__ import annotations

import signal
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.clocks import Clock
from support.factories import Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, partition_of, rows_of
from support.redis_servers import NODE_TIMEOUT, PATIENT, Cluster, Server, cluster_of, one_server
from support.tiers import DIM, TAG, fetch, ints
from support.updates import list_bus, message_of, wait_for
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.errors import TierError
from hps_numba.storage import PartialWriteError
from hps_numba.storage.redis import breaker
from hps_numba.storage.redis.layout import Partition, partitions_of
from hps_numba.storage.redis.node import Node
from hps_numba.storage.tiers._checked import CheckedTier, TierDefect
from hps_numba.storage.tiers._tier import Fetched
from hps_numba.storage.tiers.redis_cluster import RedisClusterTier

PARTS = 16
KEYS = np.arange(400, dtype=np.int64)
TABLE = "hps_et.m.sparse_embedding0"
#: of tiers whose nodes hang: those that are known to be dead are probed for a short time only
PROBING = replace(PATIENT, probe=0.25)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PATIENT)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """It keeps what it acknowledged when it is killed."""
    with cluster_of(tmp_path_factory.mktemp("three"), options=("--appendonly", "yes", "--appendfsync", "always")) as cluster:
        yield cluster


@pytest.fixture
def cluster(three: Cluster) -> Iterator[Cluster]:
    yield three
    for server in three.servers:
        if server.process is None:
            server.start()
        server.go_on()
        server.client.config_set("maxmemory", 0)
    wait_until(three.settled)
    three.flush()


@pytest.fixture
def opened() -> Iterator[list[RedisClusterTier]]:
    tiers: list[RedisClusterTier] = []
    yield tiers
    for tier in tiers:
        tier.close()


@pytest.fixture
def tier(cluster: Cluster, opened: list[RedisClusterTier]) -> RedisClusterTier:
    opened.append(filled(cluster))
    return opened[-1]


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    for server in made.servers:
        server.close()


def filled(cluster: Cluster) -> RedisClusterTier:
    tier = RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    return tier


def slot_of(name: bytes) -> int:
    from redis.crc import key_slot

    return int(key_slot(name))


def keys_of(cluster: Cluster, server: Server, table: str = TAG) -> np.ndarray:
    """bool ``[400]``: which keys are on a node in the beginning."""
    parts = partitions_of(table, PARTS, slot_of)
    return np.array([cluster.owner_of(parts[partition_of(int(key), PARTS)].slot) is server for key in KEYS])


def assert_degraded(tier: RedisClusterTier, dead: np.ndarray) -> None:
    """Keys of living nodes have their rows; those of the dead one are said to have failed."""
    answer, rows = fetch(tier, TAG, KEYS)
    assert answer.asked == len(KEYS) and answer.failed is not None
    assert answer.failed.tolist() == dead.tolist()
    assert answer.found.tolist() == (~dead).tolist()
    assert_same_bits(rows[~dead], rows_of(KEYS[~dead], DIM))
    assert np.isnan(rows[dead]).all()


def assert_complete(tier: RedisClusterTier) -> None:
    answer, rows = fetch(tier, TAG, KEYS)
    assert answer.found.all() and answer.failed is None
    assert_same_bits(rows, rows_of(KEYS, DIM))


def complete(tier: RedisClusterTier) -> bool:
    return bool(fetch(tier, TAG, KEYS)[0].found.all())


def test_a_killed_node_costs_its_own_keys_until_it_is_back(cluster: Cluster, tier: RedisClusterTier) -> None:  # D19
    victim = cluster.servers[1]
    dead = keys_of(cluster, victim)
    assert 0 < dead.sum() < len(KEYS)
    victim.kill()
    for _ in range(20):
        assert_degraded(tier, dead)
    for call in (
        lambda: tier.insert(TAG, KEYS, rows_of(KEYS, DIM)),
        lambda: tier.contains(TAG, KEYS),
        lambda: tier.erase(TAG, KEYS[dead]),
        lambda: tier.size(TAG),
        lambda: tier.erase(TAG),
        tier.tables,
    ):
        with pytest.raises(TierError, match=victim.address):
            call()
    with pytest.raises(TierError, match=rf"redis_cluster: {TAG}: partition \d+: {victim.address}: "):
        fetch(tier, TAG, KEYS[dead])  # nothing of it could be looked for
    victim.start()
    wait_until(lambda: complete(tier))
    assert tier.contains(TAG, KEYS[~dead]).sum() in (0, (~dead).sum()), "erasing the table stopped at the first failure"


@pytest.mark.parametrize("at_once", [400, 37, 1])
def test_a_write_reaches_the_nodes_that_live_and_says_which_keys_it_did_not(  # D19
    cluster: Cluster, opened: list[RedisClusterTier], at_once: int
) -> None:
    filled(cluster).close()
    tier = RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS, max_batch_size=at_once)
    opened.append(tier)
    tier.insert(TAG, KEYS[:1], rows_of(KEYS[:1], DIM))  # the width of rows is known
    victim = cluster.servers[1]
    dead = keys_of(cluster, victim)
    keys = KEYS if at_once > 1 else KEYS[np.argsort(dead, kind="stable")]  # a batch that finds no node ends it
    down = keys_of(cluster, victim)[keys]
    victim.kill()
    with pytest.raises(PartialWriteError, match=rf"partition \d+: {victim.address}: ") as raised:
        tier.insert(TAG, keys, rows_of(keys, DIM, 1))
    assert raised.value.failed.tolist() == down.tolist()
    answer, rows = fetch(tier, TAG, KEYS)
    assert answer.found.tolist() == (~dead).tolist()
    assert_same_bits(rows[~dead], rows_of(KEYS[~dead], DIM, 1))
    gone = KEYS % 2 == 0
    with pytest.raises(PartialWriteError, match=victim.address) as raised:
        tier.erase(TAG, keys[gone[keys]])
    assert raised.value.failed.tolist() == down[gone[keys]].tolist()
    victim.start()
    wait_until(lambda: bool(fetch(tier, TAG, KEYS)[0].found[dead].all()))
    answer, rows = fetch(tier, TAG, KEYS)
    assert answer.found.tolist() == (dead | ~gone).tolist()
    assert_same_bits(rows[dead], rows_of(KEYS[dead], DIM))


def test_updates_of_other_keys_go_on_while_a_node_is_down(cluster: Cluster, workshop: Workshop) -> None:  # D19, U09
    bus, source = list_bus()
    redis = {"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS}
    server = workshop.open(
        workshop.model((range(400), DIM)), tiers=[{"type": "hash_map"}, redis], update_source=source, allow_code=True
    )
    victim = cluster.servers[0]
    dead = keys_of(cluster, victim, TABLE)
    victim.kill()
    for stamp in range(1, 6):
        bus.items.append(message_of(KEYS, rows_of(KEYS, DIM, stamp), stamp))
    bus.items.append(message_of(KEYS[::3], None, 6, dim=DIM))
    expected = rows_of(KEYS, DIM, 5)
    expected[::3] = -7.5

    def others_are_there() -> bool:
        return np.array_equal(server.lookup(KEYS, "m", 0)[~dead], expected[~dead])

    wait_until(others_are_there)
    assert_same_bits(server.lookup(KEYS, "m", 0)[dead], rows_of(KEYS, DIM)[dead])
    wait_until(lambda: server.update_stats()[0].held_rows == dead.sum())  # counted once lookups see the others
    assert bus.committed == []
    victim.start()
    wait_for(server, 6)
    assert_same_bits(server.lookup(KEYS, "m", 0), expected)
    answer, rows = fetch(slower_tier(server), TABLE, KEYS)
    assert answer.found.tolist() == (KEYS % 3 != 0).tolist()
    assert_same_bits(rows[answer.found], expected[answer.found])


def test_a_table_that_could_not_be_looked_at_is_looked_at_again(cluster: Cluster, opened: list[RedisClusterTier]) -> None:
    writer = RedisClusterTier.from_options(address=cluster.address, num_partitions=2 * PARTS)
    tier = RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS)
    opened += [writer, tier]
    writer.insert(TAG, KEYS, rows_of(KEYS, DIM))
    cluster.servers[2].kill()
    fetch(tier, TAG, KEYS)
    for call in (lambda: tier.size(TAG), lambda: next(tier.scan(TAG))):
        with pytest.raises(TierError, match=cluster.servers[2].address):
            call()
    cluster.servers[2].start()

    def noticed() -> bool:
        try:
            fetch(tier, TAG, KEYS)
        except TierError as problem:
            return "another num_partitions" in str(problem)
        return False

    wait_until(noticed)


def test_a_node_that_came_back_without_its_slots_costs_its_own_keys(  # D19
    tmp_path: Path, opened: list[RedisClusterTier]
) -> None:
    """The only seed of the config."""
    with cluster_of(tmp_path) as cluster:
        bare = cluster.servers[0]
        opened.append(RedisClusterTier.from_options(address=bare.address, num_partitions=PARTS))
        opened[-1].insert(TAG, KEYS, rows_of(KEYS, DIM))
        bare.kill()
        (bare.folder / "nodes.conf").unlink()
        bare.start()
        lost = keys_of(cluster, bare)
        for _ in range(3):
            opened[-1]._topology.refresh(at_once=True)
            assert_degraded(opened[-1], lost)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock(1000.0)
    monkeypatch.setattr(breaker, "time", made)
    return made


@contextmanager
def short_replies(tier: RedisClusterTier) -> Iterator[None]:
    """Nodes that do not answer at once are given up; so may be others, if the machine lets them wait."""
    patient = tier._bulk._limits
    tier._bulk._limits = replace(patient, reply=0.3)
    try:
        yield
    finally:
        tier._bulk._limits = patient


def nodes_of(tier: RedisClusterTier, victim: Server) -> tuple[Node, list[Node]]:
    """The node of a tier that is the victim, and the others."""
    (dead,) = [node for node in tier._topology.primaries() if node.port == victim.port]
    return dead, [node for node in tier._topology.primaries() if node is not dead]


def test_the_width_of_a_table_is_looked_at_once_in_a_while_beside_a_dead_node(
    cluster: Cluster, tier: RedisClusterTier, opened: list[RedisClusterTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look asks every node, also those that have answered, and partition by partition."""
    fresh = RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS)
    opened.append(fresh)
    tables, looks = fresh._tables, []
    look = tables._look
    monkeypatch.setattr(tables, "_look", lambda table: (looks.append(table), look(table))[1])
    monkeypatch.setattr(tables, "check", lambda *_, **__: None)
    monkeypatch.setattr("hps_numba.storage.redis.tables._PAUSE", HANG_SECONDS)
    cluster.servers[0].kill()
    for stamp in range(5):
        with pytest.raises(PartialWriteError):
            fresh.insert(TAG, KEYS, rows_of(KEYS, DIM, stamp))
        assert looks == [TAG]
    with pytest.raises(TierError, match=f"expected rows of width {DIM}, got {DIM + 1}"):
        fresh.insert(TAG, KEYS, rows_of(KEYS, DIM + 1))
    monkeypatch.setattr("hps_numba.storage.redis.tables._PAUSE", 0.0)
    cluster.servers[0].start()
    wait_until(lambda: written(fresh, KEYS))
    assert tables._widths == {TAG: DIM}


def test_a_node_that_hangs_costs_one_time_out(  # D19
    cluster: Cluster, opened: list[RedisClusterTier], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr(RedisClusterTier, "limits", PROBING)
    tier = filled(cluster)
    opened.append(tier)
    victim = cluster.servers[2]
    dead = keys_of(cluster, victim)
    assert_complete(tier)
    node, others = nodes_of(tier, victim)
    failures: list[float] = []
    failed = node.breaker.failed
    monkeypatch.setattr(node.breaker, "failed", lambda: (failures.append(clock.now), failed()))
    victim.stop()
    with short_replies(tier), suppress(TierError):  # if the machine lets all nodes wait
        answer, rows = fetch(tier, TAG, KEYS)
        assert answer.failed is not None and answer.failed[dead].all()
        assert_same_bits(rows[answer.found], rows_of(KEYS[answer.found], DIM))
    assert failures == [clock.now]
    for other in others:
        other.breaker.answered()  # whatever it let wait
    for _ in range(20):
        assert_degraded(tier, dead)  # for ever, if a call waited for the node
    assert len(failures) == 1
    clock.now += PROBING.first_pause
    for _ in range(20):
        assert_degraded(tier, dead)
    assert len(failures) == 2, "one call looked whether it is back"
    victim.go_on()

    def is_back() -> bool:
        clock.now += PROBING.longest_pause
        return complete(tier)

    wait_until(is_back)
    assert_complete(tier)


def test_a_deadline_ends_the_wait_for_a_node_that_hangs(cluster: Cluster, tier: RedisClusterTier) -> None:  # D07, D19
    victim = cluster.servers[0]
    dead = keys_of(cluster, victim)
    victim.stop()
    seconds = [0.25]

    def some_answered() -> bool:
        """Again with more time, if it was over before any node had answered."""
        seconds[0] *= 2
        rows = np.full((len(KEYS), DIM), np.nan, np.float32)
        try:
            answer = tier.fetch(TAG, KEYS, rows, deadline=time.monotonic() + seconds[0])
        except TierError:
            return False
        if not answer.asked:
            return False
        assert answer.failed is not None and not answer.found[dead].any()
        assert (answer.found | answer.failed).all()
        assert_same_bits(rows[answer.found], rows_of(KEYS[answer.found], DIM))
        return True

    wait_until(some_answered)


def test_a_full_node_refuses_writes_and_serves_on(cluster: Cluster, tier: RedisClusterTier) -> None:  # D19
    for server in cluster.servers:
        server.client.config_set("maxmemory", 1)
    with pytest.raises(TierError, match=rf"{TAG}: partition \d+: OOM .* \(and \d+ more partitions\)"):
        tier.insert(TAG, KEYS, rows_of(KEYS, DIM, 1))
    assert_complete(tier)
    assert tier.erase(TAG, KEYS[:1]) == 1, "to remove is allowed"
    for server in cluster.servers:
        server.client.config_set("maxmemory", 0)
    assert tier.insert(TAG, KEYS, rows_of(KEYS, DIM)) == 1
    assert_complete(tier)


def test_a_restarted_server_is_found_again(tmp_path: Path, opened: list[RedisClusterTier]) -> None:  # D19
    """A plain one: connections that were kept are closed, and rows are as they were on disk."""
    with one_server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as server:
        opened.append(RedisClusterTier.from_options(address=server.address, num_partitions=PARTS))
        opened[-1].insert(TAG, KEYS, rows_of(KEYS, DIM))
        server.kill()
        server.start()
        assert_complete(opened[-1])  # it was not asked in between: the first call finds its connection closed
        server.kill()
        for _ in range(3):
            with pytest.raises(TierError, match=server.address):
                fetch(opened[-1], TAG, KEYS)
        server.start()

        def back() -> bool:
            try:
                return complete(opened[-1])
            except TierError:
                return False

        wait_until(back)


# -- slots that move ---------------------------------------------------------------------


class Move:
    """One slot on its way from its node to another, step by step."""

    def __init__(self, cluster: Cluster, slot: int, source: Server, target: Server) -> None:
        self.cluster, self.slot, self.source, self.target = cluster, slot, source, target

    def begin(self) -> None:
        """From here on, the source sends clients for absent names on to the target."""
        ids = self.cluster.id_of(self.source), self.cluster.id_of(self.target)
        self.target.client.execute_command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", ids[0])
        self.source.client.execute_command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", ids[1])

    def move_keys(self) -> None:
        """Names of the slot go over, one by one."""
        while names := self.source.client.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, 1):
            self.source.client.execute_command("MIGRATE", "127.0.0.1", self.target.port, names[0], 0, 60_000)

    def end(self) -> None:
        """The slot belongs to the target."""
        name = self.cluster.id_of(self.target)
        for server in (self.target, self.source, *self.cluster.servers):
            server.client.execute_command("CLUSTER", "SETSLOT", self.slot, "NODE", name)


def moves(cluster: Cluster, back: bool = False, table: str = TAG) -> list[Move]:
    """All slots of a table that the first node has, to the second; or back."""
    first, second = cluster.servers[:2]
    slots = {part.slot for part in partitions_of(table, PARTS, slot_of) if cluster.owner_of(part.slot) is first}
    pair = (second, first) if back else (first, second)
    return [Move(cluster, slot, *pair) for slot in sorted(slots)]


@pytest.mark.parametrize("policy", ["evict_random", "evict_least_used"])
def test_slots_that_move_are_followed_at_each_step(  # D19
    cluster: Cluster, opened: list[RedisClusterTier], policy: str
) -> None:
    tier = RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS, overflow_policy=policy)
    opened.append(tier)
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    for back in (False, True):
        going = moves(cluster, back)
        assert going
        for step in (Move.begin, Move.move_keys, Move.end):
            for move in going:
                step(move)
            assert_complete(tier)
            assert tier.insert(TAG, KEYS, rows_of(KEYS, DIM)) == 0
            assert tier.erase(TAG, KEYS[::3]) == len(KEYS[::3])
            assert tier.insert(TAG, KEYS[::3], rows_of(KEYS[::3], DIM)) == len(KEYS[::3])
            assert tier.contains(TAG, KEYS).all() and tier.size(TAG) == len(KEYS)
            assert sorted(key for keys, _ in tier.scan(TAG, 50) for key in keys) == KEYS.tolist()
            assert_complete(tier)


def test_a_server_looks_up_exact_rows_while_slots_move_and_rows_change(  # D19
    cluster: Cluster, workshop: Workshop
) -> None:
    redis = {"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS}
    server = workshop.open(workshop.model((range(400), DIM)), volatile_db=redis)
    ended, problems = threading.Event(), []
    fresh: list[int] = []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not ended.is_set():
            asked = random.integers(0, 400, 64)
            known = list(fresh)[-20:]
            try:
                assert_same_bits(server.lookup(asked, "m", 0), rows_of(asked, DIM))
                if known:
                    assert_same_bits(server.lookup(known, "m", 0), rows_of(known, DIM))
            except BaseException as problem:
                problems.append(problem)
                return

    def write() -> None:
        key = 1000
        while not ended.is_set():
            try:
                server.insert([key], rows_of([key], DIM), "m", 0)
            except BaseException as problem:
                problems.append(problem)
                return
            fresh.append(key)
            key += 1

    threads = [threading.Thread(target=read, args=(1,)), threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    try:
        for back in (False, True):
            for move in moves(cluster, back, TABLE):
                before = len(fresh)
                for step in (move.begin, move.move_keys, move.end):
                    step()
                wait_until(lambda before=before: problems or len(fresh) > before)
    finally:
        ended.set()
        join_all(*threads)
    assert not problems, problems
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.unanswered, stats.absent, stats.tier_errors) == (0, 0, 0)
    assert_same_bits(server.lookup(fresh, "m", 0), rows_of(fresh, DIM))


# -- under load ---------------------------------------------------------------------


class Lookups:
    """Two threads that look up all keys, until the block ends: their rows, or the default where it is excused.

    Attributes:
        calls: how many each thread has made.   excused: bool ``[400]``.
    """

    def __init__(self, server: Any, excused: np.ndarray) -> None:
        self.calls = [0, 0]
        self.excused = excused
        self.problems: list[Any] = []
        self._server, self._ended = server, threading.Event()
        self._threads = [threading.Thread(target=self._look_up, args=(number,)) for number in range(2)]

    def _look_up(self, number: int) -> None:
        expected, default = rows_of(KEYS, DIM), np.full(DIM, -7.5, np.float32)
        while not self._ended.is_set():
            try:
                rows = self._server.lookup(KEYS, "m", 0)
            except BaseException as problem:
                self.problems.append(problem)
                return
            right = (rows == expected).all(axis=1)
            if not (right | self.excused & (rows == default).all(axis=1)).all():
                self.problems.append(rows)
            self.calls[number] += 1

    def go_on_for(self, calls: int) -> None:
        """Wait until each thread has made some more; those that are at work now have ended then."""
        least = [before + calls for before in self.calls]
        wait_until(lambda: self.problems or all(now >= wanted for now, wanted in zip(self.calls, least, strict=True)))

    def __enter__(self) -> Lookups:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        join_all(*self._threads)
        assert not self.problems, self.problems


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_a_server_serves_on_while_a_node_fails(  # D19, O10
    cluster: Cluster, workshop: Workshop, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No lookup raises, no row is wrong, what was not answered is counted; and all rows are back without a restart."""
    monkeypatch.setattr(RedisClusterTier, "limits", PROBING)
    redis = {"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS}
    server = workshop.open(workshop.model((range(400), DIM)), volatile_db=redis)
    victim, tier = cluster.servers[0], slower_tier(server)
    dead = keys_of(cluster, victim, TABLE)
    node, others = nodes_of(tier, victim)
    with Lookups(server, excused=np.zeros(len(KEYS), bool)) as lookups:
        lookups.go_on_for(3)
        if fault == "killed":
            lookups.excused = dead
            victim.kill()
        else:
            lookups.excused = np.ones(len(KEYS), bool)  # until the node is known to hang, others may be taken for such ones
            with short_replies(tier):
                lookups.go_on_for(1)  # those that would wait for ever
                victim.stop()
                wait_until(lambda: lookups.problems or node.breaker.is_open)
        wait_until(lambda: lookups.problems or node.breaker.is_open)

    def others_answer() -> bool:
        server.lookup(KEYS, "m", 0)
        return not any(other.breaker.is_open for other in others)

    wait_until(others_answer)
    before = stats_of(server)
    with Lookups(server, excused=dead) as lookups:
        lookups.go_on_for(10)
        with pytest.raises(TierError):
            server.insert(KEYS[dead][:1], rows_of(KEYS[dead][:1], DIM), "m", 0)
    after, calls = stats_of(server), sum(lookups.calls)
    assert after.unanswered - before.unanswered == calls * dead.sum(), "exactly the keys of the node"
    assert 0 < after.tier_errors - before.tier_errors <= calls and after.absent == 0  # fewer, as lookups share fetches
    victim.start() if fault == "killed" else victim.go_on()
    wait_until(lambda: np.array_equal(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM)))


def stats_of(server: Any) -> Any:
    return server.stats()["m"]["sparse_embedding0"]


def test_the_next_tier_answers_for_a_dead_node(cluster: Cluster, workshop: Workshop) -> None:  # D19
    server = workshop.open(
        workshop.model((range(400), DIM)),
        volatile_db={"type": "redis_cluster", "address": cluster.address, "num_partitions": PARTS},
        persistent_db={"type": "support.fakes:DictTier"},
    )
    cluster.servers[0].kill()
    for _ in range(3):
        assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))
    assert (server.lookup([4000 + key for key in range(400)], "m", 0) == -7.5).all()
    stats = server.stats()["m"]["sparse_embedding0"]
    unsure = sum(cluster.owner_of(part.slot) is cluster.servers[0] for part in placed(range(4000, 4400)))
    assert (stats.tier_hits, stats.unanswered, stats.absent) == (1200, unsure, 400 - unsure)
    assert stats.tier_errors == 4, "one a call"


def placed(keys: range) -> list[Partition]:
    parts = partitions_of(TABLE, PARTS, slot_of)
    return [parts[partition_of(key, PARTS)] for key in keys]


def test_ctrl_c_ends_the_wait_for_a_node_that_hangs(cluster: Cluster, tier: RedisClusterTier) -> None:
    victim = cluster.servers[0]
    victim.stop()
    main, fetching, ended = threading.get_ident(), threading.Event(), threading.Event()

    def ring(*_: Any) -> None:
        """Of many interrupts, as one may come before the wait has begun, the first in the call is raised, and none after it."""
        if fetching.is_set():
            fetching.clear()
            raise KeyboardInterrupt

    def interrupt() -> None:
        while not ended.wait(0.1):
            signal.pthread_kill(main, signal.SIGINT)

    before, thread = signal.signal(signal.SIGINT, ring), threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            fetching.set()
            fetch(tier, TAG, KEYS)
    finally:
        fetching.clear()
        ended.set()
        join_all(thread)
        signal.signal(signal.SIGINT, before)
    victim.go_on()
    assert_complete(tier)


def test_a_replica_takes_over(tmp_path: Path, opened: list[RedisClusterTier]) -> None:  # D19
    with cluster_of(tmp_path, replicas=1, options=("--cluster-replica-validity-factor", "0")) as cluster:  # it may come late
        tier = filled(cluster)
        opened.append(tier)
        victim = cluster.servers[0]
        dead = keys_of(cluster, victim)
        victim.client.execute_command("SET", own_name(cluster, victim), "x")
        wait_until(lambda: victim.client.execute_command("WAIT", 1, 100) == 1)
        victim.kill()
        cluster.take_for_dead_after(500)
        wait_until(lambda: complete(tier))
        cluster.take_for_dead_after(NODE_TIMEOUT)  # whom the machine lets wait is not dead
        wait_until(lambda: complete(tier))
        assert_complete(tier)
        wait_until(lambda: written(tier, KEYS[dead]))
        assert_same_bits(fetch(tier, TAG, KEYS[dead])[1], rows_of(KEYS[dead], DIM, 1))


def own_name(cluster: Cluster, server: Server) -> str:
    return next(name for name in map(str, range(10_000)) if cluster.owner_of(slot_of(name.encode())) is server)


def written(tier: RedisClusterTier, keys: np.ndarray) -> bool:
    try:
        tier.insert(TAG, keys, rows_of(keys, DIM, 1))
    except TierError:
        return False
    return True


# -- the contract of partial answers ---------------------------------------------------------------------


@pytest.mark.parametrize("failed", [[1], np.zeros(3, int), np.zeros(2, bool)])
def test_flags_of_failed_keys_are_checked(failed: Any, tier: RedisClusterTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier, "fetch", lambda *args, **more: Fetched(np.zeros(3, bool), 3, failed))
    with pytest.raises(TierDefect, match=r"fetch: failed: expected bool\[3\]"):
        CheckedTier(tier).fetch(TAG, ints(1, 2, 3), np.zeros((3, DIM), np.float32))


def test_fields_of_keys_are_their_bytes(cluster: Cluster, tier: RedisClusterTier) -> None:
    """What the moves above rely on: all rows of a partition are under one name."""
    names = {part.rows for part in partitions_of(TAG, PARTS, slot_of)}
    held = [server.client.hkeys(name) for server in cluster.servers for name in server.client.keys("*") if name in names]
    assert sorted(struct.unpack("<q", field)[0] for fields in held for field in fields) == KEYS.tolist()


def test_one_connection_a_node_is_enough_when_a_node_is_dead(cluster: Cluster, opened: list[RedisClusterTier]) -> None:
    """The look for changes needs a connection too: none may be held meanwhile."""
    opened.append(RedisClusterTier.from_options(address=cluster.address, num_partitions=PARTS, num_node_connections=1))
    tier = opened[-1]
    tier.insert(TAG, KEYS, rows_of(KEYS, DIM))
    victim = cluster.servers[2]  # the last one that a call connects to, or not: names are in the order of ports
    dead = keys_of(cluster, victim)
    victim.kill()
    threads = [threading.Thread(target=assert_degraded, args=(tier, dead)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        assert_degraded(tier, dead)
    join_all(*threads)  # for ever, if a call waited for a connection that another one holds
