"""Concurrent lookups share what they fetch from slower tiers: each key once, no old row, and nobody waits for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.factories import KEEPING, Workshop
from support.fakes import GateTier
from support.internals import served_table, slower_tier, wait_for_background
from support.interrupts import interrupted_everywhere
from support.oracles import assert_same_bits, rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.config import PersistentDatabaseConfig, read_config
from hps_numba.errors import TierError
from hps_numba.server import shared_fetches
from hps_numba.server.flights import Flight, SharedAnswer, samples_of
from hps_numba.server.shared_fetches import SharedFetches
from hps_numba.server.table_writes import TableWrites
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

DIM = 3
DEFAULT = -7.5
LIMIT = 4  # fetches that the tier of the rig gains from at a time
SOON = 0.05  # seconds of a time budget that is to run out
EVERY_KEY = np.arange(100)
ROUNDS = 20 * int(os.environ.get("HPS_NUMBA_LONG_TESTS", "3"))


class Watched(SharedFetches):
    """Knows which threads have begun to sleep until others wake them."""

    def __init__(self, *args: Any) -> None:
        self.asleep: set[str] = set()
        super().__init__(*args)

    def _sleep(self, *args: Any) -> bool:
        self.asleep.add(threading.current_thread().name)
        return super()._sleep(*args)


class Rig:
    """A table whose slower tier holds its fetches, and threads that ask for its rows."""

    def __init__(self, workshop: Workshop) -> None:
        spec = read_config({"supportlonglong": True, "models": [workshop.model(([], DIM))]}).tables()[0]
        self.tag = spec.tag
        self.tier = GateTier(PersistentDatabaseConfig())
        self.tier.insert(self.tag, EVERY_KEY, rows_of(EVERY_KEY, DIM))
        self.tier.inner.parallel_fetches = LIMIT
        self.stack = TierStack([self.tier])
        self.writes = TableWrites(spec, HostStore(DIM), self.stack)
        self.shared = Watched(spec, self.stack, self.writes.settled_count)
        self.answers: dict[str, SharedAnswer | BaseException] = {}
        self.threads: dict[str, threading.Thread] = {}
        self.tier.shut()

    def ask(
        self,
        name: str,
        keys: Any,
        *,
        count: int | None = None,
        seconds: float | None = None,
        out: np.ndarray | None = None,
    ) -> threading.Thread:
        """A thread that asks; its answer or error is filed under ``name``."""
        since = self.writes.count if count is None else count

        def run() -> None:
            try:
                deadline = None if seconds is None else time.monotonic() + seconds
                self.answers[name] = self.shared.fetch(np.array(keys), since, deadline, out=out)
            except BaseException as problem:
                self.answers[name] = problem

        self.threads[name] = threading.Thread(target=run, name=name)
        self.threads[name].start()
        return self.threads[name]

    def lead(self, name: str, keys: Any, **how: Any) -> None:
        """``ask``, and wait until the tier is asked."""
        inside = self.tier.inside
        self.ask(name, keys, **how)
        wait_until(lambda: self.tier.inside > inside)

    def join(self, name: str, keys: Any, **how: Any) -> None:
        """``ask``, and wait until it waits for a fetch under way."""
        before = self.waiters()
        self.ask(name, keys, **how)
        wait_until(lambda: self.waiters() > before)

    def waiters(self) -> int:
        return sum(len(flight._waiting) for flight in tuple(self.shared._flights))

    def queue(self, name: str, keys: Any, **how: Any) -> None:
        """``ask``, and wait until it sleeps in the queue."""
        before = len(self.shared._queue)
        self.ask(name, keys, **how)
        wait_until(lambda: len(self.shared._queue) > before and name in self.shared.asleep)

    def end(self) -> None:
        self.tier.open()
        join_all(*self.threads.values())

    def answer(self, name: str) -> SharedAnswer:
        join_all(self.threads[name])
        answer = self.answers[name]
        assert isinstance(answer, SharedAnswer), answer
        return answer

    def check(self, name: str, keys: Any, *, joined: int) -> None:
        answer = self.answer(name)
        known = np.isin(keys, EVERY_KEY)
        assert answer.found.tolist() == known.tolist()
        assert not answer.unsure.any()
        assert_same_bits(answer.rows, np.where(known[:, None], rows_of(keys, DIM), np.float32(DEFAULT)))
        assert answer.joined == joined


@pytest.fixture
def sound_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in the queue looks for its turn only when it is woken: one thread at a time takes what is queued."""
    monkeypatch.setattr(shared_fetches, "_LOOK_SECONDS", HANG_SECONDS)


