"""Three tiers, host memory with a bound in front of two slower ones that fail now and then, against a dict."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.factories import Workshop
from support.fakes import FaultyTier
from support.internals import served_table, wait_for_background
from support.oracles import assert_same_bits, rows_of

import hps_numba
from hps_numba.errors import TierError
from hps_numba.server.evictions import Evictions

DIM = 3
DEFAULT = -7.5
TAG = "hps_et.m.sparse_embedding0"
MODES = ["", "raises", "late", "partial"]
FAULTY = {"type": "support.fakes:FaultyTier"}
EXAMPLES = int(os.environ.get("HPS_NUMBA_EXAMPLES", "25"))
keys_of = st.lists(st.integers(0, 29), min_size=1, max_size=8)


def open_three(shop: Workshop, keys: Any, *, host: Any = None, cached: bool = False, **tier: Any) -> tuple[Any, list[Any]]:
    """A server of three tiers, and the two slower ones, which share a journal."""
    entry = {"deployed_device_list": [0], "gpucacheper": 0.5, "hit_rate_threshold": 1.0} if cached else {}
    first = {"type": "hash_map", "overflow_margin": 8, "num_partitions": 1, **(host or {})}
    server = shop.open(
        shop.model((keys, DIM), **entry), cache_on_cpu=cached, tiers=[first, {**FAULTY, **tier}, {**FAULTY, **tier}]
    )
    slower = list(server._loader.slower.tiers)
    for name, one in zip("bc", slower, strict=True):
        one.name, one.journal = name, slower[0].journal
    slower[0].journal.clear()
    return server, slower


def content(tier: FaultyTier) -> dict[int, tuple[float, ...]]:
    return {int(key): tuple(row.tolist()) for keys, rows in tier.inner.scan(TAG) for key, row in zip(keys, rows, strict=True)}


class Machine(RuleBasedStateMachine):
    """What a server answers, whatever a slower tier does: the row, or the default and a count that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="hps_three_tiers_"))
        self.stamp = 0
        self.server: Any = None

    @initialize(cached=st.booleans(), keeps=st.booleans(), demotes=st.booleans())
    def open(self, cached: bool, keeps: bool, demotes: bool) -> None:
        first = np.arange(7)
        host = {"cache_missed_embeddings": keeps, "initialize_after_startup": demotes}
        self.server, self.tiers = open_three(
            Workshop(self.folder), first, host=host, cached=cached, initialize_after_startup=not demotes
        )
        self.pauses, Evictions.PAUSE_SECONDS = Evictions.PAUSE_SECONDS, 0.0
        self.truth: dict[int, int] = dict.fromkeys(first.tolist(), 0)  # key -> stamp of its row

    def healthy(self) -> bool:
        return self.server is not None and not any(tier.mode for tier in self.tiers)

    def stats(self) -> Any:
        return self.server.stats()["m"]["sparse_embedding0"]

    def expected(self, keys: Any) -> np.ndarray:
        rows = [rows_of(k, DIM, self.truth[k]) if k in self.truth else np.full(DIM, DEFAULT, np.float32) for k in keys]
        return np.stack(rows)

    # -- faults ---------------------------------------------------------------------

    @rule(number=st.integers(0, 1), mode=st.sampled_from(MODES))
    def fault(self, number: int, mode: str) -> None:
        self.tiers[number].mode = mode

    # -- reads ---------------------------------------------------------------------

    @rule(keys=keys_of)
    def lookup(self, keys: list[int]) -> None:
        before = self.stats().unanswered
        rows, expected = self.server.lookup(keys, "m", 0), self.expected(keys)
        unanswered = self.stats().unanswered - before
        wrong = (rows != expected).any(1)
        assert (rows[wrong] == DEFAULT).all(), "a wrong row"
        assert wrong.sum() <= unanswered, "a default that nobody counted"
        if self.healthy():
            assert unanswered == 0

    @rule(keys=keys_of, wait=st.booleans())
    def prefetch(self, keys: list[int], wait: bool) -> None:
        self.server.prefetch(keys, "m", 0, wait=wait)

    # -- writes ---------------------------------------------------------------------

    @precondition(lambda self: self.healthy())
    @rule(keys=keys_of)
    def insert(self, keys: list[int]) -> None:
        self.stamp = self.stamp % 20 + 1
        self.server.insert(keys, rows_of(keys, DIM, self.stamp), "m", 0)
        self.truth |= dict.fromkeys(keys, self.stamp)

    @precondition(lambda self: self.healthy())
    @rule(keys=keys_of)
    def update(self, keys: list[int]) -> None:
        self.stamp = self.stamp % 20 + 1
        present = [key for key in keys if key in self.truth]
        assert self.server.update(keys, rows_of(keys, DIM, self.stamp), "m", 0) == len(present)
        self.truth |= dict.fromkeys(present, self.stamp)

    @precondition(lambda self: self.healthy())
    @rule(keys=keys_of)
    def erase(self, keys: list[int]) -> None:
        assert self.server.erase(keys, "m", 0) == len({key for key in keys if key in self.truth})
        self.truth = {key: stamp for key, stamp in self.truth.items() if key not in keys}

    @precondition(lambda self: self.server is not None and self.tiers[1].mode == "raises")
    @rule(keys=keys_of, verb=st.sampled_from(["insert", "erase"]))
    def write_that_fails_at_once(self, keys: list[int], verb: str) -> None:
        """The slowest tier is written first: nothing has changed."""
        with pytest.raises(TierError):
            if verb == "insert":
                self.server.insert(keys, rows_of(keys, DIM, 21), "m", 0)
            else:
                self.server.erase(keys, "m", 0)

    @precondition(lambda self: self.healthy())
    @rule(keys=st.sets(st.integers(0, 29), min_size=1, max_size=7))
    def replace(self, keys: set[int]) -> None:
        self.stamp = self.stamp % 20 + 1
        shop = Workshop(self.folder)
        self.server.replace_model("m", [shop.table("next", sorted(keys), DIM, self.stamp)])
        self.truth = dict.fromkeys(keys, self.stamp)

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def nothing_is_lost(self) -> None:
        """Some tier has the newest row of each key, and none has a row of another key, or one that a faster tier hides."""
        if self.server is None:
            return
        store = served_table(self.server).store
        assert store is not None
        chunks = list(store.scan())  # first: a row that leaves for a slower tier meanwhile is seen there
        host = {int(key): tuple(row.tolist()) for keys, rows in chunks for key, row in zip(keys, rows, strict=True)}
        places = [host, *map(content, self.tiers)]
        for key, stamp in self.truth.items():
            found = [place[key] for place in places if key in place]
            assert found, f"key {key} is lost"
            assert set(found) == {tuple(rows_of(key, DIM, stamp).tolist())}, "an old row"
        for place in places:
            assert set(place) <= set(self.truth), "an erased row"

    def teardown(self) -> None:
        if self.server is not None:
            for tier in self.tiers:
                tier.mode = ""
            wait_for_background(self.server)
            self.lookup(list(range(30)))
            self.nothing_is_lost()
            Evictions.PAUSE_SECONDS = self.pauses
            self.server.close()
        shutil.rmtree(self.folder)


