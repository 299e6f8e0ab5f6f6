"""``hps-numba profile``: what it measures, its keys, its report, and its errors (checklist O01, O02, N05)."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from support.factories import Workshop
from typer.testing import CliRunner, Result

from hps_numba import HPS
from hps_numba.cli import _profile_measure, _profile_target, build
from hps_numba.cli._profile_keys import Distribution, DrawnKeys, ReplayedKeys, chosen_distribution, parse_weights
from hps_numba.cli._profile_measure import latency
from hps_numba.cli._profile_options import chosen_modes, chosen_sizes
from hps_numba.cli._profile_target import GeneratedTable, Target

SMALL = ("--rows", 400, "--dim", 4, "--num-keys", 50, "--iterations", 6, "--warmup-iterations", 2)


def profile(*arguments: object) -> Result:
    return CliRunner().invoke(build(), ["profile", *map(str, arguments)])


def report_of(*arguments: object, code: int = 0) -> Any:
    result = profile(*arguments, "--json", "-")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def error_of(*arguments: object, code: int) -> str:
    result = profile(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and "a bug" not in lines[0], result.stderr
    return lines[0]


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU."""
    monkeypatch.setattr(_profile_target, "cuda_devices", lambda: 0)


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The keys of every call, in order."""
    calls: list[np.ndarray] = []
    lookup = Target.lookup

    def recorded(self: Target, keys: Any, out: Any, stream: Any) -> None:
        calls.append(np.array(keys))
        lookup(self, keys, out, stream)

    monkeypatch.setattr(Target, "lookup", recorded)
    return calls


@pytest.fixture
def config(workshop: Workshop) -> Callable[..., Path]:
    """Writes a config of one model with two tables, whose keys are far apart, and returns its path."""

    def write(entry: dict[str, Any] | None = None, **top: Any) -> Path:
        wide = np.arange(300) * 1_000_003 + 7
        model = workshop.model((wide, 3), (range(40), 5), **(entry or {}))
        path = workshop.folder / "ps.json"
        path.write_text(json.dumps({"supportlonglong": True, "models": [model], **top}))
        return path

    return write


# -- modes and report ---------------------------------------------------------------------


@pytest.mark.usefixtures("without_gpu")
def test_all_modes_and_sizes_of_a_generated_table_are_measured() -> None:
    report = report_of(*SMALL, "--mode", "host,session", "--num-keys", "1,20")
    assert report["ok"] and (report["rows"], report["dim"], report["device"]) == (400, 4, None)
    assert report["compared_with"] == "the generated rows" and report["keys"]["table_size"] == 400
    lines = [(result["mode"], result["num_keys"]) for result in report["results"]]
    assert lines == [("session", 50), ("session", 1), ("session", 20), ("host", 50), ("host", 1), ("host", 20)]
    for result in report["results"]:
        assert result["calls"] == 6 and result["counts"]["calls"] == 6
        assert result["counts"]["keys"] == result["counts"]["host_hits"] == 6 * result["num_keys"]
        assert (result["checked_rows"], result["wrong_rows"]) == (result["num_keys"], 0)


@pytest.mark.usefixtures("without_gpu")
def test_report_contains_all_fields() -> None:
    report = report_of(*SMALL)
    assert set(report) == {
        "ok", "version", "cpu", "cores", "gpus", "config", "model", "table", "rows", "dim", "dtype", "device", "keys", "seed",
        "threads", "warmup_iterations", "compared_with", "miss_rates", "results",
    }  # fmt: skip
    (result,) = report["results"]
    seconds = [result[f"{name}_seconds"] for name in ("min", "p50", "p95", "p99", "max")]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[0] <= result["mean_seconds"] <= seconds[-1]
    assert result["seconds"] >= result["mean_seconds"] * 6 * 0.999  # the wall time of all calls
    assert result["keys_per_second"] == pytest.approx(300 / result["seconds"])
    assert result["bytes_per_second"] == pytest.approx(result["keys_per_second"] * 16)
    assert result["rows_per_second"] == result["keys_per_second"] and result["host_hit_rate"] == 1.0
    assert "wall time" in result["timing"] and result["keys_in"] == "host"


@pytest.mark.usefixtures("without_gpu")
def test_report_is_written_to_a_file_and_a_table_to_the_terminal(tmp_path: Path) -> None:
    result = profile(*SMALL, "--mode", "session,host", "--json", tmp_path / "report.json")
    assert result.exit_code == 0 and "\x1b" not in result.output
    for words in ("p50", "p95", "p99", "keys/s", "100 rows were compared", "the same lookups", "host wall time"):
        assert words in result.stdout
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True


@pytest.mark.usefixtures("without_gpu")
def test_every_call_has_new_keys_and_warmup_is_not_counted(
    looked_up: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_profile_measure, "_ROUND_KEYS", 100)  # two calls of one thread a round
    (result,) = report_of(*SMALL, "--distribution", "uniform", "--rows", 10**5)["results"]
    assert len(looked_up) == 2 + 6 + 1 and len({keys.tobytes() for keys in looked_up}) == len(looked_up)
    assert result["calls"] == result["counts"]["calls"] == 6 and result["counts"]["keys"] == 300


@pytest.mark.usefixtures("without_gpu")
def test_threads_look_up_different_keys(looked_up: list[np.ndarray]) -> None:
    (result,) = report_of(*SMALL, "--threads", 3, "--distribution", "uniform")["results"]
    assert (result["threads"], result["calls"], result["counts"]["keys"]) == (3, 18, 900)
    assert len({keys.tobytes() for keys in looked_up}) == len(looked_up) == 3 * 8 + 1


@pytest.mark.usefixtures("without_gpu")
def test_equal_seeds_give_equal_keys(looked_up: list[np.ndarray]) -> None:
    for seed in (5, 5, 6):
        assert report_of(*SMALL, "--seed", seed)["ok"]
    first, same, other = (np.concatenate(looked_up[start : start + 9]) for start in (0, 9, 18))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


@pytest.mark.usefixtures("without_gpu")
def test_options_of_hps_profiler_are_accepted() -> None:
    report = report_of(
        "--lookup_session", "--database_backend", "--distribution", "hotKey", "--hot_key_percentage", 0.1,
        "--hot_key_coverage", 1.0, "--table_size", 50, "--num_key", 30, "--iterations", 4, "--warmup_iterations", 1,
        "--rows", 60, "--dim", 2,
    )  # fmt: skip
    assert [result["mode"] for result in report["results"]] == ["session", "host"]
    assert report["keys"] == {"distribution": "hotkey", "percentage": 0.1, "coverage": 1.0, "table_size": 50}
    assert report["warmup_iterations"] == 1 and report["results"][0]["num_keys"] == 30


def test_temporary_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert profile(*SMALL).exit_code == 0
    assert not list(tmp_path.iterdir())


# -- tables of a config ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "selection", [(), ("--table", 1), ("--table", "sparse_embedding1"), ("--model", "m", "--table", 0)], ids=str
)
@pytest.mark.parametrize("top", [{}, {"supportlonglong": False}, {"fuse_embedding_table": True}], ids=str)
def test_any_table_of_a_config_is_measured(
    config: Callable[..., Path], top: dict[str, Any], selection: tuple[Any, ...]
) -> None:
    report = report_of("--config", config(**top), *selection, "--num-keys", 30, "--iterations", 4)
    table = 1 if selection[-1:] in ((1,), ("sparse_embedding1",)) else 0
    assert (report["table"], report["dim"], report["rows"]) == (f"sparse_embedding{table}", (3, 5)[table], (300, 40)[table])
    (result,) = report["results"]
    assert result["default_rate"] == 0.0 and result["host_hit_rate"] == 1.0  # keys of the table, wherever they lie
    assert result["checked_rows"] == 30 and "one key" in report["compared_with"]


def test_absent_keys_are_counted(config: Callable[..., Path]) -> None:
    arguments = ("--config", config(), "--num-keys", 30, "--iterations", 4)
    (result,) = report_of(*arguments, "--table-size", 7)["results"]
    assert (result["default_rate"], result["rows_per_second"], result["wrong_rows"]) == (1.0, 0.0, 0)
    assert "Up to 100.00% of the keys had no row" in profile(*arguments, "--table-size", 7).stdout


def test_float16_output_is_measured(config: Callable[..., Path]) -> None:
    report = report_of("--config", config({"output_dtype": "float16"}), "--num-keys", 9, "--iterations", 3)
    assert report["ok"] and report["dtype"] == "float16"


# -- keys ---------------------------------------------------------------------


def chi_square_is_plausible(observed: np.ndarray, probabilities: np.ndarray) -> bool:
    """Within 6 standard deviations of the distribution; bins with fewer than 10 expected are merged."""
    expected = probabilities * observed.sum()
    rare = expected < 10
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    present = expected > 0
    assert not observed[~present].any()
    freedom = int(present.sum()) - 1
    statistic = float((((observed - expected) ** 2)[present] / expected[present]).sum())
    return statistic < freedom + 6 * math.sqrt(2 * freedom) + 6


def probabilities_of(name: str, n: int) -> np.ndarray:
    if name == "uniform":
        return np.full(n, 1 / n)
    if name == "histogram":
        return np.repeat([0.5, 0.0, 0.3, 0.2], n // 4) / (n // 4)
    if name == "hotkey":
        return np.where(np.arange(n) < n // 10, 0.7 / (n // 10), 0.3 / (n - n // 10))
    ends = np.clip(np.arange(n + 1) + 0.5, 1, n) ** (1 - 1.3)  # key k is y in k + 0.5 .. k + 1.5, cut to 1 .. n
    return np.diff((ends - 1) / (n ** (1 - 1.3) - 1))


@pytest.mark.parametrize("name", ["powerlaw", "hotkey", "histogram", "uniform"])
def test_keys_follow_their_distribution(name: str) -> None:
    n = 200
    chosen = chosen_distribution(name, alpha=1.3, percentage=0.1, coverage=0.7, weights="0.5 0 0.3,0.2")
    population = np.random.default_rng(1).permutation(n) - 100
    keys = DrawnKeys(chosen, population, seed=3).stream(0, 1).draw(100_000)
    ranks = np.argsort(population)[keys + 100]  # the position of a key in the population
    observed = np.bincount(ranks, minlength=n)
    assert chi_square_is_plausible(observed, probabilities_of(name, n))
    assert not chi_square_is_plausible(observed, probabilities_of("uniform" if name != "uniform" else "hotkey", n))


def test_streams_of_threads_differ_and_repeat() -> None:
    source = DrawnKeys(Distribution("uniform"), 10**6, seed=2)
    one, other, again = (source.stream(number, 2).draw(50) for number in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_replayed_keys_repeat_in_order(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", np.arange(10, dtype=np.uint32).reshape(2, 5))
    source = ReplayedKeys(tmp_path / "keys.npy")
    first, second = source.stream(0, 2), source.stream(1, 2)
    assert [first.draw(4).tolist() for _ in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert second.draw(12).tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6]


def test_keys_of_a_file_are_looked_up(tmp_path: Path, looked_up: list[np.ndarray], without_gpu: None) -> None:
    np.save(tmp_path / "keys.npy", np.arange(11) * 3)
    report = report_of(*SMALL, "--num-keys", 4, "--keys", tmp_path / "keys.npy")
    assert report["keys"] == {"keys_file": str(tmp_path / "keys.npy"), "keys_in_file": 11}
    sent = np.concatenate(looked_up[:8])  # calls of 50 keys
    np.testing.assert_array_equal(sent, np.arange(400) % 11 * 3)


@pytest.mark.parametrize("content", ["0.25, 0.75", "0.25\n0.75\n", np.array([0.25, 0.75])], ids=["commas", "lines", "npy"])
def test_histogram_weights_are_read_from_a_file(tmp_path: Path, content: Any) -> None:
    if isinstance(content, str):
        path = tmp_path / "weights.txt"
        path.write_text(content)
    else:
        path = tmp_path / "weights.npy"
        np.save(path, content)
    assert parse_weights(str(path)) == [0.25, 0.75]


# -- figures ---------------------------------------------------------------------


def test_percentiles_equal_those_of_numpy() -> None:
    seconds = np.array([0.5, 0.1, 0.9, 0.3, 0.2, 7.0])
    found = latency(seconds)
    assert [found[f"p{p}_seconds"] for p in (50, 95, 99)] == np.percentile(seconds, [50, 95, 99]).tolist()
    assert (found["min_seconds"], found["max_seconds"], found["mean_seconds"]) == (0.1, 7.0, pytest.approx(1.5))
    assert set(latency(np.array([0.25])).values()) == {0.25}


def test_modes_and_sizes_are_parsed() -> None:
    assert chosen_modes(None, {}) == ("session",)
    assert chosen_modes(["HOST, session", "host"], {"cache": True, "refresh": False}) == ("session", "host", "cache")
    assert (chosen_sizes(None), chosen_sizes(["1,20", "300"])) == ((1000,), (1, 20, 300))
    for wrong in ("0", "-1", "1.5", "", "1e3", "²"):
        with pytest.raises(typer.BadParameter):
            chosen_sizes([wrong])


# -- wrong rows ---------------------------------------------------------------------


@pytest.fixture
def one_flipped_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The true rows differ in the eighth row."""
    true_rows = GeneratedTable.true_rows

    def tampered(self: GeneratedTable, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
        def rows(keys: np.ndarray) -> np.ndarray:
            found = true_rows(self, folder)(keys)
            found.view(np.uint32)[7, 1] ^= 1
            return found

        return rows

    monkeypatch.setattr(GeneratedTable, "true_rows", tampered)


@pytest.mark.usefixtures("without_gpu", "one_flipped_bit")
def test_one_flipped_bit_fails() -> None:
    result = profile(*SMALL)
    assert result.exit_code == 1 and "FAILED: 1 of 50 rows differ from the generated rows" in result.stdout
    report = report_of(*SMALL, code=1)
    assert report["ok"] is False and report["results"][0]["wrong_rows"] == 1


@pytest.mark.usefixtures("without_gpu", "one_flipped_bit")
def test_row_missing_from_a_slower_tier_is_late_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, late = Target.counts, itertools.count()
    monkeypatch.setattr(Target, "counts", lambda self: {**counts(self), "unanswered": next(late)})
    (result,) = report_of(*SMALL)["results"]
    assert (result["wrong_rows"], result["late_rows"]) == (0, 1)


@pytest.mark.usefixtures("without_gpu")
def test_unwritten_rows_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "lookup", lambda *_: None)
    assert report_of(*SMALL, code=1)["results"][0]["wrong_rows"] == 50


