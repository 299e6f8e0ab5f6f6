"""Distinct keys."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import hps_numba
from hps_numba.storage.distinct import are_among, distinct_keys

#: call it, or are it, unless they are told more
ABORTING = {"np.unique", "np.isin", "np.in1d", "np.setdiff1d", "np.intersect1d", "np.setxor1d", "np.union1d"}
CALLED_FROM_THREADS = ("cache", "frontends", "server", "storage", "training", "updates")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000])
def test_equal_those_of_numpy(n: int, dtype: type) -> None:
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(n)
    for keys in (
        rng.integers(limits.min, limits.max, n, dtype, endpoint=True),
        rng.integers(0, 7, n).astype(dtype),
        np.full(n, limits.max, dtype),
    ):
        given = keys.copy()
        np.testing.assert_array_equal(distinct_keys(keys), np.unique(keys), strict=True)
        np.testing.assert_array_equal(keys, given)
        np.testing.assert_array_equal(distinct_keys(keys[::2]), np.unique(keys[::2]), strict=True)


@pytest.mark.parametrize("known", [0, 1, 500])
def test_are_among_equals_isin(known: int) -> None:
    rng = np.random.default_rng(known)
    values, ordered = rng.integers(0, 1000, 2000), np.sort(rng.choice(1000, known, replace=False))
    np.testing.assert_array_equal(are_among(values, ordered), np.isin(values, ordered), strict=True)
    assert len(are_among(values[:0], ordered)) == 0


def test_nothing_that_threads_of_users_call_uses_the_one_of_numpy_that_aborts_at_exit() -> None:
    found = []
    for room in CALLED_FROM_THREADS:
        for path in (Path(hps_numba.__file__).parent / room).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ABORTING and not call.keywords:
                    found.append(f"{path}:{call.lineno}")
    assert found == []