@pytest.fixture
def rig(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(SharedFetches, "PATIENCE_SECONDS", HANG_SECONDS)
    made = Rig(workshop)
    yield made
    made.end()


# --- one call for all -------------------------------------------------------------------------------------------------


def test_lookups_that_miss_the_same_keys_ask_once(rig: Rig) -> None:
    keys = [5, 3, 200, 9]
    rig.lead("first", keys)
    for i in range(6):
        rig.join(f"{i}", keys[i % 2 :])
    rig.tier.open()
    rig.check("first", keys, joined=0)
    for i in range(6):
        rig.check(f"{i}", keys[i % 2 :], joined=4 - i % 2)
    assert rig.tier.asked == [[3, 5, 9, 200]]


def test_a_lookup_asks_for_what_no_other_one_asks_for(rig: Rig) -> None:
    keys = sorted([*range(11), 200], key=lambda key: min(samples_of(np.array([key]))))
    rig.lead("a", keys[2::-1])  # has the least hash
    rig.lead("b", keys[-3:])  # the greatest
    rig.lead("c", keys)  # asks for its own keys first, then waits for the others
    rig.tier.open()
    rig.check("a", keys[2::-1], joined=0)
    rig.check("b", keys[-3:], joined=0)
    rig.check("c", keys, joined=6)
    assert rig.tier.asked == [sorted(keys[:3]), sorted(keys[-3:]), sorted(keys[3:-3])]


def test_a_lookup_with_little_in_common_asks_for_all(rig: Rig) -> None:
    rig.lead("a", [1, 2, 3])
    rig.lead("b", [3, 4, 5, 6, 7, 8, 9, 10])
    rig.tier.open()
    rig.check("b", [3, 4, 5, 6, 7, 8, 9, 10], joined=0)
    assert rig.tier.asked == [[1, 2, 3], [3, 4, 5, 6, 7, 8, 9, 10]]


@pytest.mark.usefixtures("sound_sleep")
def test_the_slowest_tier_says_how_many_fetches_it_gains_from(rig: Rig) -> None:
    rig.tier.inner.parallel_fetches = 1
    rig.lead("first", [90])
    rig.queue("1", [1])
    rig.queue("2", [2])
    rig.tier.open()
    join_all(*rig.threads.values())
    assert rig.tier.asked == [[90], [1, 2]]


def test_rows_in_the_array_of_a_caller_are_shared_too(rig: Rig) -> None:
    out = np.empty((3, DIM), np.float32)
    rig.lead("leader", [1, 2, 200], out=out)
    rig.join("joins", [200, 1])
    rig.tier.open()
    rig.check("leader", [1, 2, 200], joined=0)
    rig.check("joins", [200, 1], joined=2)
    assert rig.answer("leader").rows is out and len(rig.tier.asked) == 1


def test_others_get_a_copy_of_rows_that_do_not_last() -> None:
    keys, rows = np.array([1, 2]), rows_of([1, 2], DIM)
    answer = SharedAnswer(rows, np.ones(2, bool), np.zeros(2, bool))
    alone, joined, lasting = (Flight(keys, frozenset(), 0, None) for _ in range(3))
    joined.wake_at_end(SimpleQueue())
    for flight in (alone, joined, lasting):
        flight.answered(answer, lasting=flight is lasting)
    assert alone.answer is None and lasting.answer is answer and joined.answer is not None
    rows[:] = np.nan  # the caller has its array back
    assert_same_bits(joined.answer.rows, rows_of([1, 2], DIM))


def test_a_tier_that_answers_at_once_is_not_shared_until_it_takes_longer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_fetches, "_QUICK_SECONDS", HANG_SECONDS)
    rig.tier.open()
    for _ in range(shared_fetches._QUICK_CALLS + 1):
        out = np.full((2, DIM), np.nan, np.float32)
        answer = rig.shared.fetch(np.array([1, 200]), rig.writes.count, out=out)
        assert answer.rows is out and answer.found.tolist() == [True, False]
        assert_same_bits(out, np.concatenate([rows_of([1], DIM), np.full((1, DIM), DEFAULT, np.float32)]))
    rig.tier.shut()
    rig.lead("first", [1, 2])
    rig.lead("second", [1, 2])  # asks too
    monkeypatch.setattr(shared_fetches, "_QUICK_SECONDS", 0.0)
    monkeypatch.setattr(shared_fetches, "_QUICK_SECONDS_A_KEY", 0.0)
    rig.tier.let_one_go()
    wait_until(lambda: rig.shared._quick_calls == 0)
    rig.lead("third", [1, 2])
    rig.join("joins", [2, 1])
    rig.tier.open()
    rig.check("joins", [2, 1], joined=2)