# -- the cache ---------------------------------------------------------------------


class _FullCache:
    """Counts hits like a cache that keeps every key."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, keeps: bool = True) -> None:
        self.keys: set[int] = set()
        self.hits = 0
        self.refreshed: list[tuple[Any, ...]] = []
        lookup, counts = Target.lookup, Target.counts

        def counted(target: Target, keys: Any, out: Any, stream: Any) -> None:
            self.hits += sum(int(key) in self.keys for key in keys)
            self.keys |= set(keys.tolist()) if keeps else set()
            lookup(target, keys, out, stream)

        monkeypatch.setattr(Target, "lookup", counted)
        monkeypatch.setattr(Target, "counts", lambda target: {**counts(target), "cache_hits": self.hits})
        monkeypatch.setattr(HPS, "refresh", lambda _, *names: self.refreshed.append(names), raising=False)


@pytest.fixture
def cached_config(config: Callable[..., Path], without_gpu: None) -> Path:
    return config(cache_on_cpu=True)


def test_mode_cache_looks_up_only_cached_keys(cached_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _FullCache(monkeypatch)
    report = report_of("--config", cached_config, "--mode", "cache", "--num-keys", 25, "--iterations", 5)
    (result,) = report["results"]
    assert report["ok"] and result["cache_hit_rate"] == 1.0 and result["counts"]["keys"] == 125
    assert "in cache" in profile("--config", cached_config, "--mode", "session", "--num-keys", 5, "--iterations", 2).stdout


def test_mode_refresh_measures_refreshes(cached_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _FullCache(monkeypatch)
    (result,) = report_of("--config", cached_config, "--mode", "refresh", "--refreshes", 4, "--table", 1)["results"]
    assert cache.refreshed == [("m", 1)] * 5  # the first is not timed
    assert (result["calls"], result["wrong_rows"]) == (4, 0) and result["p50_seconds"] > 0
    cache.refreshed.clear()
    result = profile("--config", cached_config, "--refresh_embeddingcache", 0.02, "--iterations", 150)
    assert result.exit_code == 0 and "refresh" in result.stdout and len(cache.refreshed) == 4


def test_mode_cache_fails_with_a_cache_that_never_hits(cached_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _FullCache(monkeypatch, keeps=False)
    line = error_of("--config", cached_config, "--mode", "cache", code=1)
    assert "has no embedding cache: keys that were just looked up did not hit" in line


def test_mode_cache_fails_without_existing_keys(cached_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _FullCache(monkeypatch)
    line = error_of("--config", cached_config, "--mode", "cache", "--table-size", 5, code=1)
    assert "expected keys of the table, got none that has a row in hps_et.m.sparse_embedding0" in line


@pytest.mark.parametrize("mode", ["cache", "refresh"])
@pytest.mark.usefixtures("without_gpu")
def test_modes_that_need_a_cache_fail_without_one(config: Callable[..., Path], mode: str) -> None:
    assert "no CUDA device was found" in error_of(*SMALL, "--mode", f"session,{mode}", code=1)
    line = error_of("--config", config(), "--mode", mode, code=1)
    assert f"--mode {mode}: model 'm' has no embedding cache: no CUDA device was found, and cache_on_cpu is false" in line
    line = error_of("--config", config({"gpucache": False}, cache_on_cpu=True), "--mode", mode, code=1)
    assert line.endswith("has no embedding cache: gpucache is false")


# -- errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "turbo"), "expected one of session, host, cache, refresh, got 'turbo'"),
        (("--num-keys", "10,x"), "expected a number of 1 or more, got 'x'"),
        (("--distribution", "zipf"), "expected one of powerlaw, hotkey, histogram, uniform, got 'zipf'"),
        (("--alpha", "0"), "alpha: expected a finite number above 0, got 0.0"),
        (("--distribution", "histogram", "--histogram", "no/such file"), "or a file of numbers, got 'no/such file'"),
        (("--distribution", "histogram", "--histogram", "0,0"), "weights"),
        (
            ("--distribution", "histogram", "--histogram", "1,1,1", "--table-size", "2"),
            "weights: expected 1 to n = 2 bins, got 3",
        ),
        (("--hot-key-coverage", "1.5"), "--hot_key_coverage"),
        (("--iterations", "0"), "--iterations"),
        (("--threads", "0"), "--threads"),
        (("--table", "1"), "--table: is an option for a config only"),
        (("--config", "ps.json", "--dim", "4"), "--dim: is an option for a generated table only"),
        (("--json", "no/such/folder/report.json"), "expected a file in an existing directory, got no/such/folder/report.json"),
    ],
    ids=str,
)
def test_usage_errors(arguments: tuple[str, ...], words: str) -> None:
    small = () if "--config" in arguments else ("--rows", 10, "--dim", 2)
    assert words in error_of(*small, *arguments, code=2).replace("'--", "--").replace("': ", ": ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "x"), "--model: expected a model of the config, one of m, got 'x'"),
        (
            ("--table", "2"),
            "--table: expected a table of model 'm', one of sparse_embedding0, sparse_embedding1 (or 0 to 1), got '2'",
        ),
        (("--device", "3"), "--device: expected the CPU, which is 0 here, on which model 'm' is deployed, got 3"),
        (("--keys", "absent.npy"), "absent.npy"),
    ],
    ids=str,
)
def test_unknown_model_table_device_or_file(config: Callable[..., Path], arguments: tuple[str, ...], words: str) -> None:
    assert words in error_of("--config", config(), *arguments, code=1)


def test_missing_config(tmp_path: Path) -> None:
    assert "absent.json" in error_of("--config", tmp_path / "absent.json", code=1)


@pytest.mark.parametrize("content", [b"1 2 3", np.array([0.5]), np.array([], np.int64)], ids=["text", "floats", "none"])
def test_keys_file_without_keys(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "keys.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    assert f"{path}: " in error_of(*SMALL, "--keys", path, code=1)


# -- device memory ---------------------------------------------------------------------


class _Copied(np.ndarray):
    """An array "on a device", copied back by ``get``."""

    def get(self) -> np.ndarray:
        return np.asarray(self)


class _NamedBlock(contextlib.nullcontext[None]):
    """Stands for a device and a stream of CuPy, and records what is called."""

    def __init__(self, events: list[str], name: str) -> None:
        super().__init__()
        self.events, self.name = events, name

    def __enter__(self) -> None:
        self.events.append(f"enter {self.name}")

    def synchronize(self) -> None:
        self.events.append("synchronize")


def test_calls_with_device_keys_are_timed_until_their_stream_is_done(
    config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    cuda = SimpleNamespace(
        Device=lambda number: _NamedBlock(events, f"device {number}"),
        Stream=lambda non_blocking: _NamedBlock(events, "stream"),
    )
    cupy = SimpleNamespace(cuda=cuda, array=lambda keys: np.array(keys).view(_Copied))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(_profile_target, "cuda_devices", lambda: 2)
    monkeypatch.setattr(_profile_target, "has_cupy", lambda: True)
    lookup = Target.lookup

    def recorded(self: Target, keys: Any, out: Any, stream: Any) -> None:
        events.append(f"lookup of {type(keys).__name__}")
        lookup(self, np.asarray(keys), np.asarray(out), None)

    monkeypatch.setattr(Target, "lookup", recorded)
    path = config({"deployed_device_list": [1]})
    arguments = ("--config", path, "--num-keys", 10, "--iterations", 3, "--warmup-iterations", 0)
    report = report_of(*arguments, "--mode", "session,host")
    assert report["ok"] and report["device"] == 1 and report["compared_with"] == "host memory"
    session, host = report["results"]
    assert (session["keys_in"], host["keys_in"]) == ("device", "host") and "CUDA stream after each call" in session["timing"]
    first = events.index("lookup of _Copied")
    assert events[first - 2 : first + 6] == ["enter device 1", "enter stream", *["lookup of _Copied", "synchronize"] * 3]
    assert events.count("lookup of _Copied") == 4 and events.count("lookup of ndarray") == 4


# -- on a GPU ---------------------------------------------------------------------


@pytest.mark.gpu
def test_all_modes_on_a_gpu() -> None:
    sizes = ("--rows", 20_000, "--dim", 32, "--num-keys", "64,1000", "--iterations", 20, "--refreshes", 2)
    report = report_of(*sizes, "--mode", "session,host,cache,refresh", "--gpucacheper", 0.5)
    assert report["ok"] and report["device"] == 0
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for result in report["results"]:
        by_mode.setdefault(result["mode"], []).append(result)
    assert {mode: len(results) for mode, results in by_mode.items()} == {"session": 2, "host": 2, "cache": 2, "refresh": 1}
    for result in (*by_mode["session"], *by_mode["cache"]):
        assert result["keys_in"] == "device" and "CUDA stream" in result["timing"]
        assert result["counts"]["cache_hits"] > 0
    assert all(result["keys_in"] == "host" for result in by_mode["host"])
    assert min(result["cache_hit_rate"] for result in by_mode["cache"]) > 0.99


@pytest.mark.gpu
def test_threads_and_a_config_on_a_gpu(config: Callable[..., Path]) -> None:
    path = config({"deployed_device_list": [0], "gpucacheper": 1.0})
    report = report_of("--config", path, "--threads", 2, "--num-keys", 40, "--iterations", 10)
    assert report["ok"] and report["compared_with"] == "host memory" and report["results"][0]["calls"] == 20
