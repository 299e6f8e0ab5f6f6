"""``hps-numba dump``: a table of a tier as a file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.oracles import rows_of
from support.tier_commands import DIM, TAG, TierFolder

from hps_numba import open_model
from hps_numba.storage.bin_dump import read_bin

KEYS = [7, -3, 2**50, *range(40)]


@pytest.fixture
def tiers(tmp_path: Path) -> TierFolder:
    folder = TierFolder(tmp_path)
    folder.model("a.model", KEYS)
    folder.write(folder.tier())
    folder.parsed("load", tmp_path / "a.model", "--into", folder.config)
    return folder


def assert_has_all(chunks: Iterable[tuple[Any, ...]]) -> None:
    found = {int(key): row.copy() for keys, rows, *_ in chunks for key, row in zip(keys, rows, strict=True)}
    assert found.keys() == set(KEYS)
    for key, row in found.items():
        np.testing.assert_array_equal(row, rows_of(np.array([key]), DIM)[0])


def test_a_dump_as_hugectr_writes_it(tiers: TierFolder) -> None:
    out = tiers.folder / "x.bin"
    report = tiers.parsed("dump", tiers.config, "--tier", "1", "--table", TAG, "--out", out)
    assert (report["rows"], report["dim"], report["bytes"]) == (42, DIM, 16 + 42 * (8 + 12))
    assert_has_all(read_bin(out).chunks())


@pytest.mark.parametrize("name", ["x.model", "x.h5"])
def test_a_sparse_model(tiers: TierFolder, name: str) -> None:
    result = tiers.run("dump", tiers.config, "--tier", "1", "--table", "m/a", "--out", tiers.folder / name)
    assert result.exit_code == 0 and "42 rows x 3" in result.stdout and "dumped from tiers[1]" in result.stdout
    with open_model(tiers.folder / name) as model:
        assert_has_all(model.chunks())


def test_a_dump_goes_back_in(tiers: TierFolder) -> None:
    tiers.parsed("dump", tiers.config, "--tier", "1", "--table", TAG, "--out", tiers.folder / "x.model")
    tiers.write(tiers.tier("second"))
    tiers.parsed("load", tiers.folder / "x.model", "--into", tiers.config, "--table", TAG)
    tiers.parsed("verify", tiers.config, "--whole")


def test_a_tier_with_a_way_of_its_own_gets_the_path(tiers: TierFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.disk_tier import DiskTier

    def own_dump(self: DiskTier, table: str, path: str | Path) -> int:
        Path(path).write_text(table)
        return self.size(table)

    monkeypatch.setattr(DiskTier, "dump", own_dump)
    assert tiers.parsed("dump", tiers.config, "--tier", "1", "--table", TAG, "--out", tiers.folder / "x.sst")["rows"] == 42
    assert (tiers.folder / "x.sst").read_text() == TAG


@pytest.mark.parametrize("name", ["x.bin", "x.model"])
def test_existing_files_are_replaced_only_with_the_option(tiers: TierFolder, name: str) -> None:
    words = ("dump", tiers.config, "--tier", "1", "--table", TAG, "--out", tiers.folder / name)
    tiers.parsed(*words)
    assert "pass --overwrite" in tiers.refused(*words)
    assert tiers.parsed(*words, "--overwrite")["rows"] == 42


@pytest.mark.parametrize("name", ["x.bin", "x.model"])
def test_a_tier_that_fails_leaves_no_file(tiers: TierFolder, name: str) -> None:
    tiers.write(tiers.tier(fail_on=["scan"], fail_after=1))
    error = tiers.refused("dump", tiers.config, "--tier", "1", "--table", TAG, "--out", tiers.folder / name)
    assert "failed on purpose" in error
    assert sorted(path.name for path in tiers.folder.iterdir()) == ["a.model", "ps.json", "tier"]


def test_what_is_not_there_is_not_dumped(tiers: TierFolder) -> None:
    out = tiers.folder / "x.bin"
    assert "the config has several" in tiers.refused("dump", tiers.config, "--table", TAG, "--out", out, code=2)
    error = tiers.refused("dump", tiers.config, "--tier", "1", "--table", "hps_et.m.b", "--out", out)
    assert f"tiers[1]: hps_et.m.b: expected one of the tables of the tier, {TAG}" in error
    error = tiers.refused("dump", tiers.config, "--tier", "0", "--table", TAG, "--out", out)
    assert "its rows live only as long as their process" in error
    assert not out.exists()
