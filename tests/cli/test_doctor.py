"""``hps-numba doctor``: what it finds, and the advice that it gives."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import ROOT
from support.waiting import HANG_SECONDS
from typer.testing import CliRunner

from hps_numba.cli import _hardware, build, doctor
from hps_numba.cli._hardware import Gpu, Hardware


def _doctor(*, code: int = 0) -> Any:
    result = CliRunner().invoke(build(), ["doctor", "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_doctor_reports_and_serves() -> None:
    report = _doctor()
    assert report["ok"] and report["self_test"]["ok"] and report["packages"]["numpy"] == np.__version__
    assert report["hardware"]["cores"] >= 1 and report["kernel_cache"]["writable"]
    text = CliRunner().invoke(build(), ["doctor"]).stdout
    assert "1,000 rows served correctly" in text and "verdict: ready" in text.splitlines()[-1]
    for extra, found in report["extras"].items():
        assert found["installed"] or f'pip install "hps-numba[{extra}]"' in text


def test_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"test", "dev", "docs"}


def test_doctor_reports_a_failed_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise RuntimeError("no\nkernels")

    monkeypatch.setattr(doctor, "_wrong_rows_of_a_small_model", broken)
    result = CliRunner().invoke(build(), ["doctor"])
    assert result.exit_code == 1 and "FAILED: RuntimeError: no kernels" in result.stdout
    monkeypatch.setattr(doctor, "_wrong_rows_of_a_small_model", lambda: 3)
    assert _doctor(code=1)["self_test"]["problem"] == "3 of 1000 rows were wrong"


H200, V100 = Gpu(name="NVIDIA H200", capability=9.0), Gpu(name="Tesla V100", capability=7.0)


@pytest.mark.parametrize(
    ("found", "driver", "installed", "numpy", "advice"),
    [
        ([], None, (), "2.4.6", None),
        ([], (13, 0), (), "2.4.6", None),
        ([H200], (13, 0), (), "2.4.6", 'pip install "hps-numba[cuda13]"'),
        ([H200], (12, 8), (), "2.4.6", 'pip install "hps-numba[cuda12]"'),
        ([V100], (13, 0), (), "2.4.6", 'pip install "hps-numba[cuda12]"'),
        ([Gpu(name="unknown")], (13, 1), (), "2.4.6", 'pip install "hps-numba[cuda13]"'),
        ([H200], (11, 4), (), "2.4.6", "update the NVIDIA driver"),
        ([H200], None, (), "2.4.6", "libcuda.so.1"),
        ([H200], (13, 0), ("cuda13",), "2.4.6", None),
        ([H200], (13, 0), ("cuda13",), "2.5.0", 'pip install "numpy<2.5"'),
    ],
)
def test_gpu_advice_for_driver_and_packages(
    found: list[Gpu], driver: tuple[int, int] | None, installed: tuple[str, ...], numpy: str, advice: str | None
) -> None:
    machine = Hardware(
        cpu="", cores=1, memory_bytes=1, free_bytes=1, gpus=tuple(found), driver_cuda=driver, huge_pages="madvise"
    )
    extras = {extra: {"installed": extra in installed} for extra in doctor.EXTRAS}
    given = doctor.gpu_advice(machine, extras, numpy)
    assert given == [] if advice is None else advice in given[0]


def test_gpus_are_found_by_smi_driver_or_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0'\necho 'Tesla V100, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(_hardware, "_SMI_SECONDS", HANG_SECONDS)
    assert _hardware.gpus() == (H200, Gpu(name="Tesla V100"))
    tool.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    assert _hardware._gpus_by_smi() == ()
    for number in range(2):
        (tmp_path / f"0000:0{number}").mkdir()
        (tmp_path / f"0000:0{number}" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 5\n")
        (tmp_path / f"nvidia{number}").touch()
    assert _hardware._gpus_by_driver(tmp_path) == (Gpu(name="NVIDIA H200"),) * 2
    (tmp_path / "nvidiactl").touch()
    assert len(_hardware._gpus_by_nodes(tmp_path)) == 2


def test_huge_pages_setting_is_read(tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert _hardware.huge_pages(tmp_path / "enabled") == "never"
    assert _hardware.huge_pages(tmp_path / "missing") is None
