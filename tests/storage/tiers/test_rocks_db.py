"""``rocks_db``: what every tier has to do, HugeCTR's layout, restarts, a second process, forks and threads."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from support.children import in_child
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of
from support.processes import environment
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import HANG_SECONDS, join_all

from hps_numba.errors import ClosedError, TierError, TierUnavailable
from hps_numba.storage.tiers._tier import NO_LIMIT
from hps_numba.storage.tiers.rocks_db import RocksTier
from hps_numba.testing import TierContract

rocksdict = pytest.importorskip("rocksdict")

TABLES = {"hps_et.m.a": 1, "hps_et.m.b": 3, "hps_et.n.a": 16}
EDGES = [0, 1, 255, 256, 2**31, 2**32 - 1]


class TestContract(TierContract):  # D05, D06, D07
    tier = RocksTier

    def options(self, folder: Path) -> Mapping[str, Any]:
        return {"path": tempfile.mkdtemp(dir=folder), "num_threads": 3}


@pytest.fixture
def rocks(tmp_path: Path) -> Iterator[Callable[..., RocksTier]]:
    made: list[RocksTier] = []

    def one(*, wide_keys: bool = True, **keys: Any) -> RocksTier:
        given = {"path": str(tmp_path / "database"), "num_threads": 4, **keys}
        made.append(RocksTier.from_options(wide_keys=wide_keys, **given))
        return made[-1]

    yield one
    for tier in made:
        tier.close()


# --- against a dict ---------------------------------------------------------------------------------------------------


class AgainstADict(RuleBasedStateMachine):
    """Any calls in any order, with the database closed and opened again in between."""

    keys = st.lists(st.sampled_from([*EDGES, *range(2, 12), -1, -(2**63), 2**63 - 1]), max_size=12)
    tables = st.sampled_from(sorted(TABLES))

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.rows: dict[str, dict[int, bytes]] = {}
        self.stamp = 0
        self.open()

    def open(self) -> None:
        self.tier = RocksTier.from_options(path=f"{self.folder.name}/db", max_batch_size=5, num_threads=2)

    @rule(table=tables, keys=keys)
    def insert(self, table: str, keys: list[int]) -> None:
        self.stamp += 1
        rows = np.concatenate(
            [rows_of([key], TABLES[table], self.stamp + i) for i, key in enumerate(keys)] or [np.empty((0, TABLES[table]))]
        )
        expected = self.rows.setdefault(table, {})
        before = len(expected)
        expected.update({key: row.tobytes() for key, row in zip(keys, rows.astype(np.float32), strict=True)})
        assert self.tier.insert(table, ints(*keys), rows.astype(np.float32)) == len(expected) - before

    @rule(table=tables)
    def insert_another_width(self, table: str) -> None:
        if self.rows.get(table):
            with pytest.raises(TierError, match=f"expected rows of width {TABLES[table]}"):
                self.tier.insert(table, ints(1), rows_of([1], TABLES[table] + 1))

    @rule(table=tables, keys=keys)
    def erase_keys(self, table: str, keys: list[int]) -> None:
        there = self.rows.get(table, {})
        assert self.tier.erase(table, ints(*keys)) == len([there.pop(key) for key in set(keys) if key in there])

    @rule(table=tables)
    def erase_table(self, table: str) -> None:
        assert self.tier.erase(table) == len(self.rows.pop(table, {}))

    @rule(table=tables, keys=keys)
    def read(self, table: str, keys: list[int]) -> None:
        there = self.rows.get(table, {})
        answer, rows = fetch(self.tier, table, ints(*keys), TABLES[table])
        assert answer.found.tolist() == [key in there for key in keys] == self.tier.contains(table, ints(*keys)).tolist()
        assert [row.tobytes() for row, found in zip(rows, answer.found, strict=True) if found] == [
            there[key] for key in keys if key in there
        ]

    @rule(table=tables, other=tables)
    def copy_by_a_dump(self, table: str, other: str) -> None:
        if self.rows.get(table) and TABLES[table] == TABLES[other]:
            self.tier.dump(table, f"{self.folder.name}/x.sst")
            assert self.tier.load_dump(other, f"{self.folder.name}/x.sst") == len(self.rows[table])
            self.rows.setdefault(other, {}).update(self.rows[table])

    @rule()
    def reopen(self) -> None:
        self.tier.close()
        self.open()

    @rule(table=tables, chunk=st.integers(1, 7))
    def scan(self, table: str, chunk: int) -> None:
        assert content_of(self.tier, table, chunk) == self.rows.get(table, {})

    @invariant()
    def the_numbers_are_right(self) -> None:
        assert self.tier.tables() == sorted(self.rows)
        assert [self.tier.size(table) for table in TABLES] == [len(self.rows.get(table, {})) for table in TABLES]

    def teardown(self) -> None:
        self.tier.close()
        self.folder.cleanup()


def test_any_calls_give_what_a_dict_gives() -> None:  # D20
    run_state_machine_as_test(AgainstADict, settings=settings(max_examples=10, stateful_step_count=20, deadline=None))


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wide", "key_format"), [(True, "<q"), (False, "<I")])
def test_databases_in_the_layout_of_hugectr_are_served(
    rocks: Callable[..., RocksTier], tmp_path: Path, wide: bool, key_format: str
) -> None:  # D20
    path, keys = tmp_path / "database", EDGES + ([-1, -(2**63)] if wide else [])
    database = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    column = database.create_column_family(TAG, rocksdict.Options(raw_mode=True))
    for key in keys:
        column[struct.pack(key_format, key)] = struct.pack("<3f", *rows_of([key], DIM)[0])
    del column
    database.close()
    (path / "rocksdict-config.json").unlink()  # HugeCTR writes none
    tier = rocks(wide_keys=wide)
    assert (tier.tables(), tier.size(TAG)) == ([TAG], len(keys))
    assert_same_bits(fetch(tier, TAG, ints(*keys))[1], rows_of(keys, DIM))
    assert tier.insert(TAG, ints(7, 0), rows_of([7, 0], DIM, 1)) == 1
    assert tier.erase(TAG, ints(1)) == 1


@pytest.mark.parametrize(("wide", "key_format"), [(True, "<q"), (False, "<I")])
def test_the_bytes_are_those_of_hugectr(
    rocks: Callable[..., RocksTier], tmp_path: Path, wide: bool, key_format: str
) -> None:  # D20
    tier, keys = rocks(wide_keys=wide, max_batch_size=2), EDGES + ([-1, -(2**63)] if wide else [])
    tier.insert(TAG, ints(*keys), rows_of(keys, DIM))
    tier.insert("hps_et.m.b", ints(5), np.array([[1.5]], np.float32))
    tier.close()
    path = str(tmp_path / "database")
    assert sorted(rocksdict.Rdict.list_cf(path)) == ["default", TAG, "hps_et.m.b"]
    columns = {name: rocksdict.Options(raw_mode=True) for name in (TAG, "hps_et.m.b")}
    database = rocksdict.Rdict(path, rocksdict.Options(raw_mode=True), columns)
    got = dict(database.get_column_family(TAG).items())
    assert got == {struct.pack(key_format, key): struct.pack("<3f", *rows_of([key], DIM)[0]) for key in keys}
    assert list(database.get_column_family("hps_et.m.b").items()) == [(struct.pack(key_format, 5), struct.pack("<f", 1.5))]
    assert list(database.items()) == []
    database.close()


def test_a_table_of_other_keys_or_rows_is_an_error(rocks: Callable[..., RocksTier], tmp_path: Path) -> None:  # D22
    tier = rocks()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    tier.close()
    narrow = rocks(wide_keys=False)
    for call in (lambda: narrow.size(TAG), lambda: fetch(narrow, TAG, ints(1)), lambda: next(narrow.scan(TAG))):
        with pytest.raises(TierError, match=rf"{TAG}: expected keys of 4 bytes \(supportlonglong\), got 8"):
            call()
    narrow.close()
    database = rocksdict.Rdict(
        str(tmp_path / "database"), rocksdict.Options(raw_mode=True), {TAG: rocksdict.Options(raw_mode=True)}
    )
    column = database.get_column_family(TAG)
    column[struct.pack("<q", 2)] = b"12345678"
    column[struct.pack("<q", 0)] = b"123456789012"
    del column
    database.close()
    mixed = rocks()
    assert fetch(mixed, TAG, ints(0, 1))[0].found.all()
    with pytest.raises(TierError, match=f"{TAG}: expected rows of 12 bytes, got 8"):
        fetch(mixed, TAG, ints(0, 1, 2))


def test_narrow_keys_never_stand_for_others(rocks: Callable[..., RocksTier]) -> None:
    tier = rocks(wide_keys=False)
    tier.insert(TAG, ints(1, 2**32 - 1), rows_of([1, 2], DIM))
    assert fetch(tier, TAG, ints(2**32 + 1, -1, 1))[0].found.tolist() == [False, False, True]
    assert (tier.erase(TAG, ints(2**32 + 1, -1)), tier.size(TAG)) == (0, 2)
    for wrong in (-1, 2**32):
        with pytest.raises(TierError, match=rf"expected keys in 0\.\.4294967295, which fit 4 bytes, got {wrong}"):
            tier.insert(TAG, ints(5, wrong), rows_of([5, 6], DIM))
    assert tier.size(TAG) == 2


def test_no_table_is_named_as_rocksdbs_own(rocks: Callable[..., RocksTier]) -> None:
    tier = rocks()
    assert (tier.tables(), tier.size("default"), tier.capacity(TAG)) == ([], 0, NO_LIMIT)
    for name, expected in (("default", "which RocksDB itself uses"), ("a\0b", "cannot create the table")):
        with pytest.raises(TierError, match=expected):
            tier.insert(name, ints(1), rows_of([1], DIM))


def test_rows_of_no_fitting_shape_are_refused(rocks: Callable[..., RocksTier]) -> None:
    tier = rocks()
    for shape in [(2, DIM), (1,), (1, 0)]:
        with pytest.raises(TierError, match="rows: expected shape"):
            tier.insert(TAG, ints(1), np.zeros(shape, np.float32))
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    with pytest.raises(TierError, match=r"rows: expected shape \(1, 3\), got \(1, 4\)"):
        tier.fetch(TAG, ints(1), np.zeros((1, 4), np.float32))


# --- open it twice ----------------------------------------------------------------------------------------------------


def files_of(path: Path) -> dict[str, tuple[int, bytes]]:
    """Times and bytes of files by their names; RocksDB writes notes to its LOG at any time while it is open for writing."""
    return {
        entry.name: (0, b"") if entry.name == "LOG" else (entry.stat().st_mtime_ns, entry.read_bytes())
        for entry in path.iterdir()
    }


def test_read_only_writes_nothing_and_stays_as_it_was(rocks: Callable[..., RocksTier], tmp_path: Path) -> None:  # D21
    writer = rocks()
    writer.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    before = files_of(tmp_path / "database")
    reader = rocks(read_only=True)
    assert (reader.read_only, reader.tables(), reader.size(TAG)) == (True, [TAG], 2)
    assert content_of(reader, TAG) == content_of(writer, TAG)
    for write in (
        lambda: reader.insert(TAG, ints(3), rows_of([3], DIM)),
        lambda: reader.erase(TAG, ints(1)),
        lambda: reader.erase(TAG),
    ):
        with pytest.raises(TierError, match="expected a database open for writing, got one opened read_only"):
            write()
    assert files_of(tmp_path / "database") == before
    writer.insert(TAG, ints(1, 3), rows_of([1, 3], DIM, 1))
    writer.erase("hps_et.m.x")
    assert_same_bits(fetch(reader, TAG, ints(1))[1], rows_of([1], DIM))
    assert reader.size(TAG) == 2
    assert rocks(read_only=True).size(TAG) == 3
    reader.close()
    assert writer.size(TAG) == 3


def test_reading_beside_a_writer_that_compacts(rocks: Callable[..., RocksTier]) -> None:  # D21
    writer, keys, ended = rocks(), np.arange(2000), threading.Event()

    def write() -> None:
        stamp = 0
        while not ended.is_set():
            stamp += 1
            writer.insert(TAG, keys, np.full((len(keys), 64), stamp, np.float32))
            writer._tables[TAG]._column.flush()

    writer.insert(TAG, keys, np.zeros((len(keys), 64), np.float32))
    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen: list[float] = []
        while len(seen) < 20 or seen[-1] == seen[0]:
            assert thread.is_alive()
            reader = rocks(read_only=True)
            answer, rows = fetch(reader, TAG, keys, 64)
            assert answer.found.all() and (rows == rows[:, :1]).all()
            seen.append(rows.max())
            reader.close()
    finally:
        ended.set()
        join_all(thread)
    assert seen == sorted(seen)


SECOND_PROCESS = """
import sys
import numpy as np
from hps_numba.errors import TierUnavailable
from hps_numba.storage.tiers.rocks_db import RocksTier
try:
    RocksTier.from_options(path=sys.argv[1])
