"""HugeCTR's packages in a test: importable in this process for a while, and in programs of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba import compat
from hps_numba.compat.folder import NAMES

__all__ = ["installed", "run_drop_in"]


@contextmanager
def installed(**options: Any) -> Iterator[None]:
    """``compat.install()``, undone at the end."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in (*NAMES, "_hps_numba_found")]:
            del sys.modules[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", list(sys.meta_path))
        patch.setenv("PYTHONPATH", "")  # so that what it was comes back
        forget()
        compat.install(**options)
        try:
            yield
        finally:
            forget()


def run_drop_in(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m hps_numba.compat arguments``."""
    command = [sys.executable, "-m", "hps_numba.compat", *map(str, arguments)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    env = environment(**{**quiet, **options.pop("env", {})})
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=HANG_SECONDS, check=False, **options)
