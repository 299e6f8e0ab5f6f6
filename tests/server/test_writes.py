"""Writes to a server: what they change in every tier, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.internals import served_table, slower_tier
from support.oracles import EXTREME_32, NaiveServer, assert_same_bits, rows_of

import hps_numba
from hps_numba import ArrayError, TierError, TierUnavailable
from hps_numba.errors import CapacityError
from hps_numba.storage.host.store import HostStore

DIM = 3
KEYS = list(range(9))
NO_VOLATILE = {"type": "disabled"}
DICT_TIER = {"type": "support.fakes:DictTier"}
ROW_DTYPES_REFUSED = ["complex64", "U1", "M8[s]"]


@pytest.mark.parametrize("persistent", ["support.fakes:DictTier", "disabled"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_writes_equal_dicts(workshop: Workshop, seed: int, persistent: str) -> None:  # N05, N06
    server = workshop.open(workshop.model((KEYS, DIM)), persistent_db={"type": persistent})
    truth = NaiveServer(DIM, -7.5, places=1 if persistent == "disabled" else 2)
    truth.insert(KEYS, rows_of(KEYS, DIM))
    rng = np.random.default_rng(seed)
    for step in range(60):
        keys = rng.integers(-3, 15, rng.integers(0, 7))
        rows = rows_of(keys, DIM, step % 7)
        call = rng.integers(4)
        if call == 0:
            assert server.insert(keys, rows, "m", 0) == truth.insert(keys, rows)
        elif call == 1:
            assert server.update(keys, rows, "m", 0) == truth.update(keys, rows)
        elif call == 2:
            assert server.erase(keys, "m", 0) == truth.erase(keys)
        every = np.arange(-4, 16)
        assert_same_bits(server.lookup(every, "m", 0), truth.lookup(every))
        assert server.contains(every, "m", 0).tolist() == [int(key) in truth.places[0].rows for key in every]


def test_default_rows_are_not_kept_as_rows(workshop: Workshop) -> None:  # promise 4
    server = workshop.open(
        workshop.model((KEYS, DIM)),
        volatile_db={"type": "hash_map", "cache_missed_embeddings": True},
        persistent_db=DICT_TIER,
    )
    assert (server.lookup([50, 51], "m", 0) == -7.5).all()
    assert server.stats()["m"]["sparse_embedding0"].rows == 9
    server.insert([50], rows_of([50], DIM), "m", 0)
    slower_tier(server).insert("hps_et.m.sparse_embedding0", np.array([51]), rows_of([51], DIM))
    assert_same_bits(server.lookup([50, 51], "m", 0), rows_of([50, 51], DIM))


def test_rows_are_stored_bit_for_bit(workshop: Workshop) -> None:  # promise 1
    server = workshop.open(workshop.model((KEYS, 4)))
    rows = np.array([[0x7FC00001, 0xFF800001, 0x80000000, 0x00000001]], np.uint32).view(np.float32)
    server.insert([3], rows, "m", 0)
    assert_same_bits(server.lookup([3], "m", 0), rows)


def test_writes_refuse_rows_of_wrong_shape_or_dtype(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    for write in (server.insert, server.update):
        for shape in [(2, DIM + 1), (1, DIM), (2 * DIM,), (2, 1, DIM)]:
            with pytest.raises(ArrayError, match=rf"rows: expected shape \(2, {DIM}\), got "):
                write([0, 1], np.zeros(shape, np.float32), "m", 0)
        for dtype in ROW_DTYPES_REFUSED:
            with pytest.raises(ArrayError, match="rows: expected dtype float32, got "):
                write([0, 1], np.zeros((2, DIM), dtype), "m", 0)
    assert_same_bits(server.lookup(KEYS, "m", 0), rows_of(KEYS, DIM))


def test_writes_take_strided_rows_and_other_floats(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)))
    wide = rows_of([[0, 1], [2, 3]], 2 * DIM, 1)
    server.insert([[0, 1], [2, 3]], wide[..., ::2], "m", 0)
    assert_same_bits(server.lookup([[0, 1], [2, 3]], "m", 0), np.ascontiguousarray(wide[..., ::2]))
    server.update([4], [[1.0, 2.0, 3.0]], "m", 0)
    server.update([5], rows_of([5], DIM, 2).astype(np.float16), "m", 0)
    assert server.lookup([4], "m", 0).tolist() == [[1.0, 2.0, 3.0]]


def test_a_dump_round_trips(workshop: Workshop, tmp_path: Path) -> None:  # N06
    server = workshop.open(workshop.model((KEYS, DIM), (KEYS, 5)))
    server.insert([100], rows_of([100], DIM), "m", 0)
    path = tmp_path / "table.bin"
    assert server.dump(path, "m", 0) == 10
    server.erase([*KEYS, 100], "m", 0)
    server.insert([0], rows_of([0], DIM, 3), "m", 0)
    assert server.load_dump(path, "m", 0) == 10
    assert_same_bits(server.lookup([*KEYS, 100], "m", 0), rows_of([*KEYS, 100], DIM))
    with pytest.raises(hps_numba.HpsError, match=r"expected rows of width 5 for table .*, got 3"):
        server.load_dump(path, "m", 1)
    assert_same_bits(server.lookup(KEYS, "m", 1), rows_of(KEYS, 5))


def test_a_loaded_dump_reaches_every_tier(workshop: Workshop, tmp_path: Path) -> None:  # N06
    server = workshop.open(workshop.model((KEYS, DIM)), persistent_db=DICT_TIER)
    path = tmp_path / "table.bin"
    server.insert([0, 100], rows_of([0, 100], DIM, 2), "m", 0)
    server.dump(path, "m", 0)
    server.insert([0], rows_of([0], DIM), "m", 0)
    server.erase([100], "m", 0)
    server.load_dump(path, "m", 0)
    rows = np.zeros((2, DIM), np.float32)
    assert slower_tier(server).fetch("hps_et.m.sparse_embedding0", np.array([0, 100]), rows).found.all()
    assert_same_bits(rows, rows_of([0, 100], DIM, 2))


def test_a_32_bit_dump_round_trips_and_does_not_fit_a_64_bit_server(workshop: Workshop, tmp_path: Path) -> None:  # N06
    narrow = workshop.open(workshop.model((EXTREME_32, DIM)), supportlonglong=False)
    path = tmp_path / "table.bin"
    narrow.dump(path, "m", 0)
    narrow.erase(np.array(EXTREME_32), "m", 0)
    assert narrow.load_dump(path, "m", 0) == len(EXTREME_32)
    assert_same_bits(narrow.lookup(np.array(EXTREME_32), "m", 0), rows_of(EXTREME_32, DIM))
    wide = workshop.open(workshop.model((KEYS, DIM)))
    with pytest.raises(hps_numba.HpsError, match=r"expected keys of 8 bytes .*, got 4"):
        wide.load_dump(path, "m", 0)


def test_a_dump_needs_a_suffix_that_says_its_form(workshop: Workshop, tmp_path: Path) -> None:  # N06
    server = workshop.open(workshop.model((KEYS, DIM)))
    with pytest.raises(hps_numba.TierError, match=r"table\.txt: expected a \.bin or \.sst file"):
        server.dump(tmp_path / "table.txt", "m", 0)


def test_writes_without_any_database_are_refused(workshop: Workshop, tmp_path: Path) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)), volatile_db=NO_VOLATILE)
    with pytest.raises(TierUnavailable, match="no volatile_db and no persistent_db"):
        server.insert([1], rows_of([1], DIM), "m", 0)
    with pytest.raises(TierUnavailable, match="no volatile_db and no persistent_db"):
        server.dump(tmp_path / "table.bin", "m", 0)
    assert (server.update([1], rows_of([1], DIM), "m", 0), server.erase([1], "m", 0)) == (0, 0)


def test_an_insert_into_read_only_tiers_is_refused(workshop: Workshop) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)), volatile_db=NO_VOLATILE, persistent_db={**DICT_TIER, "read_only": True})
    assert slower_tier(server).size("hps_et.m.sparse_embedding0") == 0
    with pytest.raises(hps_numba.TierError, match="read"):
        server.insert([1], rows_of([1], DIM), "m", 0)


def test_writes_that_a_read_only_tier_would_undo_are_refused(workshop: Workshop) -> None:
    """The tier would serve the old row: an erase or update that leaves it there must not succeed."""
    persistent = {"type": "support.fakes:DictTier"}
    entry = workshop.model((range(10), 4))
    server = workshop.open(entry, volatile_db={"type": "hash_map"}, persistent_db=persistent)
    tier = slower_tier(server)
    tier.section = tier.section.model_copy(update={"read_only": True})
    row = np.ones((1, 4), np.float32)
    with pytest.raises(TierError, match="erase: key 3 is in DictTier, which is read only"):
        server.erase([3], "m", 0)
    assert server.contains([3], "m", 0)[0]
    assert server.update([3], row, "m", 0) == 1  # host memory has it and is faster
    assert np.array_equal(server.lookup([3], "m", 0), row)
    store = served_table(server).store
    assert store is not None
    store.erase(np.array([3]))
    with pytest.raises(TierError, match="update: key 3"):
        server.update([3], row, "m", 0)
    assert server.erase([77], "m", 0) == 0


def test_bounded_host_memory_may_not_shadow_rows_of_a_read_only_tier(workshop: Workshop) -> None:
    """Host memory might evict the new row, and the old one would show again."""
    bounded = {**COLD, "overflow_margin": 10, "num_partitions": 1, "max_batch_size": 8}
    server = workshop.open(workshop.model((range(50), DIM)), volatile_db=bounded, persistent_db=DICT_TIER)
    tier = slower_tier(server)
    tier.section = tier.section.model_copy(update={"read_only": True})
    with pytest.raises(TierError, match="insert: key 1 is in DictTier, which is read only"):
        server.insert([100, 1], rows_of([100, 1], DIM, 3), "m", 0)
    assert not server.contains([100], "m", 0)[0]
    store = served_table(server).store
    assert store is not None
    store.upsert(np.array([2]), rows_of([2], DIM))
    with pytest.raises(TierError, match="update: key 2 is in DictTier, which is read only"):
        server.update([2], rows_of([2], DIM, 3), "m", 0)
    assert server.insert(np.arange(100, 140), rows_of(range(100, 140), DIM), "m", 0) == 40
    assert_same_bits(server.lookup([1, 2], "m", 0), rows_of([1, 2], DIM))


@pytest.mark.parametrize("persistent", ["support.fakes:DictTier", "disabled"])
@pytest.mark.parametrize("call", ["insert", "update"])
def test_host_memory_without_room_serves_no_row_older_than_slower_tiers(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, call: str, persistent: str
) -> None:
    server = workshop.open(workshop.model((KEYS, DIM)), persistent_db={"type": persistent})
    store = served_table(server).store
    assert store is not None
    store.upsert(np.array([20]), rows_of([20], DIM))  # in no other tier

    def full(*args: object) -> int:
        raise CapacityError("full")

    with monkeypatch.context() as machine:
        machine.setattr(HostStore, "upsert", full)
        machine.setattr(HostStore, "update", full)
        with pytest.raises(CapacityError, match="full"):
            getattr(server, call)([1, 20], rows_of([1, 20], DIM, 3), "m", 0)
    slower = persistent != "disabled"
    assert_same_bits(server.lookup([1], "m", 0), rows_of([1], DIM, 3 if slower else 0))
    assert_same_bits(server.lookup([20], "m", 0), rows_of([20], DIM, 3 if slower and call == "insert" else 0))
    assert_same_bits(server.lookup([2], "m", 0), rows_of([2], DIM))
