"""``hps-numba simulate``: tables, files, plots, the HTML page, advice, and errors."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.key_streams import MINE, skewed
from typer.testing import CliRunner, Result

from hps_numba import simulate
from hps_numba.cli import build
from hps_numba.errors import ConfigError
from hps_numba.simulate import plots


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "zipf <1>.npy"
    np.save(path, skewed(30_000, 3000))
    return path


def hps(*arguments: object) -> Result:
    return CliRunner().invoke(build(), ["simulate", *map(str, arguments)])


def test_table_contains_the_results(trace: Path) -> None:
    result = hps(trace, "--size", "10%,300", "--policy", "lru,arc", "--batch", 100, "--warmup", 0.1)
    assert result.exit_code == 0, result.output
    assert "30,000 requests" in result.output and "all but the first 3,000 requests" in result.output
    found = simulate.run(trace, ["lru", "arc"], ["10%,300"], batch=100, warmup=0.1, progress=False)
    for one in found.runs:
        name = f"{one.policy} (bound)" if one.bound else one.policy
        line = next(text for text in result.output.splitlines() if text.startswith(f"{name} ") and f" {one.rows:,} " in text)
        assert f"{found.select(policy=one.policy, rows=one.rows)[0].hit_rate:.2%}" in line
    assert all(len(line) <= 100 for line in result.output.splitlines() if line.startswith(("lru", "arc", "policy")))


def test_json_to_stdout(trace: Path) -> None:
    result = hps(trace, "--size", 300, "--policy", "lru", "--no-bounds", "--geometry", "gpu", "--json", "-")
    content = json.loads(result.stdout)
    assert [(one["policy"], one["rows"]) for one in content["runs"]] == [("lru", 300)] and content["trace"] == trace.name


def test_policy_from_a_file(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    options = ("--size", 300, "--policy", f"{tmp_path / 'mine.py'}:Fading", "--no-bounds")
    assert "runs code from a file" in hps(trace, *options).output
    result = hps(trace, *options, "--allow-code")
    assert result.exit_code == 0 and result.output.count("\nFading ") == 2


def test_advice_of_all_policies(trace: Path) -> None:
    result = hps(trace, "--advise", "--target-hit-rate", 0.7, "--batch", 64)
    assert result.exit_code == 0, result.output
    best = simulate.advise(trace, 0.7, batch=64, progress=False).best
    assert best is not None and f"with the least GPU memory: {best.policy}, {best.rows:,} rows" in result.output
    assert "Assumptions:" in result.output and "H200" in result.output and "empty cache" not in result.output


def test_advice_as_json_and_for_an_unreachable_target(trace: Path) -> None:
    options = ("--advise", "--policy", "lru,lfu", "--batch", 64)
    content = json.loads(hps(trace, *options, "--target-hit-rate", 0.7, "--json", "-").stdout)
    best = simulate.advise(trace, 0.7, ["lru", "lfu"], batch=64, progress=False).best
    assert best is not None and content["advice"]["best"]["rows"] == best.rows and "runs" not in content
    result = hps(trace, *options, "--target-hit-rate", 0.999)
    assert "No policy reaches a hit rate of 99.9%" in result.output and "never full has" in result.output


def test_sample_is_reported_with_its_error(trace: Path) -> None:
    result = hps(trace, "--size", 1500, "--policy", "lru", "--sample", 0.5)
    assert result.exit_code == 0 and "estimated from 0.5 of the keys" in result.output and "95 % interval" in result.output


class Page(HTMLParser):
    """The elements of a page, the links that it loads, and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.loads: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        if tag not in ("meta", "br", "image", "path", "use", "rect", "stop"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_files_contain_the_results(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--size", "100,400,1500", "--policy", "lru,s3fifo", "--warmup", 0.2, "--advise", "--target-hit-rate", 0.7)
    names = {option: tmp_path / name for option, name in (("--csv", "r.csv"), ("--json", "r.json"), ("--plot", "r.png"))}
    result = hps(trace, *options, "--html", tmp_path / "r.html", *(word for pair in names.items() for word in pair))
    assert result.exit_code == 0, result.output
    content = json.loads(names["--json"].read_text())
    assert len(names["--csv"].read_text().splitlines()) == 1 + len(content["runs"]) and "advice" in content
    plot = names["--plot"].read_bytes()
    assert plot.startswith(b"\x89PNG") and len(plot) > 50_000
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.open == [] and page.elements.count("svg") == 3 and page.elements.count("table") == 3
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.loads), "the page loads nothing"
    assert "script" not in page.elements and "@import" not in text and "url(http" not in text
    assert "zipf <1>.npy" in page.text and "<1>" not in re.sub(r"<style>.*?</style>", "", text)
    for run in content["runs"]:
        assert f"{run['hit_rate']:.2%}" in page.cells
    best = content["advice"]["best"]
    assert f"{best['rows']:,} rows" in page.text and "all but the first" in page.text


@pytest.mark.parametrize("ending", [".svg", ".pdf"])
def test_plots_in_other_formats(trace: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    result = simulate.run(trace, "lru", "100,400", progress=False)
    simulate.write_plot(result, tmp_path / f"p{ending}", rows=400)
    assert (tmp_path / f"p{ending}").stat().st_size > 5000
    with pytest.raises(ConfigError, match="rows: expected a simulated size, one of 100, 400, got 401"):
        simulate.write_plot(result, tmp_path / f"p{ending}", rows=401)


def axes_of(result: simulate.Simulation, rows: int | None = None) -> dict[str, Any]:
    return {name: figure.axes[0] for name, figure in plots.figures(result, rows).items()}


def test_plots_show_the_results(trace: Path) -> None:
    """Axes start at zero and are labelled with units, and every line has the values of its runs."""
    pytest.importorskip("matplotlib")
    result = simulate.run(trace, ["lru", "arc"], "100,400,1500", warmup=0.2, progress=False)
    axes = axes_of(result)
    curves = axes["curves"]
    assert curves.get_ylim() == (0, 100) and curves.get_xscale() == "log"
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("cache size, rows", "hit rate, share of requests")
    assert [text.get_text() for text in curves.get_xticklabels()] == ["100", "400", "1.5 k"]
    lines = {line.get_label(): line for line in curves.get_lines()}
    assert set(lines) == {
        "lru, GPU sets", "lru, associative", "arc, associative", "belady (optimum)", "infinite cache (ceiling)",
    }  # fmt: skip
    runs = result.select(policy="lru", geometry="gpu")
    assert list(lines["lru, GPU sets"].get_xdata()) == [run.rows for run in runs]
    assert list(lines["lru, GPU sets"].get_ydata()) == [100 * run.hit_rate for run in runs]
    assert any("first 5,120 requests not counted" in text.get_text() for text in curves.texts)
    time = axes["time"]
    assert time.get_title("left") == "Hit rate over time, cache of 400 rows" and time.get_xlim() == (0, 30_000)
    line = next(line for line in time.get_lines() if line.get_label() == "arc, associative")
    (run,) = result.select(policy="arc", rows=400)
    assert np.allclose(line.get_ydata(), 100 * run.by_window / result.windows)
    heat = axes["heat"]
    assert heat.get_xlabel() == "requests so far" and heat.get_ylabel() == "keys by popularity"
    assert heat.get_yticklabels()[-1].get_text().endswith(f" to {result.distinct:,}")


def test_plot_without_matplotlib_names_the_extra(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.simulate.plots.find_spec", lambda name: None)
    for option in ("--plot", "--html"):
        failed = hps(trace, option, tmp_path / "r.png")
        assert failed.exit_code == 1 and 'error: plots need matplotlib: pip install "hps-numba[plot]"' in failed.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-hit-rate", 0.5), "is an option for --advise only"),
        (("--csv", "/no/such/folder/r.csv"), "expected a file in an existing directory, got /no/such/folder/r.csv"),
        (("--html", "."), "expected a file in an existing directory, got ."),
        (("--batch", 0), "Invalid value for '--batch'"),
    ],
)
def test_usage_errors(trace: Path, options: tuple[object, ...], message: str) -> None:
    result = hps(trace, *options)
    assert result.exit_code == 2 and message in re.sub(r"[\s│]+", " ", result.output)


def test_plot_that_cannot_be_saved_is_rejected(trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for path, message in (
        (tmp_path / "p.gif", "ends in .png, .svg, .pdf"),
        (tmp_path / "none" / "p.png", "an existing directory"),
    ):
        assert message in hps(trace, "--plot", path).output
