"""Shared by tests: start, end, SPEC, scattered."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba.kernels.compiler.spec import KernelSpec
from hps_numba.kernels.policies._load import load_policy

SPEC = KernelSpec(name="scatter_kernel", dim=3, policy=load_policy("lru"))


def scattered(kernel: Any, dim: int) -> list[list[float]]:
    """Two rows, to the places 2 and 0 of four."""
    positions, rows, out = np.array([2, 0]), np.arange(2 * dim, dtype=np.float32), np.zeros((4, dim), np.float32)
    at_positions, at_rows, at_out = (array.__array_interface__["data"][0] for array in (positions, rows, out))
    kernel(at_positions, at_rows, 2, at_out)
    return out.tolist()


def start(program: str, *args: Any, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, *map(str, args)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Any:
    out, errors = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, errors) == (0, "")
    return json.loads(out)
