"""Every host benchmark runs with ``--quick``, prints its tables and writes its figures as JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT, environment
from support.servers import program
from support.waiting import HANG_SECONDS

FOLDER = ROOT / "benchmarks" / "host"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")


def run(name: str, tmp_path: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """The output of ``name``, and its JSON file."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(report.read_text())


def numbers(value: Any) -> Iterator[float]:
    """All floats in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def check(printed: str, report: dict[str, Any]) -> None:
    """The machine is described, the sizes are marked as too small, a target is judged, and all figures are positive."""
    assert report["quick"] is True and "--quick" in printed
    assert report["machine"]["cores"] >= 1 and f"numpy {report['machine']['numpy']}" in printed
    assert "met (" in printed or "missed (" in printed
    found = list(numbers({name: part for name, part in report.items() if name != "machine"}))
    assert found and all(math.isfinite(number) and number > 0 for number in found)


def test_lookup_measures_every_candidate(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed, report = run("lookup", tmp_path, "--dims", "16", "128")
    check(printed, report)
    assert [width["dim"] for width in report["widths"]] == [16, 128]
    for width in report["widths"]:
        assert {(row["name"], row["threads"]) for row in width["large"]} >= {("HPS.lookup", 2), ("torch.index_select", 1)}
        assert list(width["small_us"]) == ["1", "64", "1024"]


def test_training_measures_every_candidate(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed, report = run("training", tmp_path, "--dims", "16")
    check(printed, report)
    (width,) = report["widths"]
    names = [row["name"] for row in width["batches"][0]["candidates"]]
    assert names == ["sgd", "adagrad", "adam", "HPS.insert", "summed", "torch.optim.SGD", "torch.optim.SparseAdam"]


@linux_only
def test_loading_measures_every_kind_and_removes_the_model(tmp_path: Path) -> None:
    printed, report = run("loading", tmp_path, "--folder", str(tmp_path))
    assert [row["name"] for row in report["results"]] == ["first server", "next server", "next server, HDF5", "numpy.fromfile"]
    check(printed, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"], "the model was not removed"


def test_startup_measures_cold_and_warm_starts(tmp_path: Path) -> None:
    printed, report = run("startup", tmp_path)
    check(printed, report)
    found = report["kernels_found"]
    assert {row["name"] for row in report["results"]} == {"python", "import hps_numba", *found}
    assert found["first lookup, empty kernel cache"] == 0 < found["first lookup, warm kernel cache"]
    assert {"import numba", "first lookup", "second lookup"} <= report["stages"].keys()


def test_overhead_measures_every_layer(tmp_path: Path) -> None:
    printed, report = run("overhead", tmp_path)
    assert report["quick"] is True and "--quick" in printed and "HPS.lookup(out=)" in printed
    for batch in ("1", "64"):
        times = report["microseconds"][batch]
        assert {"host_lookup (kernel)", "HostStore.lookup", "ServedTable.lookup", "HPS.lookup(out=)"} < times.keys()
        assert "numpy.take(out=)" in times and all(0 < time < math.inf for some in times.values() for time in some)


def test_metrics_measures_lookups_texts_and_requests(tmp_path: Path) -> None:
    printed, report = run("metrics", tmp_path)
    assert report["quick"] is True and "--quick" in printed and ("met (" in printed or "missed (" in printed)
    assert [row["keys"] for row in report["lookups"]] == [1, 32]
    assert all(row["timed_ns"] > 0 and row["not_timed_ns"] > 0 and math.isfinite(row["cost_ns"]) for row in report["lookups"])
    assert all(figure > 0 for figure in report["texts"].values()) and report["texts"]["lines"] > 26 * 40
    assert report["request_us"] > 0


def test_tensorflow_layer_measures_overhead_and_dlrm(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    printed, report = run("tensorflow_layer", tmp_path)
    assert report["quick"] is True and ("met (" in printed or "missed (" in printed)
    assert {"layer in a graph", "HPS.lookup(out=)", "bare py_function"} <= report["layer_us"]["32"].keys()
    assert all(time > 0 for times in report["dlrm_us"].values() for time in times.values())


def test_batching_measures_every_number_of_clients(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed, report = run("batching", tmp_path, "--tables", "2")
    assert "--quick" in printed and "in this process" in printed
    assert [(row["delay_us"], row["clients"]) for row in report["results"]] == [
        (delay, clients) for delay in (None, 0, 500) for clients in (1, 8, 32)
    ]
    assert all(row["requests_per_second"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"] for row in report["results"])


def test_tiers_runs_every_part_that_it_can(tmp_path: Path) -> None:
    parts = tmp_path / "parts_of_a_test"
    parts.mkdir()
    (parts / "_shared.py").write_text("SPEED = '5 rows/s'\n")
    (parts / "good.py").write_text(
        "from report import print_table\nfrom parts_of_a_test._shared import SPEED\n"
        "def run(quick):\n    print_table('a table', ('what', 'rate'), [('good', SPEED if quick else '')])\n"
    )
    missing = "raise FileNotFoundError(2, 'No such file or directory', 'redis-server')"
    (parts / "missing.py").write_text(f"def run(quick):\n    {missing}\n")
    (parts / "without.py").write_text("import no_such_package\n")
    printed, report = run("tiers", tmp_path, "--parts", str(parts))
    assert [part["name"] for part in report["parts"]] == ["good", "missing", "without"] and "--quick" in printed
    good, missing_part, without = report["parts"]
    assert good["tables"] == [{"title": "a table", "head": ["what", "rate"], "rows": [["good", "5 rows/s"]]}]
    assert good["skipped"] is None and "redis-server" in missing_part["skipped"] and "no_such_package" in without["skipped"]
    assert printed.count("skipped: ") == 2 and "5 rows/s" in printed
    _, report = run("tiers", tmp_path, "--parts", str(parts), "--only", "good")
    assert [part["name"] for part in report["parts"]] == ["good"]


def test_a_part_of_tiers_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    parts = tmp_path / "failing_parts"
    parts.mkdir()
    (parts / "bad.py").write_text("def run(quick):\n    raise AssertionError('a row is wrong')\n")
    (parts / "good.py").write_text("def run(quick):\n    print('measured')\n")
    command = [sys.executable, str(FOLDER / "tiers.py"), "--quick", "--parts", str(parts)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 1 and "FAILED: AssertionError: a row is wrong" in done.stdout and "measured" in done.stdout
    done = subprocess.run([*command, "--only", "x"], capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 2 and "expected some of bad, good, got x" in done.stderr


def test_no_part_of_tiers_fails(tmp_path: Path) -> None:
    printed, report = run("tiers", tmp_path)
    assert [part["name"] for part in report["parts"]] == sorted(path.stem for path in (FOLDER / "tier_parts").glob("[!_]*.py"))
    for part in report["parts"]:
        assert part["failed"] is None and f"== {part['name']}" in printed
        assert part["skipped"] or part["tables"]


@pytest.mark.parametrize("bus", ["in_process", "files", "redis_streams"])
def test_updates_measures_freshness_and_lookups(tmp_path: Path, bus: str) -> None:
    if bus == "redis_streams":
        pytest.importorskip("redis")
        program("redis-server", "redis-server")
    printed, report = run("updates", tmp_path, "--bus", bus)
    check(printed, report)
    before, *others = report["buses"][bus]
    assert before["rate"] == 0 and [one["rate"] for one in others] == [10_000, 100_000]
    assert all(one["ticks"] > 0 and one["freshness_p50"] <= one["freshness_p99"] <= one["freshness_max"] for one in others)


def check_sweep(figures: list[dict[str, Any]], whos: set[str]) -> None:
    """Every batch at every hit rate, with and without updates, and who stands beside where all keys hit."""
    assert {(one["batch"], one["hit_rate"]) for one in figures} == {(n, rate) for n in (32, 64) for rate in (100.0, 95.0, 80.0)}
    assert {one["who"] for one in figures if one["hit_rate"] == 100} >= whos
    assert all(0 < one["median"] <= one["p99"] < math.inf for one in figures)


def test_published_sweep_measures_every_batch_and_hit_rate(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed, report = run("published_sweep", tmp_path, "--dlrm")
    figures, whos = report["figures"], {"HPS.lookup(out=)", "Torch layer", "F.embedding"}
    check_sweep(figures, whos)
    assert {one["updates"] for one in figures} == {False, True}
    assert all(abs(one["hits"] - one["hit_rate"]) < 1 for one in figures if one["who"] == "HPS.lookup(out=)")
    assert {one["who"] for one in report["dlrm"]} == {"Torch layer", "F.embedding"}
    judged = {(one["batch"], one["ours"]) for one in report["verdicts"]}
    assert judged >= {(n, who) for n in (32, 64) for who in ("HPS.lookup(out=)", "Torch layer")}
    assert all(("met" in one["target"]) == (one["ratio"] <= 1) for one in report["verdicts"])
    assert "80 % hits, beside updates" in printed and "DLRM: 95 % hits" in printed


def test_published_sweep_of_the_gpu_cache_runs_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    report, script = tmp_path / "report.json", ROOT / "benchmarks" / "device" / "published_sweep.py"
    plot = ("--plot", str(tmp_path / "p.png")) if importlib.util.find_spec("matplotlib") else ()
    command = [sys.executable, str(script), "--on-cpu", "--json", str(report), *plot]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    sections = [part for name, part in found["figures"].items() if "verdicts" not in name]
    check_sweep([one for part in sections for one in part], {"HPS.lookup(out=)", "Torch layer", "F.embedding"})
    hits = {
        rate: [one["hits"] for part in sections for one in part if one["hit_rate"] == rate and one["hits"]]
        for rate in (100.0, 80.0)
    }
    assert min(hits[100.0]) > max(hits[80.0]) > 50  # as the cache counted them
    assert not plot or (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_serving_measures_every_server_that_can_run(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    printed, report = run("serving", tmp_path, "--no-triton", "--concurrency", "1")
    cases = {(one["size"], one["concurrency"]) for one in report["results"]}
    sizes = ("32 keys, 4 KB", "8,192 keys, 1 MB", "2,048 keys, 1 MB")
    assert cases == {(size, 1) for size in sizes}
    for one in report["results"]:
        assert {"ours, HTTP"} <= set(one["servers"])
        assert (importlib.util.find_spec("fastapi") is None) == ("FastAPI" not in one["servers"])
        assert all(0 < server["p50_seconds"] <= server["p99_seconds"] < math.inf for server in one["servers"].values())
    assert "p99 m" in printed and any(one["target"].startswith("p99 ") for one in report["verdicts"])


def test_every_benchmark_is_in_the_readme() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    scripts = [path for path in FOLDER.glob("*.py") if "def main" in path.read_text()]
    assert scripts and all(f"](host/{path.name})" in text for path in scripts)


def test_simulate_agrees_with_libcachesim(tmp_path: Path) -> None:
    printed, report = run("simulate", tmp_path)
    assert report["quick"] is True and "--quick" in printed and ("met (" in printed or "missed (" in printed)
    peers, sets = report["peers"], report["sets"]
    assert {line["algorithm"] for line in peers} >= {"lru", "lfu", "arc", "belady"}
    assert {line["trace"] for line in peers} == {"Zipf 1.0", "Zipf with scans"}
    for line in peers:
        assert 0 < line["miss_ratio"] < 1 and line["requests_per_second"] > 0
        if "libcachesim_miss_ratio" in line and line["algorithm"] in ("lru", "fifo", "lfu", "clock", "sieve", "s3fifo", "arc"):
            assert line["miss_ratio"] == pytest.approx(line["libcachesim_miss_ratio"], abs=1e-9)
    assert {line["policy"] for line in sets} >= {"lru", "lfu", "fifo"}
    assert all(0 < line["gpu_64"] < 1 and 0 < line["gpu_1024"] < 1 for line in sets)
