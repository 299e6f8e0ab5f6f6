"""What every storage tier has to do (``hps_numba.storage.Tier``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from hps_numba.errors import TierError
from hps_numba.storage.tiers._tier import Fetched, Tier
from hps_numba.testing._rows import assert_same_bits, ints, rows_of

__all__ = ["MakeTier", "TierContract"]

TAG, OTHER = "hps_et.m.a", "hps_et.m.b"
DIM = 3
MakeTier = Callable[..., Tier]


def fetch(tier: Tier, table: str, keys: np.ndarray, dim: int = DIM) -> tuple[Fetched, np.ndarray]:
    """The answer of the tier and the rows that it wrote, NaN elsewhere."""
    rows = np.full((len(keys), dim), np.nan, np.float32)
    return tier.fetch(table, keys, rows), rows


def content_of(tier: Tier, table: str, chunk_rows: int = 2) -> dict[int, bytes]:
    """Key -> bytes of the row, as a scan gives them."""
    pairs = [
        (int(key), row.tobytes()) for keys, rows in tier.scan(table, chunk_rows) for key, row in zip(keys, rows, strict=True)
    ]
    assert len(dict(pairs)) == len(pairs), "scan: expected each key once"
    return dict(pairs)


class TierContract:
    """Subclass it, set ``tier`` to the class under test and, if it has options that it needs, override ``options``.

    Or override the fixture ``make_tier``: ``make_tier(wide_keys=True, **keys)`` opens an empty tier; ``keys`` are those of its
    section in the config, such as ``max_batch_size``. Tiers are closed at the end of a test.
    """

    tier: ClassVar[type[Tier]]

    def options(self, folder: Path) -> Mapping[str, Any]:
        """Keys of the tier's section in the config; ``folder`` is an empty one for this test."""
        return {}

    @pytest.fixture
    def make_tier(self, tmp_path: Path) -> Iterator[MakeTier]:
        made: list[Tier] = []

        def make(*, wide_keys: bool = True, **keys: Any) -> Tier:
            given = {"max_batch_size": 4, **self.options(tmp_path), **keys}
            made.append(self.tier.from_options(wide_keys=wide_keys, **given))
            return made[-1]

        yield make
        for tier in made:
            tier.close()

    def test_an_unknown_table_has_nothing(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        answer, rows = fetch(tier, TAG, ints(1, 2))
        assert (answer.found.tolist(), answer.asked) == ([False, False], 2)
        assert np.isnan(rows).all()
        assert tier.contains(TAG, ints(1)).tolist() == [False]
        assert (tier.size(TAG), tier.erase(TAG, ints(1)), tier.erase(TAG)) == (0, 0, 0)
        assert (tier.tables(), tier.find_tables("m"), list(tier.scan(TAG))) == ([], [], [])

    def test_insert_and_fetch_in_any_order_with_duplicates(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        keys = ints(*range(10))
        assert tier.insert(TAG, keys, rows_of(keys, DIM)) == 10
        expected = ints(9, 0, 77, 9, -1, 3, 3)
        answer, rows = fetch(tier, TAG, expected)
        assert answer.found.tolist() == [True, True, False, True, False, True, True]
        assert answer.asked == 7
        assert_same_bits(rows[answer.found], rows_of(expected[answer.found], DIM))
        assert np.isnan(rows[~answer.found]).all()
        assert tier.contains(TAG, expected).tolist() == answer.found.tolist()
        assert tier.size(TAG) == 10

    def test_insert_is_an_upsert_and_the_last_of_equal_keys_wins(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM))
        keys = ints(2, 3, 3)
        assert tier.insert(TAG, keys, np.concatenate([rows_of([2, 3], DIM, 1), rows_of([3], DIM, 2)])) == 1
        _, rows = fetch(tier, TAG, ints(1, 2, 3))
        assert_same_bits(rows, np.concatenate([rows_of([1], DIM), rows_of([2], DIM, 1), rows_of([3], DIM, 2)]))
        assert tier.size(TAG) == 3

    def test_no_keys_is_fine(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tier.insert(TAG, ints(1), rows_of([1], DIM))
        assert tier.insert(TAG, ints(), np.empty((0, DIM), np.float32)) == 0
        answer, _ = fetch(tier, TAG, ints())
        assert (len(answer.found), answer.asked, tier.erase(TAG, ints()), len(tier.contains(TAG, ints()))) == (0, 0, 0, 0)

    def test_strided_rows_and_keys(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        keys = np.arange(12, dtype=np.int64)[::2]
        wide = rows_of(np.arange(6), 2 * DIM)
        assert tier.insert(TAG, keys, wide[:, ::2]) == 6
        target = np.full((12, 2 * DIM), np.nan, np.float32)
        assert tier.fetch(TAG, keys[::-1], target[::2, 1::2]).found.all()
        assert_same_bits(target[::2, 1::2], wide[::-1, ::2])
        assert np.isnan(target[1::2]).all()
        assert np.isnan(target[:, ::2]).all()

    def test_one_row_of_a_wider_array(self, make_tier: MakeTier) -> None:
        """NumPy calls such a view contiguous, though its stride is not the width of its row."""
        tier = make_tier()
        wide = rows_of([1, 2], 4 * DIM)
        assert tier.insert(TAG, ints(7), wide[:1, :DIM]) == 1
        assert tier.insert(TAG, ints(8), wide[1:, DIM : 2 * DIM]) == 1
        assert content_of(tier, TAG) == {7: wide[0, :DIM].tobytes(), 8: wide[1, DIM : 2 * DIM].tobytes()}
        target = np.full((2, 4 * DIM), np.nan, np.float32)
        assert tier.fetch(TAG, ints(7), target[1:, DIM : 2 * DIM]).found.tolist() == [True]
        assert_same_bits(target[1, DIM : 2 * DIM], wide[0, :DIM])
        assert np.isnan(target).sum() == 7 * DIM, "nothing else was written"

    def test_rows_are_opaque_bits(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        patterns = np.array([[0x7FC00001, 0xFFC12345, 0x7F800001], [0x80000000, 1, 0xFFFFFFFF]], np.uint32).view(np.float32)
        tier.insert(TAG, ints(1, 2), patterns)
        _, rows = fetch(tier, TAG, ints(1, 2))
        assert_same_bits(rows, patterns)

    def test_a_table_has_one_width(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tier.insert(TAG, ints(1), rows_of([1], DIM))
        with pytest.raises(TierError, match="width"):
            tier.insert(TAG, ints(2), rows_of([2], DIM + 1))
        tier.insert(OTHER, ints(2), rows_of([2], DIM + 1))
        assert tier.size(TAG) == 1
        _, rows = fetch(tier, OTHER, ints(2), DIM + 1)
        assert_same_bits(rows, rows_of([2], DIM + 1))

    def test_keys_and_rows_are_copied(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        keys, rows = ints(1, 2), rows_of([1, 2], DIM)
        tier.insert(TAG, keys, rows)
        keys[:], rows[:] = 9, 0
        _, got = fetch(tier, TAG, ints(1, 2))
        assert_same_bits(got, rows_of([1, 2], DIM))
        got[:] = 0
        assert_same_bits(fetch(tier, TAG, ints(1, 2))[1], rows_of([1, 2], DIM))

    def test_erase_keys_and_whole_tables(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        for tag in (TAG, OTHER):
            tier.insert(tag, ints(*range(6)), rows_of(range(6), DIM))
        assert tier.erase(TAG, ints(5, 9, 1, 5)) == 2
        assert fetch(tier, TAG, ints(*range(6)))[0].found.tolist() == [True, False, True, True, True, False]
        assert tier.erase(TAG) == 4
        assert (tier.size(TAG), tier.size(OTHER)) == (0, 6)
        assert tier.insert(TAG, ints(1), rows_of([1], DIM)) == 1

    def test_tables_of_a_model_are_found_by_its_whole_name(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tags = ["hps_et.m.a", "hps_et.m.b", "hps_et.mm.a", "hps_et.m-1.a"]
        for tag in tags:
            tier.insert(tag, ints(1), rows_of([1], DIM))
        assert tier.tables() == sorted(tags)
        assert tier.find_tables("m") == tags[:2]
        assert tier.find_tables("mm") == tags[2:3]
        assert tier.find_tables("hps_et") == []

    def test_scan_gives_each_row_once(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        keys = ints(*range(9))
        tier.insert(TAG, keys, rows_of(keys, DIM))
        tier.insert(TAG, ints(4), rows_of([4], DIM, 1))
        tier.erase(TAG, ints(0))
        expected = {key: rows_of([key], DIM, 1 if key == 4 else 0)[0].tobytes() for key in range(1, 9)}
        for chunk_rows in (1, 2, 100):
            assert content_of(tier, TAG, chunk_rows) == expected

    @pytest.mark.parametrize("wide", [True, False])
    def test_dump_and_load(self, make_tier: MakeTier, tmp_path: Path, wide: bool) -> None:
        keys = ints(-(2**63), -1, 0, 2**63 - 1, 5, 6, 7) if wide else ints(0, 2**31, 2**32 - 1, 5, 6, 7)
        tier, path = make_tier(wide_keys=wide), tmp_path / "table.bin"
        tier.insert(TAG, keys, rows_of(keys, DIM))
        assert tier.dump(TAG, path) == len(keys)
        assert path.stat().st_size == 16 + len(keys) * ((8 if wide else 4) + 4 * DIM)
        assert tier.load_dump(OTHER, path) == len(keys)
        assert content_of(tier, OTHER) == content_of(tier, TAG)

    @pytest.mark.parametrize("wide", [True, False])
    def test_dump_and_load_of_a_sorted_file(self, make_tier: MakeTier, tmp_path: Path, wide: bool) -> None:
        pytest.importorskip("rocksdict")
        keys = ints(1, 256, 0, 255, 65536, *((-1, 2**63 - 1, -(2**63)) if wide else (2**32 - 1,)))
        tier, path = make_tier(wide_keys=wide), tmp_path / "table.sst"
        tier.insert(TAG, keys, rows_of(keys, DIM))
        assert tier.dump(TAG, path) == len(keys)
        assert tier.load_dump(OTHER, path) == len(keys)
        assert content_of(tier, OTHER) == content_of(tier, TAG)

    def test_dump_of_nothing_loads_nothing(self, make_tier: MakeTier, tmp_path: Path) -> None:
        tier = make_tier()
        assert (tier.dump(TAG, tmp_path / "x.bin"), tier.load_dump(TAG, tmp_path / "x.bin"), tier.size(TAG)) == (0, 0, 0)

    def test_dumps_of_another_kind_are_refused(self, make_tier: MakeTier, tmp_path: Path) -> None:
        tier, narrow = make_tier(), make_tier(wide_keys=False)
        tier.insert(TAG, ints(1), rows_of([1], DIM))
        tier.dump(TAG, tmp_path / "wide.bin")
        with pytest.raises(TierError, match=r"expected keys of 4 bytes .*, got 8"):
            narrow.load_dump(TAG, tmp_path / "wide.bin")
        for call in (tier.dump, tier.load_dump):
            with pytest.raises(TierError, match=r"table\.csv: expected a \.bin or \.sst file"):
                call(TAG, tmp_path / "table.csv")

    def test_a_deadline_that_has_passed_asks_for_nothing(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tier.insert(TAG, ints(*range(9)), rows_of(range(9), DIM))
        rows = np.full((9, DIM), np.nan, np.float32)
        answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=time.monotonic() - 1)
        assert (answer.found.any(), answer.asked, np.isnan(rows).all()) == (False, 0, True)
        answer = tier.fetch(TAG, ints(*range(9)), rows, deadline=time.monotonic() + 3600)
        assert (answer.found.all(), answer.asked) == (True, 9)

    def test_all_keys_are_legal(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        keys = ints(0, -1, 1, -(2**63), 2**63 - 1, 2**32 - 1, 2**32)
        tier.insert(TAG, keys, rows_of(keys, DIM))
        answer, rows = fetch(tier, TAG, keys)
        assert answer.found.all()
        assert_same_bits(rows, rows_of(keys, DIM))

    def test_closing_twice_is_fine(self, make_tier: MakeTier) -> None:
        tier = make_tier()
        tier.insert(TAG, ints(1), rows_of([1], DIM))
        tier.close()
        tier.close()
