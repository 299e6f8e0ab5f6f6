"""What was learned of missed rows, on disk: read by the next process, replaced whole, never in the way."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cache_bench import Bench
from support.processes import environment
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.cache import gathering, kept_rates
from hps_numba.cache.gathering import GatheredMisses
from hps_numba.cache.kept_rates import KeptRates, RateKey, rate_key, span_of
from hps_numba.cache.shares import FULL_SHARE, Learned, forced_share
from hps_numba.device.identity import DeviceIdentity
from hps_numba.errors import ConfigError
from hps_numba.kernels.compiler import disk_cache

GPU = DeviceIdentity("NVIDIA H200 0a1b", "570.1", "a processor, 16 cores")
KEY = rate_key(GPU, 512, 17, 16)
GIB = 1 << 30


def taught(**costs: float) -> Learned:
    """Of whom the first batches have taken so many nanoseconds a row."""
    learned = Learned()
    rows = {"host": (40_000, 0), "both": (30_000, 10_000), "device": (0, 40_000)}
    for _ in range(4):
        for way, cost in costs.items():
            learned.next_share()
            learned.learn(rows[way][0], round(40_000 * cost), rows[way][1], round(40_000 * cost))
    return learned


ALL = {"host": 20.0, "both": 10.0, "device": 40.0}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "miss_rates.json"


@pytest.fixture
def opened(file: Path) -> Callable[[], KeptRates]:
    """A new process."""

    def open_again() -> KeptRates:
        rates = KeptRates(lambda: file)
        rates.open()
        return rates

    return open_again


def learn(rates: KeptRates, key: RateKey = KEY, **costs: float) -> None:
    rates.of(key)
    rates._used[key] = taught(**costs or ALL)


def test_the_next_process_takes_the_best_way_at_once(opened: Callable[[], KeptRates], file: Path) -> None:
    first = opened()
    assert first.of(KEY).best is None and not file.exists()
    learn(first)
    first.close()
    again = opened().of(KEY)
    assert again.costs == pytest.approx(ALL) and again.best == "both" and again.rates == taught(**ALL).rates
    shares = [again.next_share() for _ in range(200)]
    assert shares[:60] == [round(again.share * FULL_SHARE)] * 60
    assert 1 <= sum(share != shares[0] for share in shares) <= 3  # another way is still tried now and then


@pytest.mark.parametrize("way", ["host", "both", "device"])
def test_each_way_is_remembered(opened: Callable[[], KeptRates], way: str) -> None:
    first = opened()
    learn(first, **ALL | {way: 5.0})
    first.close()
    again = opened().of(KEY)
    assert again.best == way
    expected = {"host": FULL_SHARE, "both": round(again.share * FULL_SHARE), "device": -1}[way]
    assert [again.next_share() for _ in range(10)] == [expected] * 10


def test_a_way_that_was_not_measured_is_tried(opened: Callable[[], KeptRates]) -> None:
    first = opened()
    learn(first, host=5.0)
    first.close()
    again = opened().of(KEY)
    assert again.costs == pytest.approx({"host": 5.0}) and again.best is None
    assert FULL_SHARE not in [again.next_share() for _ in range(8)]


@pytest.mark.parametrize("field", RateKey._fields)
def test_what_was_learned_elsewhere_is_not_taken(opened: Callable[[], KeptRates], field: str) -> None:
    first = opened()
    learn(first)
    first.close()
    other = KEY._replace(**{field: getattr(KEY, field) * 2})
    assert opened().of(other).costs == {}


def test_caches_with_one_key_learn_together(opened: Callable[[], KeptRates]) -> None:
    rates = opened()
    rates.of(KEY).learn(40_000, 1_000_000, 0, 0)
    assert rates.of(KEY).costs == {"host": 25.0}
    assert rates.used == {KEY: rates.of(KEY)}


def test_only_news_are_written(opened: Callable[[], KeptRates], file: Path) -> None:
    rates = opened()
    learn(rates)
    rates.keep()
    written = file.stat().st_mtime_ns, file.stat().st_ino
    rates.of(KEY).learn(40_000, 800_000, 0, 0)  # as before
    rates.keep()
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == written
    for _ in range(4):
        rates.of(KEY).learn(40_000, 8_000, 0, 0)  # another best way
    rates.keep()
    assert file.stat().st_ino != written[1] and opened().of(KEY).best == "host"


def test_processes_keep_what_others_have_written(opened: Callable[[], KeptRates], file: Path) -> None:
    one, other = opened(), opened()
    learn(one, KEY)
    learn(other, KEY._replace(row_bytes=128), host=3.0)
    one.close()
    other.close()
    assert set(opened().read()) == {KEY, KEY._replace(row_bytes=128)}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and list(file.parent.iterdir()) == [file]


def test_the_oldest_go_when_there_are_too_many(opened: Callable[[], KeptRates], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_rates, "_MAX_ENTRIES", 3)
    for bits in range(17, 22):
        rates = opened()
        learn(rates, KEY._replace(key_bits=bits))
        rates.close()
    assert sorted(key.key_bits for key in opened().read()) == [19, 20, 21]


def damaged(content: dict[str, Any]) -> list[bytes]:
    whole = json.dumps(content).encode()
    texts = [b"", b"{", b"[]", b"null", b"\xff\x00", whole[:-20], b"[" * 50_000, b" " * (2 << 20)]
    entry = content["entries"][0]
    wrong = [
        {name: value}
        for name, value in [
            ("gpu", 3),
            ("row_bytes", "512"),
            ("row_bytes", True),
            ("ns_a_row", {"host": -1}),
            ("ns_a_row", {"host": float("nan")}),
            ("ns_a_row", {"bus": 3}),
            ("ns_a_row", None),
            ("host_share", 7),
            ("rates", [1]),
            ("rates", [1, float("inf")]),
            ("written", "today"),
            ("written", 10**400),
            ("key_bits", 10**9),
            ("key_bits", 0),
        ]
    ]
    texts += [json.dumps(content | {"entries": [entry | change]}).encode() for change in wrong]
    texts += [json.dumps(content | {"entries": [{}]}).encode(), json.dumps(content | {"hps_numba_miss_rates": 2}).encode()]
    return texts


def test_a_damaged_file_is_as_if_it_were_not_there(
    opened: Callable[[], KeptRates], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    learn(first)
    first.close()
    for text in damaged(json.loads(file.read_bytes())):
        file.write_bytes(text)
        caplog.clear()
        rates = opened()
        assert rates.of(KEY).costs == {} and rates.read() == {}, text[:300]
        assert [record.levelno for record in caplog.records] == [logging.WARNING], text[:300]
        assert str(file) in caplog.text and "measured again" in caplog.text
        learn(rates)
        rates.close()
        assert opened().of(KEY).best == "both"  # written anew


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes as POSIX has them")
def test_a_file_that_others_may_write_and_a_link_are_not_read(
    opened: Callable[[], KeptRates], file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = opened()
    learn(first)
    first.close()
    file.chmod(0o666)
    assert opened().of(KEY).costs == {} and "others may write" in caplog.text
    file.chmod(0o600)
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    rates = opened()
    assert rates.of(KEY).costs == {}
    learn(rates)
    rates.close()
    assert file.is_symlink() and elsewhere.read_bytes() == before


@pytest.mark.parametrize("place", [None, Path("/proc/miss_rates.json")])
def test_without_a_folder_nothing_is_kept_and_nothing_fails(place: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    rates = KeptRates(lambda: place)
    rates.open()
    for _ in range(2):
        learn(rates)
        rates.keep()
    rates.close()
    assert len(caplog.records) == (place is not None)
    assert rates.of(KEY).best == "both"


def test_it_is_written_while_the_process_goes_on(
    opened: Callable[[], KeptRates], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_rates, "_SECONDS", 1e-3)
    rates = opened()
    learn(rates)
    wait_until(file.exists)
    rates.close()


PROGRAM = """
import sys
from hps_numba.cache.kept_rates import KeptRates, kept_rates, rate_key
from hps_numba.device.identity import DeviceIdentity
key = rate_key(DeviceIdentity("gpu", "1", "machine"), int(sys.argv[1]), 17, 16)
kept_rates.open()
for rows, others in [(40_000, 0), (30_000, 10_000), (0, 40_000)]:
    kept_rates.of(key).learn(rows, 1_000_000 + rows, others, 1_000_000)