TestThreeTiers = Machine.TestCase
TestThreeTiers.settings = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None)


# --- order ------------------------------------------------------------------------------------------------------------


def test_writes_and_erasures_reach_the_slowest_tier_first(workshop: Workshop) -> None:  # D01
    server, tiers = open_three(workshop, range(5))
    journal = tiers[0].journal
    host = served_table(server).store
    assert host is not None
    host.watch_writes(lambda: journal.append(("a", "write")))
    server.insert([1, 9], rows_of([1, 9], DIM, 1), "m", 0)
    assert journal == [("c", "insert"), ("b", "insert"), ("a", "write")]
    journal.clear()
    server.erase([1], "m", 0)
    assert journal == [("c", "erase"), ("b", "erase"), ("a", "write")]


def test_a_replacement_brings_rows_slowest_tier_first_and_drops_stale_ones_after_the_switch(workshop: Workshop) -> None:  # D25
    server, tiers = open_three(workshop, range(5))
    journal = tiers[0].journal
    host = served_table(server).store
    assert host is not None
    host.watch_writes(lambda: journal.append(("a", "write")))
    server.replace_model("m", [workshop.table("v2", [1, 9], DIM, 1)])
    assert journal[:3] == [("c", "insert"), ("b", "insert"), ("a", "write")]
    assert {name for name, call in journal if call == "erase"} == {"b", "c"}
    assert journal.index(("b", "erase")) > journal.index(("a", "write"))
    expected = {key: tuple(rows_of(key, DIM, 1).tolist()) for key in (1, 9)}
    assert [content(tier) for tier in tiers] == [expected, expected]
    rows = server.lookup([1, 9, 3], "m", 0)
    assert_same_bits(rows, np.concatenate([rows_of([1, 9], DIM, 1), np.full((1, DIM), DEFAULT, np.float32)]))


