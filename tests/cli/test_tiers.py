"""``hps-numba tiers``: what it says about tiers that answer, and about those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tier_commands import TAG, TierFolder

from hps_numba.cli import _tier_survey


@pytest.fixture
def tiers(tmp_path: Path) -> TierFolder:
    folder = TierFolder(tmp_path)
    folder.model("a.model", range(100))
    folder.write(folder.tier())
    folder.parsed("load", tmp_path / "a.model", "--into", folder.config)
    return folder


def test_tables_bytes_and_latency_of_each_tier(tiers: TierFolder) -> None:
    report = tiers.parsed("tiers", tiers.config, "--samples", 7, "--keys", 5)
    memory, disk = report["tiers"]
    assert report["ok"] and (memory["tier"], disk["tier"]) == ("tiers[0]", "tiers[1]")
    assert (memory["type"], memory["where"], memory["private"], memory["error"]) == ("hash_map", "", True, None)
    assert (disk["where"], disk["private"], disk["shared"], disk["persistent"]) == ("" or disk["where"], False, True, True)
    (table,) = disk["tables"]
    assert table == {
        "table": TAG, "in_config": True, "dim": 3, "rows": 100, "bytes": 100 * (8 + 12), "capacity": None
    }  # fmt: skip
    assert [one["rows"] for one in memory["tables"]] == [0] and set(memory["latency"]) == {"absent"}
    for kind, found in (("present", 35), ("absent", 0)):
        times = disk["latency"][kind]
        assert (times["fetches"], times["keys_each"], times["found"]) == (7, 5, found)
        assert 0 < times["p50_seconds"] <= times["p99_seconds"]


def test_people_read_the_same(tiers: TierFolder) -> None:
    text = tiers.run("tiers", tiers.config, "--samples", 2).stdout
    assert "tiers[0]  hash_map: answers; in the memory of each process: empty in this new one" in text
    assert f"support.disk_tier:DiskTier at {tiers.folder / 'tier'}: answers; shared, persistent" in text
    assert "hps_et.m.a" in text and "any number" in text and "p99" in text


def test_a_tier_that_is_down_is_named_and_the_others_are_shown(tiers: TierFolder) -> None:
    down = tiers.tier("other", down=True, password="geheim")
    tiers.write(down, tiers.tier())
    report = tiers.parsed("tiers", tiers.config, code=1)
    assert not report["ok"] and [one["error"] is None for one in report["tiers"]] == [True, False, True]
    error = report["tiers"][1]
    assert (
        error["error_type"] == "TierUnavailable"
        and "nobody answers" in error["error"]
        and error["error"].startswith("tiers[1]")
    )
    result = tiers.run("tiers", tiers.config)
    assert result.exit_code == 1 and "DOWN: tiers[1]: " in result.stdout and "geheim" not in result.output + result.stderr
    assert "(hidden)" in result.stdout
    assert "100" in result.stdout


def test_credentials_in_an_address_are_hidden(tiers: TierFolder) -> None:
    tiers.write({"type": "redis_cluster", "address": "127.0.0.1:1", "password": "geheim"})
    result = tiers.run("tiers", tiers.config, "--tier", "1")
    assert result.exit_code == 1 and "geheim" not in result.output + result.stderr


@pytest.mark.parametrize("call", ["tables", "fetch"])
def test_a_tier_that_fails_later_is_down_too(tiers: TierFolder, call: str) -> None:
    tiers.write(tiers.tier(fail_on=[call]))
    report = tiers.parsed("tiers", tiers.config, code=1)
    assert f"{call}: failed on purpose" in report["tiers"][1]["error"]


def test_a_tier_of_which_a_part_is_down_is_down(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(failed_keys=True))
    report = tiers.parsed("tiers", tiers.config, code=1)
    assert "keys could not be looked for: a part of the tier is out of order" in report["tiers"][1]["error"]
    assert [table["rows"] for table in report["tiers"][1]["tables"]] == [100]


def test_a_slow_tier_is_not_asked_for_ever(tiers: TierFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tier_survey, "_SECONDS", 0.0)
    tiers.write(tiers.tier(seconds=0.001))
    times = tiers.parsed("tiers", tiers.config, "--tier", "tiers[1]", "--samples", 1000)["tiers"][0]["latency"]
    assert times["present"]["fetches"] == times["absent"]["fetches"] == 1 and times["present"]["p50_seconds"] >= 0.001


def test_tables_that_the_config_lacks_are_listed(tiers: TierFolder) -> None:
    tiers.write(tiers.tier(), models=("n",))
    report = tiers.parsed("tiers", tiers.config, "--tier", 1)
    assert [(one["table"], one["in_config"], one["rows"], one["dim"]) for one in report["tiers"][0]["tables"]] == [
        ("hps_et.n.a", True, 0, 3),
        (TAG, False, 100, 3),
    ]
    assert f"{TAG} (not in the config)" in tiers.run("tiers", tiers.config).stdout


def test_keys_come_from_the_tier_if_the_model_cannot_be_read(tiers: TierFolder) -> None:
    for file in (tiers.folder / "a.model").iterdir():
        file.unlink()
    report = tiers.parsed("tiers", tiers.config, "--tier", "1", "--samples", 3)
    assert report["tiers"][0]["latency"]["present"]["found"] == 3 * 16


def test_tiers_are_only_read(tiers: TierFolder) -> None:
    before = (tiers.folder / "tier").stat().st_mtime_ns
    tiers.parsed("tiers", tiers.config)
    assert (tiers.folder / "tier").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["row_log", "rocks_db"])
def test_a_tier_on_disk_that_nobody_has_made_yet_is_not_down(tiers: TierFolder, kind: str) -> None:
    if kind == "rocks_db":
        pytest.importorskip("rocksdict")
    path = tiers.folder / "disk" / "tier"
    tiers.write({"type": kind, "path": str(path)})
    report = tiers.parsed("tiers", tiers.config)
    fresh = report["tiers"][1]
    assert report["ok"] and (fresh["made"], fresh["error"], fresh["tables"], fresh["latency"]) == (False, None, [], {})
    assert f"{kind} at {path}: nothing there yet; the start of a server" in tiers.run("tiers", tiers.config).stdout
    assert not path.parent.exists()
    tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)
    made = tiers.parsed("tiers", tiers.config)["tiers"][1]
    assert made["made"] and [table["rows"] for table in made["tables"]] == [100]


@pytest.mark.parametrize("kind", ["row_log", "rocks_db"])
def test_an_empty_folder_is_no_tier_that_is_down(tiers: TierFolder, kind: str) -> None:
    if kind == "rocks_db":
        pytest.importorskip("rocksdict")
    (tiers.folder / "disk").mkdir()
    tiers.write({"type": kind, "path": str(tiers.folder / "disk")})
    assert tiers.parsed("tiers", tiers.config)["ok"]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *[
            (kind, damage)
            for kind in ("row_log", "rocks_db")
            for damage in ("a file", "below a file", "a dead link", "head lost")
        ],
        *[(kind, "read only") for kind in ("row_log", "rocks_db")],
    ],
)
def test_a_tier_on_disk_that_is_damaged_or_cannot_be_made_is_down(tiers: TierFolder, kind: str, damage: str) -> None:
    if kind == "rocks_db":
        pytest.importorskip("rocksdict")
    path = tiers.folder / "disk"
    section = {"type": kind, "path": str(path / "tier" if damage == "below a file" else path)}
    tiers.write(section)
    if damage == "head lost":
        tiers.parsed("load", tiers.folder / "a.model", "--into", tiers.config)
        (path / ("manifest.json" if kind == "row_log" else "CURRENT")).unlink()
    elif damage == "a dead link":
        path.symlink_to(tiers.folder / "nowhere")
    elif damage == "read only":  # no server makes it
        tiers.write({**section, "read_only": True})
    else:
        path.write_text("x")
    report = tiers.parsed("tiers", tiers.config, code=1)
    assert not report["ok"] and str(path) in report["tiers"][1]["error"] and report["tiers"][1]["made"]
    assert "DOWN: " in tiers.run("tiers", tiers.config).stdout


def test_an_unknown_tier_and_a_config_without_tiers(tiers: TierFolder) -> None:
    assert "expected one of 0 (tiers[0], hash_map), 1 (tiers[1]" in tiers.refused("tiers", tiers.config, "--tier", "9", code=2)
    tiers.write(volatile_db={"type": "disabled"})
    assert "expected a config with a storage tier" in tiers.refused("tiers", tiers.config)


def test_code_of_a_config_needs_the_option(tiers: TierFolder) -> None:
    from typer.testing import CliRunner

    from hps_numba.cli import build

    result = CliRunner().invoke(build(), ["tiers", str(tiers.config)])
    assert result.exit_code == 1 and "--allow-code" in result.stdout
