"""``examples/gpu_cache.py``, small and on the CPU: the cache follows the traffic, the plot is drawn, options are checked."""

from __future__ import annotations

import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

EXAMPLE = ROOT / "examples" / "gpu_cache.py"
SMALL = ("--rows", "3000", "--dim", "4", "--batches", "20", "--batch", "300")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *SMALL, *options]
    # no device, so that every machine takes the same way
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(CUDA_VISIBLE_DEVICES=""), timeout=HANG_SECONDS
    )


def hit_rates(printed: str) -> list[float]:
    return [float(rate) for rate in re.findall(r"to +\d+ +([\d.]+)%", printed)]


def counts(printed: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:hits|misses|insertions|evictions)", printed)]


def test_small_cache_serves_every_row_and_follows_the_traffic(tmp_path: Path) -> None:
    picture = tmp_path / "cache.png"
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    done = run("--gpucacheper", "0.2", *(["--out", str(picture)] if has_matplotlib else []))
    assert done.returncode == 0, done.stderr
    assert "cache_on_cpu" in done.stdout and "all 6,000 rows equal those of the model" in done.stdout and not done.stderr
    rates = hit_rates(done.stdout)
    assert len(rates) == 10 and rates[5] < rates[4], "the shift of the traffic does not show"
    assert 0 < rates[9] < 100 and rates[9] > rates[5], "the cache did not follow"
    hits, misses, inserted, evicted = counts(done.stdout)
    assert hits + misses == 6000 + 300  # and the batch that compiled the kernels
    assert 0 < evicted <= inserted <= misses
    if has_matplotlib:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_whole_table_in_the_cache_never_misses() -> None:
    done = run("--gpucacheper", "1.0")
    assert done.returncode == 0, done.stderr
    assert hit_rates(done.stdout) == [100.0] * 10
    hits, misses, inserted, evicted = counts(done.stdout)
    assert (hits, misses, inserted, evicted) == (6300, 0, 0, 0)


@pytest.mark.parametrize(("option", "value"), [("--rows", "0"), ("--batch", "-1"), ("--gpucacheper", "1.5")])
def test_bad_option_is_refused_in_one_line(option: str, value: str) -> None:
    done = run(option, value)
    assert done.returncode == 2 and not done.stdout
    line = done.stderr.splitlines()[-1]
    assert f"{option}: expected " in line and line.endswith(f"got {value}")


def test_picture_without_matplotlib_says_what_to_install() -> None:
    hide = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'matplotlib' else find(n)"
    start = f"import sys, runpy; sys.argv[1:] = ['--out', 'x.png']; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    command = [sys.executable, "-c", f"{hide}; {start}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == 'the plot needs matplotlib: pip install "hps-numba[plot]"'


def test_traffic_turns_to_other_rows_in_the_middle() -> None:
    names = runpy.run_path(str(EXAMPLE))
    options = names["options_of"]([*SMALL, "--batches", "10"])
    batches = names["traffic"](options)
    assert [len(batch) for batch in batches] == [300] * 10 and all(0 <= batch.min() <= batch.max() < 3000 for batch in batches)
    favourites = [np.bincount(np.concatenate(part), minlength=3000).argmax() for part in (batches[:5], batches[5:])]
    assert favourites[0] != favourites[1]
