"""``hps-numba load``: every row of a model reaches every tier that keeps it, whatever happens in between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.oracles import rows_of
from support.tier_commands import DIM, TAG, TierFolder

from hps_numba.storage import loading
from hps_numba.storage.bin_dump import write_bin

KEYS = [5, -1, 2**40, *range(100, 200), 5]


@pytest.fixture
def tiers(tmp_path: Path) -> TierFolder:
    folder = TierFolder(tmp_path)
    folder.model("a.model", KEYS)
    folder.write(folder.tier("fast"), folder.tier("slow", initial_cache_rate=0.1))
    return folder


def assert_loaded(tiers: TierFolder, file: str, tag: str = TAG) -> None:
    content = tiers.content(tag, file)
    assert content.keys() == set(KEYS)
    for key, row in content.items():
        np.testing.assert_array_equal(row, rows_of(np.array([key]), DIM)[0])


def test_every_tier_that_others_see_is_filled_slowest_first(tiers: TierFolder) -> None:
    report = tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)
    slow, fast, memory = report["tiers"]
    assert (slow["tier"], fast["tier"]) == ("tiers[2]", "tiers[1]")
    assert (report["table"], slow["dim"], slow["rows"], slow["new"], slow["size"]) == (TAG, 3, 104, 103, 103)
    assert "only as long as their process" in memory["skipped"]
    for file in ("fast", "slow"):
        assert_loaded(tiers, file)


@pytest.mark.parametrize("name", ["1", "tiers[1]"])
def test_one_tier_by_number_or_place(tiers: TierFolder, name: str) -> None:
    result = tiers.run("load", tiers.folder / "a.model", "--into", f"{tiers.config}:{name}")
    assert result.exit_code == 0 and f"tiers[1]: {TAG}: 104 rows x 3 written, 103 of them new" in result.stdout
    assert "has 103 rows now" in result.stdout
    assert_loaded(tiers, "fast")
    assert not (tiers.folder / "slow").exists()


def test_a_type_with_a_colon_names_every_tier_of_it(tiers: TierFolder) -> None:
    report = tiers.parsed("load", tiers.folder / "a.model", "--into", f"{tiers.config}:support.disk_tier:DiskTier")
    assert [one["tier"] for one in report["tiers"]] == ["tiers[2]", "tiers[1]"]


def test_a_config_whose_name_has_colons(tiers: TierFolder) -> None:
    path = tiers.folder / "a:b:1"
    path.write_bytes(tiers.config.read_bytes())
    assert len(tiers.parsed("load", tiers.folder / "a.model", "--into", path)["tiers"]) == 3
    assert len(tiers.parsed("load", tiers.folder / "a.model", "--into", f"{path}:1")["tiers"]) == 1


def test_a_failure_says_what_is_written_and_the_same_command_writes_all(
    tiers: TierFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 10 * (8 + 4 * DIM))
    tiers.write(tiers.tier(fail_on=["insert"], fail_after=3))
    error = tiers.refused("load", tiers.folder / "a.model", "--into", tiers.config)
    assert "tiers[1]: insert: failed on purpose (30 of 104 rows are written; the same command writes all" in error
    assert len(tiers.content()) == 30
    tiers.write(tiers.tier())
    assert tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)["tiers"][0]["new"] == 73
    assert_loaded(tiers, "tier")


def test_another_table_and_other_rows_stay(tiers: TierFolder) -> None:
    tiers.model("more.model", [1, 2])
    for table in ("m/a", "hps_et.other.b"):
        tiers.parsed("load", tiers.folder / "a.model", "--into", f"{tiers.config}:1", "--table", table)
    tiers.parsed("load", tiers.folder / "more.model", "--into", f"{tiers.config}:1", "--table", "m/a")
    assert tiers.content(TAG, "fast").keys() == {1, 2, *KEYS}
    assert_loaded(tiers, "fast", "hps_et.other.b")


def test_a_model_of_no_table_needs_one(tiers: TierFolder) -> None:
    path = tiers.model("more.model", [1])
    assert "is not a sparse file of the config" in tiers.refused("load", path, "--into", tiers.config, code=2)
    assert "expected hps_et.MODEL.TABLE" in tiers.refused("load", path, "--into", tiers.config, "--table", "x", code=2)
    tiers.write(tiers.tier(), models=("m", "n"))
    shared = tiers.refused("load", tiers.folder / "a.model", "--into", tiers.config, code=2)
    assert "expected one of hps_et.m.a, hps_et.n.a" in shared and "the sparse file of 2 tables" in shared


def test_another_width_is_refused_before_anything_is_written(tiers: TierFolder) -> None:
    path = tiers.model("wide.model", [1], 4)
    assert "width" in tiers.refused("load", path, "--into", tiers.config, "--table", "m/a")
    assert "expected 3" in tiers.refused("load", path, "--into", tiers.config, "--table", "m/a", "--dim", 4, code=2)
    for file in ("fast", "slow"):
        assert not (tiers.folder / file).exists() or not tiers.tags(file)


def test_keys_that_need_64_bits_in_32(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(), supportlonglong=False)
    assert "does not fit 32 bits" in tiers.refused("load", tiers.folder / "a.model", "--into", tiers.config)


def test_tiers_that_cannot_keep_the_rows(tiers: TierFolder) -> None:
    model = tiers.folder / "a.model"
    assert "cannot be loaded into: its rows live only" in tiers.refused("load", model, "--into", f"{tiers.config}:hash_map")
    tiers.write(tiers.tier(read_only=True))
    assert "it is read only" in tiers.refused("load", model, "--into", f"{tiers.config}:1")
    assert "expected a tier to load into, got none" in tiers.refused("load", model, "--into", tiers.config)
    tiers.write(tiers.tier(down=True, password="geheim"))
    assert "geheim" not in tiers.refused("load", model, "--into", tiers.config)


def test_a_dump_of_a_database(tiers: TierFolder) -> None:
    keys = np.unique(KEYS)
    write_bin(tiers.folder / "a.bin", 8, DIM, [(keys, rows_of(keys, DIM))])
    report = tiers.parsed("load", tiers.folder / "a.bin", "--into", f"{tiers.config}:1", "--table", "m/a")
    assert (report["tiers"][0]["rows"], report["tiers"][0]["dim"]) == (103, 3)
    assert_loaded(tiers, "fast")
    write_bin(tiers.folder / "wide.bin", 8, 4, [(keys, rows_of(keys, 4))])
    wide = ("load", tiers.folder / "wide.bin", "--into", tiers.config, "--table", "m/a")
    assert "expected rows of width 3, got 4" in tiers.refused(*wide)
    write_bin(tiers.folder / "narrow.bin", 4, DIM, [(np.arange(3), rows_of(np.arange(3), DIM))])
    narrow = ("load", tiers.folder / "narrow.bin", "--into", tiers.config, "--table", "m/a")
    assert "expected keys of 8 bytes" in tiers.refused(*narrow)
    assert_loaded(tiers, "fast")


def test_a_model_without_rows(tiers: TierFolder) -> None:
    path = tiers.model("empty.h5", [])
    assert tiers.parsed("load", path, "--into", tiers.config, "--table", "m/a")["tiers"][0]["rows"] == 0
