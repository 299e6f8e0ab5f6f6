"""The example that trains and serves, with a small file in the form of MovieLens-100k."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_ratings_of_a_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user, film = rng.integers(0, 40, 6000), rng.integers(0, 30, 6000)
    stars = np.where((user + film) % 2 == 0, 5, 1)  # odd users like odd films
    lines = [f"{one}\t{other}\t{given}\t{number}\n" for number, (one, other, given) in enumerate(zip(user, film, stars))]
    path = tmp_path / "ml-100k.inter"
    path.write_text("user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(lines))
    picture = tmp_path / "out.png"
    options = ["--movielens", str(path), "--epochs", "4", "--batch", "100", "--every", "0.05", "--out", str(picture)]
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_and_serve.py"), *options],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert "epoch 3: trained loss" in result.stdout and not result.stderr
    assert picture.exists() == (importlib.util.find_spec("matplotlib") is not None)
    for number in range(2):
        assert f"server {number}: judged" in result.stdout
