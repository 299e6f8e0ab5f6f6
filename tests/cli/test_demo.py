"""``hps-numba demo``: it serves and checks every row, and fails on a wrong row or a wrong counter."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from hps_numba import HPS, generate_model, read_config
from hps_numba.cli import build
from hps_numba.cli._demo_run import Demo, write_config
from hps_numba.cli._demo_traffic import CALLS, DEFAULT_VALUE, KEYS_PER_SAMPLE, run_traffic
from hps_numba.simulate import plots

ROWS, DIM = 2000, 8
HUGECTR_KEYS = {
    "supportlonglong", "models", "volatile_db", "type", "model", "sparse_files", "embedding_vecsize_per_table",
    "maxnum_catfeature_query_per_table_per_sample", "default_value_for_each_table", "deployed_device_list", "max_batch_size",
    "embedding_table_names",
}  # fmt: skip


def demo(*arguments: str, seconds: float = 0.1) -> Result:
    shape = ["--rows", str(ROWS), "--dim", str(DIM), "--seconds", str(seconds), "--threads", "2"]
    return CliRunner().invoke(build(), ["demo", *shape, *arguments])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[HPS, np.ndarray]]:
    """A server for the model of the demo, and its rows followed by the default row."""
    generate_model(tmp_path / "demo.model", ROWS, DIM, seed=3)
    write_config(tmp_path / "ps.json", "demo.model", DIM)
    with HPS(tmp_path / "ps.json") as server:
        rows = np.random.default_rng(3).random((ROWS, DIM), np.float32) * np.float32(2) + np.float32(-1)
        yield server, np.vstack([rows, np.full((1, DIM), DEFAULT_VALUE, np.float32)])


def test_demo_serves_correct_rows() -> None:
    result = demo("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] and report["wrong_rows"] == 0
    assert report["hits"] + report["defaults"] == report["keys"]
    assert report["defaults"] == report["strangers"] > 0
    assert [line["samples"] for line in report["latency"]] == list(CALLS)
    for line in report["latency"]:
        assert 0 < line["p50_seconds"] <= line["p95_seconds"] <= line["p99_seconds"] <= line["max_seconds"]
    assert report["served_from"] == "host memory" and report["planned_bytes"] >= report["used_bytes"] > ROWS * DIM * 4
    assert report["keys"] == sum(line["requests"] * line["keys"] for line in report["latency"])


def test_demo_prints_a_summary() -> None:
    result = demo()
    assert result.exit_code == 0
    assert "wrong rows  0" in result.stdout and "rows equal the generated ones, bit by bit" in result.stdout
    assert "\x1b" not in result.output
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("serve")) <= 140


def test_demo_removes_its_files_unless_told_to_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert demo().exit_code == 0
    assert not list(tmp_path.iterdir())
    kept = json.loads(demo("--keep", "--json").stdout)["folder"]
    assert sorted(file.name for file in Path(kept).iterdir()) == ["demo.model", "demo_ps_config.json"]


def test_demo_folder_can_be_reused(tmp_path: Path) -> None:
    for _ in range(2):
        assert demo("--folder", str(tmp_path / "work")).exit_code == 0
    assert (tmp_path / "work" / "demo.model" / "key").stat().st_size == 8 * ROWS


def test_demo_config_has_only_keys_of_hugectr(tmp_path: Path) -> None:
    write_config(tmp_path / "ps.json", "demo.model", DIM)

    def keys_of(value: Any) -> set[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return set(value if isinstance(value, dict) else ()).union(*map(keys_of, inner))

    assert keys_of(json.loads((tmp_path / "ps.json").read_text())) <= HUGECTR_KEYS
    read_config(tmp_path / "ps.json", strict=True)


def test_one_flipped_bit_is_a_wrong_row(served: tuple[HPS, np.ndarray]) -> None:
    server, rows = served
    assert run_traffic(server, rows, threads=1, seconds=0.01, seed=0).wrong_rows == 0
    rows.view(np.uint32)[0, -1] ^= 1  # the last bit of the last value of the most frequent key
    traffic = run_traffic(server, rows, threads=2, seconds=0.01, seed=0)
    assert 0 < traffic.wrong_rows < traffic.keys


def test_a_changed_default_is_a_wrong_row(served: tuple[HPS, np.ndarray]) -> None:
    server, rows = served
    server.insert([-1], np.full((1, DIM), DEFAULT_VALUE + 1, np.float32), "demo", 0)
    assert run_traffic(server, rows, threads=1, seconds=0.01, seed=0).wrong_rows > 0


def test_an_unwritten_row_is_a_wrong_row(served: tuple[HPS, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    server, rows = served
    monkeypatch.setattr(HPS, "lookup", lambda self, keys, model, table, *, out: out)
    traffic = run_traffic(server, rows, threads=1, seconds=0.01, seed=0)
    assert (
        traffic.wrong_rows
        == traffic.keys
        == KEYS_PER_SAMPLE * sum(n * calls for n, calls in CALLS.items()) * len(traffic.rounds)
    )


def test_demo_fails_on_a_wrong_row(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Demo._expected

    def tampered(self: Demo) -> np.ndarray:
        rows = expected(self)
        rows[0] += 1
        return rows

    monkeypatch.setattr(Demo, "_expected", tampered)
    result = demo()
    assert result.exit_code == 1
    assert "FAILED: some rows differ" in result.stdout
    assert json.loads(demo("--json").stdout)["ok"] is False


def test_demo_fails_on_wrong_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.server.stats.TableStats.defaults", property(lambda self: self.absent + 1))
    result = demo()
    assert result.exit_code == 1
    assert "the counters of the server do not agree with the requests" in result.stdout


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_demo_saves_a_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    plot = tmp_path / f"demo{suffix}"
    assert demo("--plot", str(plot)).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize("name", ["demo.txt", "absent/demo.png"])
def test_plot_that_cannot_be_saved_is_rejected_at_once(tmp_path: Path, name: str) -> None:
    result = demo("--plot", str(tmp_path / name))
    assert result.exit_code == 1 and not result.stdout
    assert result.stderr.startswith("error: plot: expected a file") and len(result.stderr.splitlines()) == 1


def test_plot_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(plots, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    result = demo("--plot", str(tmp_path / "demo.png"))
    assert result.exit_code == 1
    assert result.stderr == 'error: plots need matplotlib: pip install "hps-numba[plot]"\n'