def test_fetches_that_begin_and_end_while_a_lookup_looks_for_them(rig: Rig) -> None:
    """Each step of the search is one that other threads may interrupt."""
    rig.tier.open()
    rig.tier.before = lambda call, keys: time.sleep(2e-4) if call == "fetch" else None

    problems: list[BaseException] = []

    def hammer(first: int) -> None:
        try:
            for i in range(200):
                assert rig.shared.fetch(np.array([(first + i) % 100]), rig.writes.count).found.all()
        except BaseException as problem:
            problems.append(problem)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    try:
        threads = [threading.Thread(target=hammer, args=(7 * i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        join_all(*threads)
    finally:
        sys.setswitchinterval(before)
    assert not problems, problems


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_lookups_with_most_keys_in_common_have_a_sample_in_common(share: float) -> None:
    rng, found, n, tries = np.random.default_rng(3), 0, 50, 400
    for _ in range(tries):
        keys = rng.integers(-(2**63), 2**63 - 1, 2 * n)
        common = round(2 * n * share / (1 + share))  # of n in each: a share of all keys of both
        one, other = keys[:n], rng.permutation(np.concatenate([keys[:common], keys[n : 2 * n - common]]))
        found += not samples_of(one).isdisjoint(samples_of(other))
    assert abs(found / tries - (1 - (1 - share) ** 2)) < 0.1


@pytest.mark.usefixtures("sound_sleep")
def test_lookups_beyond_the_limit_are_fetched_together_each_key_once(rig: Rig) -> None:
    for i in range(LIMIT):
        rig.lead(f"busy {i}", [90 + i])
    for i in range(5):
        rig.queue(f"{i}", [i + 1, i, 200])
    rig.tier.let_one_go()
    wait_until(lambda: len(rig.tier.asked) == LIMIT + 1)
    rig.tier.open()
    for i in range(5):
        assert rig.answer(f"{i}").joined in (0, 3)
        rig.check(f"{i}", [i + 1, i, 200], joined=rig.answer(f"{i}").joined)
    assert sum(rig.answer(f"{i}").joined == 0 for i in range(5)) == 1
    assert rig.tier.asked[-1] == [0, 1, 2, 3, 4, 5, 200]


@pytest.mark.usefixtures("sound_sleep")
def test_a_fetch_from_the_queue_is_no_larger_than_a_batch_of_the_tier(rig: Rig) -> None:
    rig.tier.inner.section = rig.tier.section = PersistentDatabaseConfig(max_batch_size=5)
    for i in range(LIMIT):
        rig.lead(f"busy {i}", [90 + i])
    for i in range(4):
        rig.queue(f"{i}", [2 * i, 2 * i + 1])
    rig.tier.let_one_go()  # one of the queue looks for its turn, with all others still there
    wait_until(lambda: len(rig.tier.asked) == LIMIT + 1)
    rig.tier.open()
    for i in range(4):
        join_all(rig.threads[f"{i}"])
        assert rig.answer(f"{i}").found.all()
    assert max(len(keys) for keys in rig.tier.asked) == 4


def test_a_much_larger_fetch_is_not_joined(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_fetches, "_SMALL", 8)
    rig.lead("large", np.arange(40))
    rig.lead("small", [1, 2])  # does not wait for it
    rig.join("half", np.arange(20))
    rig.tier.open()
    rig.check("half", np.arange(20), joined=20)
    assert [len(keys) for keys in rig.tier.asked] == [40, 2]


# --- no old rows ------------------------------------------------------------------------------------------------------


def test_a_fetch_that_began_before_a_write_is_not_joined_after_it(rig: Rig) -> None:
    rig.lead("before", [1, 2])
    rig.writes.insert(np.array([1]), rows_of([1], DIM, 1))
    rig.lead("after", [1, 2])
    rig.tier.open()
    assert_same_bits(rig.answer("before").rows, rows_of([1, 2], DIM))
    assert_same_bits(rig.answer("after").rows, np.concatenate([rows_of([1], DIM, 1), rows_of([2], DIM)]))


def test_a_lookup_that_began_before_the_write_may_join_a_fetch_from_before_it(rig: Rig) -> None:
    count = rig.writes.count
    rig.lead("leader", [1])
    rig.writes.insert(np.array([1]), rows_of([1], DIM, 1))
    rig.join("slow", [1], count=count)
    rig.tier.open()
    assert_same_bits(rig.answer("slow").rows, rows_of([1], DIM))


def test_a_fetch_that_began_during_a_write_is_not_joined(rig: Rig) -> None:
    with rig.writes.changing():
        assert rig.writes.settled_count() is None
        with rig.writes.paused():  # one inside the other: still a write
            assert rig.writes.settled_count() is None
        assert rig.writes.settled_count() is None
        rig.lead("during", [1])
        rig.lead("another", [1])
    assert rig.writes.settled_count() == rig.writes.count
    rig.lead("after", [1])
    rig.join("joins the last", [1])
    rig.tier.open()
    rig.check("joins the last", [1], joined=1)


# --- nobody waits for ever --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [RuntimeError("a defect"), KeyboardInterrupt(), TierError("out of order")])
def test_an_error_reaches_only_who_asked(rig: Rig, problem: BaseException) -> None:
    rig.lead("first", [1, 2])
    rig.join("joins", [2, 1])
    rig.tier.problem = problem
    rig.tier.let_one_go()
    if isinstance(problem, TierError):  # is answered: the tier is skipped
        rig.tier.open()
        for name in ("first", "joins"):
            assert rig.answer(name).unsure.all()
        assert (rig.answer("first").errors, rig.answer("joins").errors) == (1, 0)
        assert len(rig.tier.asked) == 1
        return
    join_all(rig.threads["first"])
    assert isinstance(rig.answers["first"], (TierError, KeyboardInterrupt))
    rig.tier.open()
    rig.check("joins", [2, 1], joined=0)
    assert len(rig.tier.asked) == 2


def test_a_lookup_waits_for_another_one_no_longer_than_its_time_budget(rig: Rig) -> None:
    rig.lead("patient", [1])
    rig.ask("hasty", [1], seconds=SOON)
    answer = rig.answer("hasty")
    assert rig.tier.inside == 1
    assert answer.unsure.all() and not answer.found.any()
    assert_same_bits(answer.rows, np.full((1, DIM), DEFAULT, np.float32))


def test_time_runs_out_in_the_queue(rig: Rig) -> None:
    for i in range(LIMIT):
        rig.lead(f"busy {i}", [90 + i])
    rig.ask("hasty", [1], seconds=SOON)
    answer = rig.answer("hasty")
    assert answer.unsure.all() and not answer.found.any()
    assert not rig.shared._queue
    assert [1] not in rig.tier.asked


class HastyTier(GateTier):
    """Its first fetch runs out of time behind the first key."""

    def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Any:
        first = not self.asked
        answer = super().fetch(table, keys, rows, deadline=None)
        if first:
            answer.found[1:] = False
            return type(answer)(answer.found, 1)
        return answer


def test_what_a_hasty_lookup_has_no_time_for_is_asked_for_by_those_that_have(rig: Rig) -> None:
    tier = HastyTier(PersistentDatabaseConfig())
    tier.insert(rig.tag, EVERY_KEY, rows_of(EVERY_KEY, DIM))
    rig.stack.tiers, rig.tier = (tier,), tier
    tier.shut()
    rig.lead("hasty", [1, 2, 3], seconds=HANG_SECONDS)
    rig.join("patient", [1, 2, 3])
    tier.open()
    assert rig.answer("hasty").unsure.tolist() == [False, True, True]
    rig.check("patient", [1, 2, 3], joined=1)
    assert tier.asked == [[1, 2, 3], [2, 3]]


def ended_frame() -> FrameType:
    return sys._getframe()


def test_a_fetch_whose_thread_vanished_is_given_up(rig: Rig) -> None:
    for _ in range(LIMIT):  # none of them ever ends
        other = Flight(np.array([7]), frozenset(), None, None)
        other.thread, other.frame = 0, ended_frame()
        rig.shared._flights[other] = None
    lost = Flight(np.array([1, 2]), frozenset(), rig.writes.count, None)
    lost.thread, lost.frame = 0, ended_frame()
    rig.shared._flights[lost] = None
    rig.tier.open()
    rig.ask("joins", [1, 2])
    rig.ask("queues", [3])
    rig.check("joins", [1, 2], joined=0)
    rig.check("queues", [3], joined=0)
    assert not rig.shared._flights


def test_a_request_that_nobody_serves_is_made_again(rig: Rig) -> None:
    for i in range(LIMIT):
        rig.lead(f"busy {i}", [90 + i])
    rig.queue("forgotten", [1])
    rig.shared._queue.clear()  # as a thread does that is interrupted when it has just taken it
    wait_until(lambda: [1] in rig.tier.asked)
    rig.tier.open()
    rig.check("forgotten", [1], joined=0)


def test_a_lookup_from_inside_a_fetch_does_not_wait_for_it(rig: Rig) -> None:
    class AsksItself(GateTier):
        inner_answer: Any = None

        def fetch(self, table: str, keys: np.ndarray, rows: np.ndarray, *, deadline: float | None = None) -> Any:
            if self.inner_answer is None:
                self.inner_answer = True
                self.inner_answer = rig.shared.fetch(keys, rig.writes.count)
            return super().fetch(table, keys, rows, deadline=deadline)

    tier = AsksItself(PersistentDatabaseConfig())
    tier.insert(rig.tag, EVERY_KEY, rows_of(EVERY_KEY, DIM))
    rig.stack.tiers = (tier,)
    rig.ask("outer", [1, 2])
    rig.check("outer", [1, 2], joined=0)
    assert_same_bits(tier.inner_answer.rows, rows_of([1, 2], DIM))


def test_an_interrupt_anywhere_leaves_nobody_waiting(rig: Rig) -> None:
    """Of the thread that asks the tier, which others join or wait for in the queue."""
    rig.tier.open()
    rig.tier.before = lambda call, keys: time.sleep(1e-3) if call == "fetch" else None
    stop, problems = threading.Event(), []

    def hammer() -> None:
        try:
            while not stop.is_set():
                for keys in ([1, 2], [2, 3, 200], [4]):
                    answer = rig.shared.fetch(np.array(keys), rig.writes.count)
                    assert answer.found.tolist() == [key < 100 for key in keys]
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=hammer) for _ in range(6)]
    for thread in threads:
        thread.start()
    kept: list[Any] = []  # tracebacks, as a notebook keeps the last one
    try:
        for interrupt in interrupted_everywhere(
            lambda: rig.shared.fetch(np.array([1, 2, 5]), rig.writes.count), "shared_fetches.py", step=11
        ):
            kept.append(interrupt)
    finally:
        stop.set()
        join_all(*threads)
    assert not problems, problems
    assert len(kept) > 3


def test_calls_inside_a_lookup_while_others_share(workshop: Workshop) -> None:
    """A signal handler that looks up, at every few lines of a lookup, while other threads join and queue."""
    from support.reentry import run_inside

    server, tier = workshop.open_cold("support.fakes:SlowDictTier")
    tier.seconds = 1e-3
    stop = threading.Event()
    threads = [
        threading.Thread(target=lambda: [server.lookup([1, 2, 3], "m", 0) for _ in iter(stop.is_set, True)]) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    try:
        line, reached = 1, True
        while reached:

            def inner() -> None:
                assert_same_bits(server.lookup([2, 4], "m", 0), rows_of([2, 4], DIM))

            reached = run_inside(lambda: server.lookup([1, 2, 5], "m", 0), inner, line) != "not reached"
            line += 7
        assert line > 50
    finally:
        stop.set()
        join_all(*threads)


def test_patience_ends(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedFetches, "PATIENCE_SECONDS", SOON)
    for i in range(LIMIT):
        rig.lead(f"busy {i}", [90 + i])
    rig.ask("joins", [90])
    rig.ask("queues", [1])
    wait_until(lambda: rig.tier.inside == LIMIT + 2)  # asks for itself
    rig.tier.open()
    rig.check("joins", [90], joined=0)
    rig.check("queues", [1], joined=0)


def test_a_forked_child_forgets_the_fetches_of_other_threads(rig: Rig) -> None:
    rig.lead("first", [1, 2])
    rig.shared.reset_after_fork()  # what a child does
    rig.tier.open()
    assert rig.shared.fetch(np.array([1, 2]), rig.writes.count).found.all()


# --- with a server ----------------------------------------------------------------------------------------------------


def test_a_server_counts_what_lookups_joined(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedFetches, "PATIENCE_SECONDS", HANG_SECONDS)
    server, tier = workshop.open_cold("support.fakes:GateTier", volatile=KEEPING)
    tier.shut()
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(server.lookup([3, 4, 3, 50], "m", 0))) for _ in range(4)]
    flights = served_table(server).slow_path._fetches._flights  # type: ignore[union-attr]
    threads[0].start()
    wait_until(lambda: tier.inside)
    for thread in threads[1:]:
        thread.start()
    wait_until(lambda: sum(len(flight._waiting) for flight in tuple(flights)) == 3)
    tier.open()
    join_all(*threads)
    expected = np.concatenate([rows_of([3, 4, 3], DIM), np.full((1, DIM), DEFAULT, np.float32)])
    for answer in answers:
        assert_same_bits(answer, expected)
    wait_for_background(server)
    stats = stats_of(server)
    assert (stats.tier_hits, stats.absent, stats.joined, stats.rows) == (12, 4, 9, 2)
    assert tier.calls["fetch"] == 1


