"""Distinct keys."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import hps_numba
from hps_numba.storage.distinct import distinct_keys

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


def test_nothing_that_threads_of_users_call_uses_the_one_of_numpy_that_aborts_at_exit() -> None:
    found = []
    for room in CALLED_FROM_THREADS:
        for path in (Path(hps_numba.__file__).parent / room).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "np.unique" and not call.keywords:
                    found.append(f"{path}:{call.lineno}")
    assert found == []
