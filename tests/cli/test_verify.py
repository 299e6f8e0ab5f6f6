"""``hps-numba verify``: finds every row that a tier lacks, has wrong, or has too many; and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fakes import NaiveStore
from support.oracles import rows_of
from support.tier_commands import DIM, TAG, TierFolder

from hps_numba.cli import _tier_compare

KEYS = [*range(1000, 2000), -5, 2**60]


@pytest.fixture
def tiers(tmp_path: Path) -> TierFolder:
    folder = TierFolder(tmp_path)
    folder.model("a.model", KEYS)
    folder.write(folder.tier())
    folder.parsed("load", tmp_path / "a.model", "--into", folder.config)
    return folder


def change(tiers: TierFolder, *, drop: Any = (), spoil: Any = (), add: Any = ()) -> None:
    content = {TAG: NaiveStore(DIM)}
    content[TAG].rows = tiers.content()
    for key in drop:
        del content[TAG].rows[key]
    for key in spoil:
        content[TAG].rows[key] = content[TAG].rows[key] * np.float32(1.0000001) + np.float32(1e-6)
    for key in add:
        content[TAG].rows[key] = np.zeros(DIM, np.float32)
    (tiers.folder / "tier").write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("options", [(), ("--whole",), ("--sample", 1), ("--sample", 100), ("--sample", 10**9)])
def test_a_tier_that_was_loaded_is_equal(tiers: TierFolder, options: tuple[Any, ...]) -> None:
    report = tiers.parsed("verify", tiers.config, *options)
    memory, found = report["results"]
    assert report["ok"] and "in the memory of one process" in memory["skipped"]
    expected = 1002 if options[:1] != ("--sample",) else min(1002, max(1, options[1]))
    assert found["compared"] in range(expected, expected + 64) and (found["missing"], found["wrong"]) == (0, 0)
    assert found["extra"] == (0 if options == ("--whole",) else None)
    assert "is equal, bit by bit" in tiers.run("verify", tiers.config, *options).stdout


def test_the_whole_table_is_compared_exactly(tiers: TierFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tier_compare, "_KEYS_AT_ONCE", 100)
    monkeypatch.setattr(_tier_compare, "_READ_KEYS", 64)
    dropped, spoilt, added = [-5, *range(1000, 1300, 7)], list(range(1500, 1850, 2)), [0, 5, 2**62]
    change(tiers, drop=dropped, spoil=spoilt, add=added)
    (found,) = tiers.parsed("verify", tiers.config, "--tier", 1, "--whole", code=1)["results"]
    assert (found["missing"], found["wrong"], found["extra"]) == (len(dropped), len(spoilt), 3)
    assert found["wrong_keys"] == spoilt[:5] and found["extra_keys"] == added
    assert found["missing_keys"] == [1000, 1007, 1014, 1021, 1028]
    result = tiers.run("verify", tiers.config, "--tier", 1, "--whole")
    assert result.exit_code == 1 and "DIFFERENT: 1 of 1 tables" in result.stdout
    assert f"wrong in tiers[1], {TAG}: keys 1500, 1502, 1504, 1506, 1508, ..." in result.stdout
    assert f"extra in tiers[1], {TAG}: keys 0, 5, {2**62}\n" in result.stdout


def test_a_sample_finds_a_table_that_is_wrong_everywhere_or_not_there(tiers: TierFolder) -> None:
    change(tiers, spoil=KEYS)
    (found,) = tiers.parsed("verify", tiers.config, "--tier", 1, "--sample", 10, code=1)["results"]
    assert found["wrong"] == found["compared"] == 10 and found["extra"] is None
    (tiers.folder / "tier").unlink()
    (found,) = tiers.parsed("verify", tiers.config, "--tier", 1, "--sample", 10, "--seed", 3, code=1)["results"]
    assert found["missing"] == found["compared"] >= 2


def test_one_bit_and_nan_and_minus_zero(tiers: TierFolder) -> None:
    from hps_numba import write_model

    rows = np.array([[np.nan, -0.0, 1.0]] * 3, np.float32)
    write_model(tiers.folder / "a.model", DIM, [(np.arange(3), rows)], overwrite=True)
    change(tiers, drop=KEYS)
    tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)
    tiers.parsed("verify", tiers.config, "--whole")
    content = {TAG: NaiveStore(DIM)}
    content[TAG].rows = tiers.content()
    content[TAG].rows[1][1] = 0.0
    (tiers.folder / "tier").write_bytes(pickle.dumps(content))
    (found,) = tiers.parsed("verify", tiers.config, "--tier", 1, code=1)["results"]
    assert (found["wrong"], found["wrong_keys"]) == (1, [1])


def test_of_equal_keys_the_last_row_counts(tiers: TierFolder) -> None:
    from hps_numba import write_model

    keys = np.array([9, 8, 9, 9, 7], np.int64)
    rows = rows_of(np.arange(5), DIM)
    write_model(tiers.folder / "a.model", DIM, [(keys, rows)], overwrite=True)
    change(tiers, drop=KEYS)
    tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)
    tiers.parsed("verify", tiers.config, "--whole")
    tiers.parsed("verify", tiers.config, "--sample", 5)
    change(tiers, spoil=[9])
    (found,) = tiers.parsed("verify", tiers.config, "--tier", 1, code=1)["results"]
    assert (found["wrong"], found["wrong_keys"]) == (1, [9])


def test_keys_that_cannot_be_looked_for_are_not_missing(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(failed_keys=True))
    assert "501 of 1,002 keys could not be looked for" in tiers.refused("verify", tiers.config, "--whole")


def test_the_head_of_a_table_is_explained(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(initial_cache_rate=0.5))
    change(tiers, drop=[2**60])
    assert "starts it with the first 50.0% of the rows" in tiers.run("verify", tiers.config, "--tier", 1).stdout


@pytest.mark.parametrize("fault", [{"down": True}, {"fail_on": ["fetch"]}])
def test_a_tier_that_is_down_does_not_hide_the_others(tiers: TierFolder, fault: dict[str, Any]) -> None:
    tiers.write(tiers.tier("other", password="geheim", **fault), tiers.tier())
    change(tiers, drop=[1000])
    report = tiers.parsed("verify", tiers.config, "--whole", code=1)
    _, down, found = report["results"]
    assert not report["ok"] and down["tier"] == "tiers[1]" and down["error"].startswith("tiers[1]: ")
    assert found["tier"] == "tiers[2]" and (found["missing"], found["wrong"]) == (1, 0)
    result = tiers.run("verify", tiers.config, "--whole")
    assert result.exit_code == 1 and "1,002" in result.stdout and "geheim" not in result.output
    assert "NOT COMPARED: tiers[1]: " in result.stdout
    named = ("verify", tiers.config, "--tier", "tiers[1]")
    assert "tiers[1]: " in tiers.refused(*named)


def test_what_cannot_be_compared_is_an_error(tiers: TierFolder) -> None:
    assert "expected one of m, got 'x'" in tiers.refused("verify", tiers.config, "--model", "x", code=2)
    assert "without --whole only" in tiers.refused("verify", tiers.config, "--whole", "--sample", "3", code=2)
    assert "tiers[0]: cannot be compared" in tiers.refused("verify", tiers.config, "--tier", "hash_map")
    tiers.write(tiers.tier(fail_on=["fetch"], password="geheim"))
    assert "tiers[1]: fetch: failed on purpose" in tiers.refused("verify", tiers.config)
    tiers.write(tiers.tier())
    (tiers.folder / "a.model" / "key").unlink()
    assert "a.model" in tiers.refused("verify", tiers.config)
    tiers.write(volatile_db={"type": "hash_map"})
    assert "expected a tier to compare, got none: volatile_db (hash_map)" in tiers.refused("verify", tiers.config)
