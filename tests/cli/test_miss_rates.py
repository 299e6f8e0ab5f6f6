"""What ``hps-numba doctor`` and ``profile`` say of the ways by which missed rows reach a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hps_numba.cache.kept_rates import KeptRates, rate_key
from hps_numba.cache.shares import Learned
from hps_numba.cli import build
from hps_numba.cli._miss_rates import shown_rates
from hps_numba.device.identity import DeviceIdentity
from hps_numba.server import miss_rates

GPU = DeviceIdentity("NVIDIA H200 0a1b", "570.1", "a processor, 16 cores")
KEY = rate_key(GPU, 512, 17, 16)
COSTS = {"host": 20.0, "both": 10.0, "device": 40.0}
LINE = (
    "NVIDIA H200 0a1b: 65,536 to 131,071 keys, rows of 512 B, a table of about 16 GiB or more: 50 M rows/s by host threads, "
    "100 M rows/s by both, 25 M rows/s by the GPU alone; chosen: by both"
)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeptRates:
    rates = KeptRates(lambda: tmp_path / "miss_rates.json")
    rates.open()
    rates._used[KEY] = Learned.remembered(COSTS, 0.5, (60e6, 40e6))
    rates._used[KEY._replace(key_bits=18)] = Learned()  # of which nothing is known
    rates.close()
    monkeypatch.setattr(miss_rates, "kept_rates", rates)
    return rates


def test_rates_and_decision(known: KeptRates) -> None:
    (entry,) = miss_rates.used_miss_rates()
    assert entry["rows_per_second"] == {"host": 50e6, "both": 100e6, "device": 25e6} and entry["chosen"] == "both"
    assert shown_rates([entry]) == [LINE] and miss_rates.kept_miss_rates()["rates"] == [entry]
    known._used = {KEY._replace(span_gib=4): Learned.remembered({"host": 20.0}, 0.5, (0.0, 0.0))}
    (line,) = shown_rates(miss_rates.used_miss_rates())
    assert line.endswith("a table of about 4 GiB: 50 M rows/s by host threads; each is still tried")


def test_doctor_shows_what_is_kept(known: KeptRates) -> None:
    report = json.loads(CliRunner().invoke(build(), ["doctor", "--json"]).stdout)["miss_rates"]
    assert report["file"] == str(known.file) and [entry["chosen"] for entry in report["rates"]] == ["both"]
    assert LINE in CliRunner().invoke(build(), ["doctor"]).stdout
    assert known.file is not None
    known.file.unlink()
    assert "nothing measured yet" in CliRunner().invoke(build(), ["doctor"]).stdout


def test_profile_shows_what_its_lookups_use(known: KeptRates) -> None:
    arguments = ["profile", "--rows", "400", "--dim", "4", "--num-keys", "50", "--iterations", "3", "--warmup-iterations", "1"]
    report = json.loads(CliRunner().invoke(build(), [*arguments, "--json", "-"]).stdout)
    assert report["ok"] and report["miss_rates"] == miss_rates.used_miss_rates()
    assert f"Missed rows on {LINE}." in CliRunner().invoke(build(), arguments).stdout