@pytest.mark.parametrize("cached", [False, True])
def test_an_erased_key_is_in_no_tier_and_no_cache(workshop: Workshop, cached: bool) -> None:  # D24
    server, tiers = open_three(workshop, range(5), cached=cached)
    server.lookup(range(5), "m", 0)
    assert server.erase([2, 3, 77], "m", 0) == 2
    rows = server.lookup([2, 3, 4], "m", 0)
    assert_same_bits(rows, np.concatenate([np.full((2, DIM), DEFAULT, np.float32), rows_of([4], DIM)]))
    assert not any({2, 3} & set(content(tier)) for tier in tiers)
    assert not server.contains([2, 3], "m", 0).any()


def test_a_model_that_is_unloaded_and_erased_is_in_no_tier(workshop: Workshop) -> None:  # D24, D25
    server, tiers = open_three(workshop, range(5))
    server.load_model(workshop.model((range(3), DIM), name="n"))
    server.unload_model("m", erase=True)
    assert [tier.inner.tables() for tier in tiers] == [["hps_et.n.sparse_embedding0"]] * 2
    assert_same_bits(server.lookup([2], "n", 0), rows_of([2], DIM))
    with pytest.raises(hps_numba.UnknownModelError):
        server.lookup([2], "m", 0)


def test_what_insert_acknowledged_is_in_the_slowest_tier_that_can_be_written(workshop: Workshop) -> None:
    tiers = [{"type": "hash_map"}, FAULTY, FAULTY, {**FAULTY, "read_only": True}]
    server = workshop.open(workshop.model((range(3), DIM)), tiers=tiers)
    server.insert([50], rows_of([50], DIM), "m", 0)
    assert [50 in content(tier) for tier in server._loader.slower.tiers] == [True, True, False]


def test_keys_whose_part_of_a_tier_failed_are_looked_for_in_the_next_and_else_unanswered(workshop: Workshop) -> None:  # D07
    server, tiers = open_three(workshop, range(5), host={"initialize_after_startup": False})
    tiers[0].mode = "partial"
    assert_same_bits(server.lookup([1, 2, 3], "m", 0), rows_of([1, 2, 3], DIM))
    tiers[1].inner.erase(TAG, np.array([3]))
    rows = server.lookup([1, 2, 3, 100, 101], "m", 0)
    defaults = np.full((3, DIM), DEFAULT, np.float32)
    assert_same_bits(rows, np.concatenate([rows_of([1, 2], DIM), defaults]))
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.unanswered, stats.absent, stats.tier_errors) == (2, 1, 2)


def test_a_time_budget_covers_all_tiers_together(workshop: Workshop) -> None:  # D07
    slow = {"type": "support.fakes:SlowDictTier", "max_batch_size": 1}
    model = workshop.model((range(6), DIM), time_budget_ms=1)
    tiers = [{"type": "hash_map", "initialize_after_startup": False}, slow, slow]
    server = workshop.open(model, tiers=tiers)
    for tier in server._loader.slower.tiers:
        tier.seconds = 0.01  # the time is over behind the first key
    rows = server.lookup(range(6), "m", 0)
    stats = server.stats()["m"]["sparse_embedding0"]
    assert (stats.tier_hits, stats.absent, stats.unanswered) == (1, 0, 5)
    assert_same_bits(rows, np.concatenate([rows_of([0], DIM), np.full((5, DIM), DEFAULT, np.float32)]))