def stats_of(server: hps_numba.HPS) -> Any:
    return server.stats()["m"]["sparse_embedding0"]


def with_versions(keys: np.ndarray, version: int) -> np.ndarray:
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2] = version, keys, keys + version
    return rows


SMALL_AND_KEEPING = {**KEEPING, "overflow_margin": 4, "num_partitions": 1}
CACHED = {"deployed_device_list": [0], "gpucacheper": 0.5, "hit_rate_threshold": 1.0}


@pytest.mark.parametrize(
    ("volatile", "entry"),
    [({"type": "disabled"}, {}), (SMALL_AND_KEEPING, {}), ({"type": "disabled"}, CACHED)],
    ids=["tier only", "small host memory", "cache"],
)
def test_no_lookup_gets_a_row_older_than_a_write_acknowledged_before_it_began(  # D01
    workshop: Workshop, volatile: Any, entry: Any
) -> None:
    """Nor one older than what any lookup had seen that ended before it began."""
    model = workshop.model((range(9), DIM), **entry)
    server = workshop.open(
        model, cache_on_cpu=bool(entry), volatile_db=volatile, persistent_db={"type": "support.fakes:LateTier"}
    )
    keys = np.arange(9)
    acknowledged, seen, lookups = [0], np.zeros(len(keys)), [0]
    stop, problems = threading.Event(), []
    server.insert(keys, with_versions(keys, 0), "m", 0)
    slower_tier(server).seconds = 2e-3

    def read(number: int) -> None:
        rng = np.random.default_rng(number)
        try:
            while not stop.is_set():
                some = rng.choice(keys, rng.integers(1, 5))
                least = np.maximum(seen[some], acknowledged[0])
                rows = server.lookup(some, "m", 0)
                assert (rows[:, 1] == some).all() and (rows[:, 2] == some + rows[:, 0]).all(), "a foreign or torn row"
                assert (rows[:, 0] >= least).all(), (rows[:, 0].tolist(), least.tolist())
                seen[some] = rows[:, 0]  # perhaps less than another thread has seen: then the test asks for less
                lookups[0] += 1
        except BaseException as problem:
            problems.append(problem)
            stop.set()

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        version = 0
        while not stop.is_set() and (version < ROUNDS or stats_of(server).joined <= 20):  # fewer would show nothing
            version += 1
            server.insert(keys, with_versions(keys, version), "m", 0)
            acknowledged[0] = version
            wait_until(lambda enough=lookups[0] + 20: lookups[0] > enough or stop.is_set())
    finally:
        stop.set()
        join_all(*threads)
    assert not problems, problems