except TierUnavailable as problem:
    print(problem)
reader = RocksTier.from_options(path=sys.argv[1], read_only=True)
rows = np.zeros((1, 3), np.float32)
print(reader.fetch("hps_et.m.a", np.array([2]), rows).found.all(), *rows[0])
reader.close()
"""


def test_a_second_process_reads_and_may_not_write(rocks: Callable[..., RocksTier], tmp_path: Path) -> None:  # D21, D22
    tier, path = rocks(), tmp_path / "database"
    tier.insert(TAG, ints(2), np.array([[1.0, 2.0, 3.0]], np.float32))
    command = [sys.executable, "-c", SECOND_PROCESS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=True)
    refused, read = done.stdout.splitlines()
    assert (
        refused.startswith(f"{path}: expected a database that nothing else has open for writing") and f"{path}/LOCK" in refused
    )
    assert read == "True 1.0 2.0 3.0"
    with pytest.raises(TierUnavailable, match=f"whose lock {path}/LOCK is held"):
        rocks()


# --- servers ----------------------------------------------------------------------------------------------------------


def test_a_server_finds_its_rows_after_a_restart(workshop: Workshop) -> None:  # D23
    database = {"type": "rocks_db", "path": str(workshop.folder / "database"), "num_threads": 2}
    cold = {"type": "hash_map", "initialize_after_startup": False}
    first = workshop.open(workshop.model((range(9), 3)), volatile_db=cold, persistent_db=database)
    first.insert([3, 100], rows_of([3, 100], 3, 1), "m", 0)
    first.erase([5], "m", 0)
    first.close()
    model = workshop.model((range(9), 3), stamp=9)  # other rows in the files now
    for more in ({"initialize_after_startup": False}, {"read_only": True}):  # D21
        before = files_of(workshop.folder / "database")
        again = workshop.open(model, volatile_db=cold, persistent_db={**database, **more})
        assert_same_bits(again.lookup([0, 1, 8], "m", 0), rows_of([0, 1, 8], 3))
        assert_same_bits(again.lookup([3, 100], "m", 0), rows_of([3, 100], 3, 1))
        assert (again.lookup([5], "m", 0) == -7.5).all()
        if "read_only" in more:
            assert files_of(workshop.folder / "database") == before
        again.close()


def test_a_server_dumps_and_loads_sorted_files(workshop: Workshop, tmp_path: Path) -> None:  # F12
    server = workshop.open(workshop.model((range(300), 3)), persistent_db={"type": "rocks_db", "path": str(tmp_path / "db")})
    assert server.dump(tmp_path / "a.sst", "m", 0) == 300
    server.insert([1, 256], rows_of([1, 256], 3, 1), "m", 0)
    assert server.load_dump(tmp_path / "a.sst", "m", 0) == 300
    assert_same_bits(server.lookup([1, 256], "m", 0), rows_of([1, 256], 3))


# --- threads, forks and the end ---------------------------------------------------------------------------------------


def test_rows_are_whole_beside_writes_and_erased_tables(rocks: Callable[..., RocksTier]) -> None:
    tier, keys, problems = rocks(max_batch_size=100), np.arange(400), []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            answer, rows = fetch(tier, TAG, keys, 8)
            if not (rows[answer.found] == rows[answer.found][:, :1]).all():
                problems.append(rows)
            sum(len(some) for some, _ in tier.scan(TAG, 50))
            tier.size(TAG)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for stamp in range(60):
            assert tier.insert(TAG, keys, np.full((400, 8), stamp, np.float32)) == (400 if stamp % 7 == 0 else 0)
            if stamp % 7 == 6:
                assert tier.erase(TAG) == 400
    finally:
        ended.set()
        join_all(*threads)
    assert not problems and tier.size(TAG) == 400


def test_closing_while_others_read_and_write(rocks: Callable[..., RocksTier]) -> None:
    for _ in range(5):
        tier, keys = rocks(max_batch_size=50), np.arange(1000)
        tier.insert(TAG, keys, rows_of(keys, DIM))
        begun, other = threading.Barrier(4), []

        def work(call: Callable[[], Any], begun: threading.Barrier = begun, other: list[Any] = other) -> None:
            begun.wait(HANG_SECONDS)
            try:
                while True:
                    call()
            except ClosedError:
                return
            except BaseException as problem:
                other.append(problem)

        calls = [
            lambda tier=tier, keys=keys: fetch(tier, TAG, keys),
            lambda tier=tier: content_of(tier, TAG, 10),
            lambda tier=tier, keys=keys: tier.insert(TAG, keys, rows_of(keys, DIM)),
        ]
        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        begun.wait(HANG_SECONDS)
        tier.close()
        join_all(*threads)
        assert not other
        with closing(rocks()) as again:  # the lock is free at once, and all rows are there
            assert again.size(TAG) == 1000


def test_a_suspended_scan_keeps_nothing_open(rocks: Callable[..., RocksTier]) -> None:
    tier = rocks()
    tier.insert(TAG, ints(1, 2, 3), rows_of([1, 2, 3], DIM))
    scan = tier.scan(TAG, 1)
    next(scan)
    tier.close()
    again = rocks()
    with pytest.raises(ClosedError, match="RocksTier: the tier is closed"):
        next(scan)
    assert again.size(TAG) == 3
    for call in (lambda: tier.size(TAG), tier.tables, lambda: tier.insert(TAG, ints(1), rows_of([1], DIM))):
        with pytest.raises(ClosedError):
            call()


def test_a_forked_child_may_not_use_it(rocks: Callable[..., RocksTier], tmp_path: Path) -> None:
    tier = rocks()
    tier.insert(TAG, np.arange(500), rows_of(range(500), DIM))
    fetch(tier, TAG, np.arange(500))  # with threads

    def child() -> bool:
        for call in (
            lambda: fetch(tier, TAG, ints(1)),
            lambda: tier.insert(TAG, ints(1), rows_of([1], DIM)),
            lambda: tier.erase(TAG),
            lambda: tier.size(TAG),
            tier.tables,
        ):
            try:
                call()
            except TierUnavailable as problem:
                if "forked child" not in str(problem):
                    return False
            else:
                return False
        tier.close()
        try:
            RocksTier.from_options(path=str(tmp_path / "other"))
        except TierUnavailable as problem:
            return "before the fork" in str(problem) and not (tmp_path / "other").exists()
        return False

    assert in_child(child) == 0
    assert fetch(tier, TAG, np.arange(500))[0].found.all()
    assert tier.insert(TAG, ints(1000), rows_of([1000], DIM)) == 1


FORKING = """
import os, sys, threading
import numpy as np
from hps_numba.storage.tiers.rocks_db import RocksTier
tier = RocksTier.from_options(path=sys.argv[1])
keys = np.arange(3000)
tier.insert("hps_et.m.a", keys, np.ones((3000, 8), np.float32))
ended = threading.Event()
def work():
    while not ended.is_set():
        tier.fetch("hps_et.m.a", keys, np.empty((3000, 8), np.float32))
        list(tier.scan("hps_et.m.a", 100))
def statuses():
    for _ in range(5):
        child = os.fork()
        if not child:
            print("child")
            sys.exit(7)  # with all that an exiting interpreter destroys
        yield os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
thread = threading.Thread(target=work)
thread.start()
found = list(statuses())
ended.set()
thread.join()
tier.close()
del tier
print(*found, *statuses())
"""


def test_a_forked_child_exits_as_any_other(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path / "database")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert (done.returncode, done.stdout.split()) == (0, 10 * ["child"] + 10 * ["7"]), done.stderr


def test_a_deadline_ends_a_fetch_between_batches(
    rocks: Callable[..., RocksTier], monkeypatch: pytest.MonkeyPatch
) -> None:  # D07
    tier, clock = rocks(max_batch_size=2), iter([0.0, 1.0, 2.0])
    tier.insert(TAG, np.arange(9), rows_of(range(9), DIM))
    here, real = threading.get_ident(), time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) if threading.get_ident() == here else real())
    rows = np.full((9, DIM), np.nan, np.float32)
    answer = tier.fetch(TAG, np.arange(9), rows, deadline=1.5)
    monkeypatch.undo()
    assert (answer.asked, answer.found.tolist()) == (4, [True] * 4 + [False] * 5)
