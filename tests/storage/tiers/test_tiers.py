"""The contract of a storage tier, run over every tier of the package, one of a test's own, and the wrappers around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import DictTier
from support.oracles import assert_same_bits, rows_of
from support.tiers import DIM, IN_MEMORY, OTHER, PACKAGE, TAG, content_of, fetch, ints

from hps_numba import plugins
from hps_numba.config import PersistentDatabaseConfig, VolatileDatabaseConfig
from hps_numba.errors import TierError
from hps_numba.storage.tiers._tier import NO_LIMIT, Tier
from hps_numba.storage.tiers._wrappers import CountingTier, FlakyTier, SlowTier, WrapperTier
from hps_numba.storage.tiers.hash_map import HashMapTier

Make = Callable[..., Tier]


def section_for(kind: type[Tier], folder: Path, **options: Any) -> Any:
    if kind.persistent:
        return PersistentDatabaseConfig(path=str(folder / "database"), **options)
    return VolatileDatabaseConfig(**options)


def make_wrapped(wrap: Callable[[Tier], Tier]) -> Callable[..., Tier]:
    return lambda section, wide_keys=True: wrap(HashMapTier(section, wide_keys=wide_keys))


CANDIDATES: dict[str, Any] = {
    **{name: plugins.load(PACKAGE, name) for name in plugins.names(PACKAGE)},
    "a dict": DictTier,
    "WrapperTier": make_wrapped(WrapperTier),
    "CountingTier": make_wrapped(CountingTier),
    "SlowTier": make_wrapped(lambda inner: SlowTier(inner, 0.0)),
    "FlakyTier": make_wrapped(lambda inner: FlakyTier(inner, set())),
}


@pytest.fixture(params=CANDIDATES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    candidate = CANDIDATES[request.param]
    made: list[Tier] = []

    def one(*, wide_keys: bool = True, **options: Any) -> Tier:
        kind = candidate if isinstance(candidate, type) else HashMapTier
        options = {"max_batch_size": 4, **options}
        made.append(candidate(section_for(kind, tmp_path, **options), wide_keys=wide_keys))
        return made[-1]

    yield one
    for tier in made:
        tier.close()


def test_every_file_of_the_folder_is_tested() -> None:  # D05, D09
    files = {path.stem for path in Path(plugins.__file__).parent.glob("storage/tiers/*.py") if not path.stem.startswith("_")}
    assert files == set(plugins.names(PACKAGE))
    assert files >= set(IN_MEMORY)
    assert all(issubclass(CANDIDATES[name], Tier) for name in files)


# --- the contract -----------------------------------------------------------------------------------------------------


def test_an_unknown_table_has_nothing(make: Make) -> None:  # D05
    tier = make()
    answer, rows = fetch(tier, TAG, ints(1, 2))
    assert (answer.found.tolist(), answer.asked) == ([False, False], 2)
    assert np.isnan(rows).all()
    assert tier.contains(TAG, ints(1)).tolist() == [False]
    assert (tier.size(TAG), tier.erase(TAG, ints(1)), tier.erase(TAG)) == (0, 0, 0)
    assert (tier.tables(), tier.find_tables("m"), list(tier.scan(TAG))) == ([], [], [])


def test_insert_and_fetch_in_any_order_with_duplicates(make: Make) -> None:  # D05, D09
    tier = make()
    keys = ints(*range(10))
    assert tier.insert(TAG, keys, rows_of(keys, DIM)) == 10
    wanted = ints(9, 0, 77, 9, -1, 3, 3)
    answer, rows = fetch(tier, TAG, wanted)
    assert answer.found.tolist() == [True, True, False, True, False, True, True]
    assert answer.asked == 7
    assert_same_bits(rows[answer.found], rows_of(wanted[answer.found], DIM))
    assert np.isnan(rows[~answer.found]).all()
    assert tier.contains(TAG, wanted).tolist() == answer.found.tolist()
    assert tier.size(TAG) == 10


def test_insert_is_an_upsert_and_the_last_of_equal_keys_wins(make: Make) -> None:  # D06
    tier = make()
    tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    keys = ints(2, 3, 3)
    assert tier.insert(TAG, keys, np.concatenate([rows_of([2, 3], DIM, 1), rows_of([3], DIM, 2)])) == 1
    _, rows = fetch(tier, TAG, ints(1, 2, 3))
    assert_same_bits(rows, np.concatenate([rows_of([1], DIM), rows_of([2], DIM, 1), rows_of([3], DIM, 2)]))
    assert tier.size(TAG) == 3


def test_no_keys_is_fine(make: Make) -> None:  # D05
    tier = make()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    assert tier.insert(TAG, ints(), np.empty((0, DIM), np.float32)) == 0
    answer, _ = fetch(tier, TAG, ints())
    assert (len(answer.found), answer.asked, tier.erase(TAG, ints()), len(tier.contains(TAG, ints()))) == (0, 0, 0, 0)


def test_strided_rows_and_keys(make: Make) -> None:  # D06
    tier = make()
    keys = np.arange(12, dtype=np.int64)[::2]
    wide = rows_of(np.arange(6), 2 * DIM)
    assert tier.insert(TAG, keys, wide[:, ::2]) == 6
    target = np.full((12, 2 * DIM), np.nan, np.float32)
    assert tier.fetch(TAG, keys[::-1], target[::2, 1::2]).found.all()
    assert_same_bits(target[::2, 1::2], wide[::-1, ::2])
    assert np.isnan(target[1::2]).all()
    assert np.isnan(target[:, ::2]).all()


def test_rows_are_opaque_bits(make: Make) -> None:  # D06
    tier = make()
    patterns = np.array([[0x7FC00001, 0xFFC12345, 0x7F800001], [0x80000000, 1, 0xFFFFFFFF]], np.uint32).view(np.float32)
    tier.insert(TAG, ints(1, 2), patterns)
    _, rows = fetch(tier, TAG, ints(1, 2))
    assert_same_bits(rows, patterns)


def test_a_table_has_one_width(make: Make) -> None:  # D06
    tier = make()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    with pytest.raises(TierError, match="width"):
        tier.insert(TAG, ints(2), rows_of([2], DIM + 1))
    tier.insert(OTHER, ints(2), rows_of([2], DIM + 1))
    assert tier.size(TAG) == 1
    _, rows = fetch(tier, OTHER, ints(2), DIM + 1)
    assert_same_bits(rows, rows_of([2], DIM + 1))


def test_nothing_of_the_callers_memory_is_kept(make: Make) -> None:  # D06
    tier = make()
    keys, rows = ints(1, 2), rows_of([1, 2], DIM)
    tier.insert(TAG, keys, rows)
    keys[:], rows[:] = 9, 0
    _, got = fetch(tier, TAG, ints(1, 2))
    assert_same_bits(got, rows_of([1, 2], DIM))
    got[:] = 0
    assert_same_bits(fetch(tier, TAG, ints(1, 2))[1], rows_of([1, 2], DIM))


def test_erase_keys_and_whole_tables(make: Make) -> None:  # D05
    tier = make()
    for tag in (TAG, OTHER):
        tier.insert(tag, ints(*range(6)), rows_of(range(6), DIM))
    assert tier.erase(TAG, ints(5, 9, 1, 5)) == 2
    assert fetch(tier, TAG, ints(*range(6)))[0].found.tolist() == [True, False, True, True, True, False]
    assert tier.erase(TAG) == 4
    assert (tier.size(TAG), tier.size(OTHER)) == (0, 6)
    assert tier.insert(TAG, ints(1), rows_of([1], DIM)) == 1


def test_tables_of_a_model_are_found_by_its_whole_name(make: Make) -> None:  # D05
    tier = make()
    tags = ["hps_et.m.a", "hps_et.m.b", "hps_et.mm.a", "hps_et.m-1.a"]
    for tag in tags:
        tier.insert(tag, ints(1), rows_of([1], DIM))
    assert tier.tables() == sorted(tags)
    assert tier.find_tables("m") == tags[:2]
    assert tier.find_tables("mm") == tags[2:3]
    assert tier.find_tables("hps_et") == []


def test_scan_gives_each_row_once(make: Make) -> None:  # D05
    tier = make()
    keys = ints(*range(9))
    tier.insert(TAG, keys, rows_of(keys, DIM))
    tier.insert(TAG, ints(4), rows_of([4], DIM, 1))
    tier.erase(TAG, ints(0))
    wanted = {key: rows_of([key], DIM, 1 if key == 4 else 0)[0].tobytes() for key in range(1, 9)}
    for chunk_rows in (1, 2, 100):
        assert content_of(tier, TAG, chunk_rows) == wanted


@pytest.mark.parametrize("wide", [True, False])
def test_dump_and_load(make: Make, tmp_path: Path, wide: bool) -> None:  # D05, N06
    keys = ints(-(2**63), -1, 0, 2**63 - 1, 5, 6, 7) if wide else ints(0, 2**31, 2**32 - 1, 5, 6, 7)
    tier, path = make(wide_keys=wide), tmp_path / "table.bin"
    tier.insert(TAG, keys, rows_of(keys, DIM))
    assert tier.dump(TAG, path) == len(keys)
    assert path.stat().st_size == 16 + len(keys) * ((8 if wide else 4) + 4 * DIM)
    assert tier.load_dump(OTHER, path) == len(keys)
    assert content_of(tier, OTHER) == content_of(tier, TAG)


def test_dump_of_nothing_loads_nothing(make: Make, tmp_path: Path) -> None:  # D05
    tier = make()
    assert (tier.dump(TAG, tmp_path / "x.bin"), tier.load_dump(TAG, tmp_path / "x.bin"), tier.size(TAG)) == (0, 0, 0)


def test_dumps_of_another_kind_are_refused(make: Make, tmp_path: Path) -> None:  # D05
    tier, narrow = make(), make(wide_keys=False)
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    tier.dump(TAG, tmp_path / "wide.bin")
    with pytest.raises(TierError, match="keys of 8 bytes, wanted 4"):
        narrow.load_dump(TAG, tmp_path / "wide.bin")
    for call in (tier.dump, tier.load_dump):
        with pytest.raises(TierError, match=r"table\.sst: a dump is a \.bin file"):
            call(TAG, tmp_path / "table.sst")


def test_a_deadline_that_has_passed_asks_for_nothing(make: Make) -> None:  # D07
    tier = make()
    tier.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
    rows = np.full((9, DIM), np.nan, np.float32)
    answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=time.monotonic() - 1)
    assert (answer.found.any(), answer.asked, np.isnan(rows).all()) == (False, 0, True)
    answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=time.monotonic() + 3600)
    assert (answer.found.all(), answer.asked) == (True, 9)


def test_capacity_is_margin_times_partitions_or_none(make: Make) -> None:  # D05
    tier = make()
    if tier.persistent or isinstance(tier, DictTier):
        assert tier.capacity(TAG) == NO_LIMIT
        return
    assert tier.capacity(TAG) == NO_LIMIT
    assert make(overflow_margin=5, num_partitions=3).capacity(TAG) == 15
    assert make(overflow_margin=2**63, num_partitions=4).capacity(TAG) == NO_LIMIT


def test_all_keys_are_legal(make: Make) -> None:  # promise 3
    tier = make()
    keys = ints(0, -1, 1, -(2**63), 2**63 - 1, 2**32 - 1, 2**32)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    answer, rows = fetch(tier, TAG, keys)
    assert answer.found.all()
    assert_same_bits(rows, rows_of(keys, DIM))


def test_closing_twice_is_fine(make: Make) -> None:
    tier = make()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    tier.close()
    tier.close()


# --- the wrappers -----------------------------------------------------------------------------------------------------


def held(inner: Tier) -> Tier:
    inner.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
    return inner


def test_counting_tier_counts_calls_and_keys() -> None:
    tier = CountingTier(held(DictTier(VolatileDatabaseConfig())))
    fetch(tier, TAG, ints(1, 2, 99))
    fetch(tier, TAG, ints(1))
    tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
    tier.contains(TAG, ints(1))
    tier.erase(TAG, ints(4, 5))
    tier.erase(TAG)
    assert tier.calls == {"fetch": 2, "insert": 1, "contains": 1, "erase": 2}
    assert tier.keys == {"fetch": 4, "insert": 2, "contains": 1, "erase": 2}


def test_slow_tier_stops_between_batches(monkeypatch: pytest.MonkeyPatch) -> None:  # D07
    tier = SlowTier(held(DictTier(VolatileDatabaseConfig(max_batch_size=2))), 10.0)
    clock = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    rows = np.full((9, DIM), np.nan, np.float32)
    answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=25.0)  # batches begin at 0, 10 and 20
    assert (answer.asked, answer.found.tolist()) == (6, [True] * 6 + [False] * 3)
    assert_same_bits(rows[:6], rows_of(range(6), DIM))
    assert np.isnan(rows[6:]).all()


def test_flaky_tier_fails_where_told_to() -> None:
    tier = FlakyTier(held(DictTier(VolatileDatabaseConfig())), {"fetch"})
    with pytest.raises(TierError, match="fetch: failed on purpose"):
        fetch(tier, TAG, ints(1))
    assert tier.insert(TAG, ints(50), rows_of([50], DIM)) == 1
    tier.fail_on.clear()
    assert fetch(tier, TAG, ints(1, 50))[0].found.all()
