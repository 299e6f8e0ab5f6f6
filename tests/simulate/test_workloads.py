"""Synthetic models and key distributions (checklist O03, O05). Frequencies are compared with exact probabilities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.sample_models import FORMATS, part, path_for
from support.steps import steps_of

import hps_numba.simulate.workloads
from hps_numba.errors import ModelFileError
from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS, generate_model, histogram, hot_key, power_law, uniform
from hps_numba.storage.model_files import open_model

WRITABLE = [name for name in FORMATS if part(name).can_write]
every_distribution = pytest.mark.parametrize("draw", KEY_DISTRIBUTIONS.values(), ids=KEY_DISTRIBUTIONS.keys())


def load(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with open_model(path) as model:
        keys, rows = np.empty(model.rows, np.int64), np.empty((model.rows, model.dim), np.float32)
        model.read(0, model.rows, keys, rows)
        return keys, rows


@pytest.mark.parametrize("name", WRITABLE)
def test_model_has_keys_from_0_and_uniform_values(name: str, tmp_path: Path) -> None:
    path = path_for(tmp_path, name)
    seen: list[tuple[int, int]] = []
    assert generate_model(path, 20_000, 7, seed=3, on_progress=lambda *at: seen.append(at)) == 20_000
    keys, rows = load(path)
    assert keys.tolist() == list(range(20_000)) and seen[-1] == (20_000, 20_000)
    assert rows.min() >= -1 and rows.max() < 1
    counts = np.histogram(rows, bins=64, range=(-1, 1))[0]
    assert chi_square(counts, np.full(64, 1 / 64)) < 130
    expected = np.random.default_rng(3).random((20_000, 7), np.float32) * np.float32(2) - np.float32(1)
    assert rows.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dim", [1, 3, 16])
def test_rows_depend_on_the_seed_but_not_on_chunks(dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_model(tmp_path / "whole", 101, dim, seed=5)
    generate_model(tmp_path / "other", 101, dim, seed=6)
    expected = load(tmp_path / "whole")[1]
    assert load(tmp_path / "other")[1].tobytes() != expected.tobytes()
    for step in (1, 7, 50):
        monkeypatch.setattr(hps_numba.simulate.workloads, "rows_per_chunk", lambda dim, step=step: step)
        generate_model(tmp_path / f"{step}.h5", 101, dim, seed=5)
        assert load(tmp_path / f"{step}.h5")[1].tobytes() == expected.tobytes()
        generate_model(tmp_path / f"{step}", 60, dim, seed=5)
        assert load(tmp_path / f"{step}")[1].tobytes() == expected[:60].tobytes()


def test_bounds_and_invalid_arguments_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    generate_model(path, 1000, 4, low=2.0, high=5.0)
    rows = load(path)[1]
    assert 2 <= rows.min() < 2.1 and 4.9 < rows.max() <= 5
    with pytest.raises(ModelFileError, match="exists already"):
        generate_model(path, 1, 1)
    generate_model(path, 3, 1, low=7, high=7, overwrite=True, format="hdf5")
    assert load(path)[1].tolist() == [[7.0]] * 3
    for bad, expected in (
        ({"rows": -1}, "rows: .*, got -1"),
        ({"dim": 0}, "dim: .*, got 0"),
        ({"low": 2.0}, "low, high: .*, got 2.0, 1.0"),
        ({"high": float("inf")}, "low, high: .*, got -1.0, inf"),
        ({"low": float("nan")}, "low, high: .*, got nan"),
        ({"low": -3e38, "high": 3e38}, "low, high"),
        ({"high": 1e39}, "low, high"),
    ):
        with pytest.raises(ValueError, match=expected):
            generate_model(tmp_path / "bad", **({"rows": 1, "dim": 1} | bad))  # type: ignore[arg-type]
    assert generate_model(tmp_path / "empty.h5", 0, 4) == 0


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The statistic, to compare with ``limit``, which is exceeded with a probability of 10**-6 or less."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum())


def limit(bins: int) -> float:
    return bins + 5 * (2 * bins) ** 0.5 + 12


def power_law_probabilities(n: int, alpha: float) -> np.ndarray:
    """P(key = k) = P(k + 1/2 <= y < k + 3/2) with P(y <= t) = (t**(1 - alpha) - 1) / (n**(1 - alpha) - 1), y in [1, n]."""
    t = np.clip(np.arange(n + 1) + 0.5, 1, n)
    below = np.log(t) / np.log(n) if alpha == 1 else (t ** (1 - alpha) - 1) / (float(n) ** (1 - alpha) - 1)
    return np.diff(below)


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0, 1.2, 3.0])
@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_power_law(n: int, alpha: float) -> None:
    keys = power_law(n, 100_000, alpha, rng=n)
    counts = np.bincount(keys, minlength=n)
    assert keys.dtype == np.int64 and len(counts) == n
    assert chi_square(counts, power_law_probabilities(n, alpha)) < limit(n)


def test_power_law_equals_the_formula_of_hugectr() -> None:
    n, alpha = 1000, 1.2
    x = np.random.default_rng(4).random(10_000)
    y = ((float(n) ** (1 - alpha) - 1) * x + 1) ** (1 / (1 - alpha))
    assert power_law(n, 10_000, alpha, rng=4).tolist() == (np.rint(y) - 1).astype(int).tolist()


@pytest.mark.parametrize("alpha", [1e-9, 0.5, 1 - 1e-12, 1.0, 1 + 1e-12, 2.0, 60.0, 1e300])
@pytest.mark.parametrize("n", [1, 2, 2**31, 2**53])
def test_power_law_stays_in_range(n: int, alpha: float) -> None:
    keys = power_law(n, 20_000, alpha, rng=0)
    assert keys.min() >= 0 and keys.max() < n
    if n == 2**53 and alpha < 1.1:
        assert keys.max() > n // 4


@pytest.mark.parametrize(
    ("n", "percentage", "coverage", "hot"),
    [
        (100, 0.2, 0.8, 20),
        (10, 0.29, 0.5, 3),
        (10, 0.0, 0.3, 1),
        (7, 1.0, 0.3, 7),
        (7, 0.5, 0.0, 4),
        (7, 0.5, 1.0, 4),
        (1, 0.5, 0.5, 1),
    ],
)
def test_hot_key(n: int, percentage: float, coverage: float, hot: int) -> None:
    counts = np.bincount(hot_key(n, 100_000, percentage, coverage, rng=1), minlength=n)
    assert len(counts) == n
    probabilities = np.full(n, 1 / n)
    if hot < n:
        probabilities[:hot], probabilities[hot:] = coverage / hot, (1 - coverage) / (n - hot)
    assert chi_square(counts, probabilities) < limit(n)


@pytest.mark.parametrize("weights", [(0.4, 0.3, 0.2, 0.1), (1,), (0, 5, 0), (1, 0), (3, 0, 1, 1, 0, 2, 9)])
@pytest.mark.parametrize("n", [7, 10, 101])
def test_histogram(n: int, weights: tuple[float, ...]) -> None:
    counts = np.bincount(histogram(n, 100_000, weights, rng=2), minlength=n)
    assert len(counts) == n
    probabilities = np.zeros(n)
    for number, weight in enumerate(weights):
        start, stop = number * n // len(weights), (number + 1) * n // len(weights)
        probabilities[start:stop] = weight / sum(weights) / (stop - start)
    assert chi_square(counts, probabilities) < limit(n)


def test_uniform() -> None:
    assert chi_square(np.bincount(uniform(50, 100_000, rng=3), minlength=50), np.full(50, 1 / 50)) < limit(50)


@every_distribution
def test_keys_depend_on_the_seed_and_size(draw: Callable[..., np.ndarray]) -> None:
    assert draw(100, 50, rng=9).tolist() == draw(100, 50, rng=np.random.default_rng(9)).tolist()
    assert draw(100, 50, rng=9).tolist() != draw(100, 50, rng=10).tolist()
    generator = np.random.default_rng(9)
    assert draw(100, 50, rng=generator).tolist() != draw(100, 50, rng=generator).tolist()
    assert draw(100, 0).shape == (0,) and draw(100, 3).dtype == np.int64


@every_distribution
def test_a_million_keys_take_no_more_steps_of_python_than_a_thousand(draw: Callable[..., np.ndarray]) -> None:
    """Passes of numpy, and no loop over keys."""
    few, many = (steps_of(lambda size=size: draw(10_000_000, size, rng=1)) for size in (1000, 1_000_000))
    assert 0 < many <= few + 1000


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: power_law(0, 1), "n: expected 1 to .*, got 0"),
        (lambda: uniform(2**53 + 1, 1), "n: .*, got 9007199254740993"),
        (lambda: power_law(1, -1), "size: .*, got -1"),
        (lambda: power_law(5, 1, 0.0), "alpha: .*, got 0.0"),
        (lambda: power_law(5, 1, float("nan")), "alpha: .*, got nan"),
        (lambda: power_law(5, 1, float("inf")), "alpha: .*, got inf"),
        (lambda: hot_key(5, 1, 1.1), "percentage: expected 0 to 1, got 1.1"),
        (lambda: hot_key(5, 1, 0.1, float("nan")), "coverage: .*, got nan"),
        (lambda: histogram(5, 1, ()), "weights: expected 1 to n = 5 bins, got 0"),
        (lambda: histogram(5, 1, [1] * 6), "weights: .* bins, got 6"),
        (lambda: histogram(5, 1, [0.0, 0.0]), "weights: .*not all 0"),
        (lambda: histogram(5, 1, [1.0, -0.5]), "weights: "),
        (lambda: histogram(5, 1, [1.0, float("nan")]), "weights: "),
    ],
)
def test_invalid_arguments_of_distributions_raise(call: Callable[[], np.ndarray], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        call()
