"""What commands write (plots, pages, reports, the demo's config) replaces its like, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba import simulate
from hps_numba.cli._demo_plot import save_plot
from hps_numba.cli._demo_run import write_config
from hps_numba.cli._demo_traffic import CALLS, Round, Traffic
from hps_numba.errors import CapacityError, ConfigError
from hps_numba.simulate import dense_trace

pytest.importorskip("matplotlib")

ENDINGS = (".png", ".svg", ".pdf")
RESULT = simulate.run(np.arange(200) % 50, ["lru"], [8], progress=False)
TRAFFIC = Traffic(
    latencies={samples: np.linspace(1e-4, 2e-4, 20) for samples in CALLS},
    rounds=[Round(start=number / 10, seconds=0.1, keys=100) for number in range(3)],
    absent_keys=0,
    wrong_rows=0,
)


def write_demo_config(path: Path) -> None:
    write_config(path, "demo.model", 4)


WRITERS: dict[str, Callable[[Path], object]] = {
    **{f"plot{ending}": lambda path: simulate.write_plot(RESULT, path) for ending in ENDINGS},
    "demo.png": lambda path: save_plot(path, TRAFFIC, "demo"),
    "page.html": lambda path: simulate.write_page(RESULT, path),
    "report.json": RESULT.write_json,
    "report.csv": RESULT.write_csv,
    "demo_ps_config.json": write_demo_config,
}
every_writer = pytest.mark.parametrize("name", WRITERS)


def fingerprint(path: Path) -> Any:
    status = os.lstat(path)
    return status.st_ino, status.st_mode, path.read_bytes() if path.is_file() else None


def directory(path: Path) -> None:
    path.mkdir()
    (path / "mine").write_text("mine")


def text(path: Path) -> None:
    path.write_text("my diary\n" * 10)


def other_picture(path: Path) -> None:
    path.write_bytes((b"%PDF-1.4" if path.suffix == ".png" else b"\x89PNG\r\n\x1a\n") + bytes(100))


def link_to_text(path: Path) -> None:
    text(path.with_name("diary"))
    path.symlink_to("diary")


def link_to_directory(path: Path) -> None:
    directory(path.with_name("folder"))
    path.symlink_to("folder")


def fifo(path: Path) -> None:
    os.mkfifo(path)


FOREIGN = (directory, text, other_picture, link_to_text, link_to_directory, fifo)


@every_writer
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_not_ours_stays(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    make(path)
    before = {entry: fingerprint(entry) for entry in tmp_path.rglob("*")}
    with pytest.raises(ConfigError, match=name):
        WRITERS[name](path)
    assert {entry: fingerprint(entry) for entry in tmp_path.rglob("*")} == before


@every_writer
def test_devices_are_not_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/null")
    try:
        WRITERS[name](path)  # reports may be written into a device
    except ConfigError as problem:
        assert "is a character device" in str(problem)
    assert Path("/dev/null").is_char_device() and path.is_symlink() and list(tmp_path.iterdir()) == [path]


@every_writer
def test_our_own_files_and_empty_ones_are_replaced(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.touch()
    WRITERS[name](path)
    assert path.stat().st_size > 40
    WRITERS[name](path)
    link = tmp_path / f"link{path.suffix}"
    link.symlink_to(name)
    WRITERS[name](link)
    assert link.is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, link.name])


@every_writer
def test_a_full_disk_leaves_the_old_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        WRITERS[name](path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_report_goes_to_a_fifo_that_somebody_reads(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    RESULT.write_json(path)
    with os.fdopen(reader, "rb") as file:
        assert file.read().startswith(b'{\n "trace"')
    assert path.is_fifo()


def test_a_disk_that_is_full_does_not_end_a_simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map of a file with holes would end the process with SIGBUS where the disk has no room for a page."""
    monkeypatch.setattr(dense_trace, "_IN_MEMORY", 100)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dense_trace.os, "posix_fallocate", full)
    with pytest.raises(CapacityError, match=r"no room for a file of 800 bytes in .*: No space left on device"):
        simulate.run(np.arange(200) % 50, ["lru"], [8], progress=False)
