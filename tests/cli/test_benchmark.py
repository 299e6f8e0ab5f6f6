"""``hps-numba benchmark tiers``: every operation is measured, rows are checked, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tier_commands import TAG, TierFolder
from support.waiting import HANG_SECONDS

OPERATIONS = ["insert", "upsert", "fetch hit", "fetch miss", "erase"]
SMALL = ("--rows", 200, "--dim", 4, "--batch-size", "16,64", "--seconds", HANG_SECONDS)  # all rows, however long that takes


@pytest.fixture
def tiers(tmp_path: Path) -> TierFolder:
    folder = TierFolder(tmp_path)
    folder.model("a.model", range(10))
    folder.write(folder.tier())
    folder.parsed("load", tmp_path / "a.model", "--into", folder.config)
    return folder


def test_every_tier_of_a_config_is_measured_and_left_as_it_was(tiers: TierFolder) -> None:
    report = tiers.parsed("benchmark", "tiers", tiers.config, *SMALL)
    assert report["ok"] and [one["tier"] for one in report["tiers"]] == ["tiers[0]", "tiers[1]"]
    for one in report["tiers"]:
        assert [(line["operation"], line["batch_size"]) for line in one["results"]] == [
            (operation, size) for size in (16, 64) for operation in OPERATIONS
        ]
        for line in one["results"]:
            assert line["keys"] == 200 and line["calls"] == -(-200 // line["batch_size"])
            assert line["found"] == (0 if line["operation"] == "fetch miss" else 200)
            assert line["keys_per_second"] > 0 and 0 < line["p50_seconds"] <= line["p99_seconds"]
    assert tiers.tags() == [TAG] and len(tiers.content()) == 10


def test_people_read_the_same(tiers: TierFolder) -> None:
    result = tiers.run("benchmark", "tiers", tiers.config, "--tier", "1", *SMALL)
    assert result.exit_code == 0 and "every row that was checked is right" in result.stdout
    assert "fetch hit" in result.stdout and f"DiskTier at {tiers.folder / 'tier'}" in result.stdout


def test_a_type_without_a_config(tiers: TierFolder) -> None:
    report = tiers.parsed("benchmark", "tiers", "--type", "hash_map", "--option", "max_batch_size=7", *SMALL)
    assert [one["type"] for one in report["tiers"]] == ["hash_map"]
    options = ("--type", "support.disk_tier:DiskTier", "--option", f"file={tiers.folder / 'new'}", "--option", "seconds=0.001")
    lines = tiers.parsed("benchmark", "tiers", *options, *SMALL)["tiers"][0]["results"]
    assert all(line["p50_seconds"] > 0.001 for line in lines if line["operation"] != "fetch hit") and tiers.tags("new") == []


def test_time_ends_a_measurement(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(seconds=0.01))
    words = ("--tier", 1, "--rows", 1000, "--batch-size", 1, "--seconds", 0.03)
    lines = tiers.parsed("benchmark", "tiers", tiers.config, *words)["tiers"][0]["results"]
    assert all(1 <= line["calls"] <= 4 for line in lines)
    assert lines[1]["keys"] <= lines[0]["keys"], "only rows that were inserted are there"


def test_wrong_rows_are_found(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(wrong_all=True))
    report = tiers.parsed("benchmark", "tiers", tiers.config, "--tier", 1, *SMALL, code=1)
    assert not report["ok"] and report["tiers"][0]["wrong_rows"] == 400


def test_a_tier_with_a_bound_may_drop_rows(tiers: TierFolder) -> None:
    bound = {"type": "hash_map", "num_partitions": 1, "overflow_margin": 50, "overflow_policy": "evict_oldest"}
    tiers.write(volatile_db=bound)
    lines = tiers.parsed("benchmark", "tiers", tiers.config, *SMALL)["tiers"][0]["results"]
    assert 0 < lines[2]["found"] <= 50 and lines[2]["keys"] == 200


@pytest.mark.parametrize("call", ["insert", "fetch", "erase"])
def test_a_failure_is_named_and_the_table_is_removed_if_it_can_be(tiers: TierFolder, call: str) -> None:
    tiers.write(tiers.tier(fail_on=[call], fail_after=5))
    error = tiers.refused("benchmark", "tiers", tiers.config, "--tier", 1, *SMALL)
    assert f"{call}: failed on purpose" in error
    left = [tag for tag in tiers.tags() if tag != TAG]
    assert bool(left) == (call == "erase") and all(tag in error for tag in left)


def test_what_cannot_be_measured_is_an_error(tiers: TierFolder) -> None:
    benchmark = ("benchmark", "tiers")
    assert "either a config or --type" in tiers.refused(*benchmark, code=2)
    assert "either a config or --type" in tiers.refused(*benchmark, tiers.config, "--type", "hash_map", code=2)
    assert "for --type only" in tiers.refused(*benchmark, tiers.config, "--option", "a=1", code=2)
    assert "expected KEY=VALUE" in tiers.refused(*benchmark, "--type", "hash_map", "--option", "a", code=2)
    assert "expected a number in" in tiers.refused(*benchmark, tiers.config, "--batch-size", "1,x", code=2)
    assert "no_such" in tiers.refused(*benchmark, "--type", "no_such")
    tiers.write(tiers.tier(read_only=True))
    assert "it is read only" in tiers.refused(*benchmark, tiers.config, "--tier", 1)