print(len(kept_rates.read()), kept_rates.file)
"""


def test_a_process_leaves_what_it_learned_in_the_users_folder(tmp_path: Path) -> None:
    for number in range(3):
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(64 * (number + 1))]
        env = environment(HPS_NUMBA_CACHE_DIR=str(tmp_path / "kept"))
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG_SECONDS, check=True)
        assert done.stdout.split() == [str(number), str(tmp_path / "kept" / "miss_rates.json")] and not done.stderr


# -- caches -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "span"), [(0, 1), (2 * GIB, 1), (2 * GIB + 1, 4), (8 * GIB, 4), (9 * GIB, 16), (999 * GIB, 16)]
)
def test_classes_of_tables(size: int, span: int) -> None:
    assert span_of(size) == span


def test_a_cache_begins_with_what_is_known_and_asks_again_when_its_table_has_grown(
    cpu_bench: Bench, opened: Callable[[], KeptRates], monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    before = opened()
    learn(before, rate_key(GPU, 68, 17, 1))
    learn(before, rate_key(GPU, 68, 17, 4), **ALL | {"device": 1.0})
    before.close()
    monkeypatch.setattr(gathering, "kept_rates", rates := opened())
    monkeypatch.setattr(gathering, "device_identity", lambda ordinal: GPU)
    span = 1
    monkeypatch.setattr(gathering, "span_of", lambda size: span)
    cache = cpu_bench.cache(cpu_bench.store(range(300)), 40, miss_path="auto")
    gathered = cache.parts.gathered
    assert gathered is not None and gathered.shares.of(100_000) == round(0.75 * FULL_SHARE)
    workspace: Any = None  # not looked at where the device reads alone
    span = 4
    assert gathered.begin(workspace, 100_000, 0) == -1
    used = rates.used[rate_key(GPU, 68, 17, 4)]
    for _ in range(9):
        used.learn(40_000, 4_000, 0, 0)
    cache.close()
    assert opened().of(rate_key(GPU, 68, 17, 4)).best == "host"


def test_nothing_is_kept_of_the_cpu(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch, opened: Callable[[], KeptRates]) -> None:
    monkeypatch.setattr(gathering, "kept_rates", rates := opened())
    cache = cpu_bench.cache(cpu_bench.store(range(300)), 40, miss_path="auto")
    assert cache.parts.gathered is not None
    cache.parts.gathered.shares.of(100_000)
    cache.close()
    assert rates.used == {}


@pytest.mark.parametrize(("text", "share"), [("", None), (" ", None), ("0", 0.0), ("0.5", 0.5), (" 1 ", 1.0)])
def test_the_environment_forces_a_share(
    cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch, text: str, share: float | None
) -> None:
    monkeypatch.setenv("HPS_NUMBA_HOST_SHARE", text)
    assert forced_share() == share
    cache = cpu_bench.cache(cpu_bench.store(range(300)), 40, miss_path="auto")
    assert isinstance(cache.parts.gathered, GatheredMisses) and cache.parts.gathered.shares.forced == share
    if share is not None:
        assert cache.parts.gathered.shares.of(100_000) == (round(share * FULL_SHARE) or -1)


@pytest.mark.parametrize("text", ["2", "-0.1", "nan", "inf", "half", "device"])
def test_an_odd_share_is_refused(cpu_bench: Bench, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HPS_NUMBA_HOST_SHARE", text)
    store = cpu_bench.store(range(300))
    with pytest.raises(ConfigError, match=f"HPS_NUMBA_HOST_SHARE: expected a number from 0 to 1, got '{text}'"):
        cpu_bench.cache(store, 40, miss_path="auto")


def test_rates_depend_on_the_kernels() -> None:
    assert disk_cache.source_digest() in KEY.version
