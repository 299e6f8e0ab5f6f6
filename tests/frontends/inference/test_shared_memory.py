"""Shared memory of clients: what may be registered, and that nothing a client does to it hurts the server."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hps_numba.errors import ConfigError
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.shared_memory import RegionPart, RegionStatus, SharedRegions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine_a").write_bytes(bytes(range(256)))
    (tmp_path / "other").write_bytes(bytes(256))
    return tmp_path


@pytest.fixture
def regions(folder: Path) -> SharedRegions:
    return SharedRegions(["mine_"], folder=folder)


def refused(status: int, match: str) -> Any:
    class Check:
        def __enter__(self) -> None:
            self.inner = pytest.raises(InferenceError, match=match)
            self.problem = self.inner.__enter__()

        def __exit__(self, *problem: Any) -> bool:
            seen = self.inner.__exit__(*problem)
            assert self.problem.value.status == status
            return bool(seen)

    return Check()


def test_parts_are_read_and_written(regions: SharedRegions, folder: Path) -> None:
    regions.register("in", "/mine_a", 16, 100)
    assert regions.status() == [RegionStatus("in", "/mine_a", 16, 100)] == regions.status("in")
    assert regions.read(RegionPart("in", 4, 3), "x").tolist() == [20, 21, 22]
    assert regions.read(RegionPart("in", 100, 0), "x").tolist() == []
    regions.write(RegionPart("in", 8, 92), np.array([1.0, 2.0], np.float32), "x")
    regions.write(RegionPart("in", 0, 0), np.empty((0, 4), np.float32), "x")
    written = (folder / "mine_a").read_bytes()
    assert written[:24] == bytes(range(24)) and written[32:] == bytes(range(32, 256))
    assert np.frombuffer(written[24:32], np.float32).tolist() == [1.0, 2.0]


def test_nothing_is_allowed_by_default(folder: Path) -> None:
    closed = SharedRegions(folder=folder)
    with refused(403, "not allowed"):
        closed.register("in", "/mine_a", 0, 1)
    assert not closed.allowed and closed.status() == []
    closed.unregister()


@pytest.mark.parametrize(
    "key", ["/other", "other", "/../mine_a", "/mine_a/../other", "mine_/x", "", "/", "mine_a\0", "//mine_a"]
)
def test_only_plain_names_with_a_prefix(regions: SharedRegions, key: str) -> None:
    with refused(403, "key: expected a name that begins with mine_"):
        regions.register("in", key, 0, 1)


def test_only_plain_files(regions: SharedRegions, folder: Path) -> None:
    (folder / "mine_link").symlink_to(folder / "other")
    (folder / "mine_folder").mkdir()
    os.mkfifo(folder / "mine_pipe")
    for key in ("mine_link", "mine_folder", "mine_pipe", "mine_missing"):
        with refused(400, "key: expected a segment"):
            regions.register("in", key, 0, 1)
    assert regions.status() == []


@pytest.mark.parametrize(
    ("name", "offset", "size", "match"),
    [("in", 0, 257, "at most 256"), ("in", 200, 57, "at most 56"), ("in", 0, 0, "more than 0"), ("", 0, 1, "characters")],
)
def test_a_region_lies_in_its_segment(regions: SharedRegions, name: str, offset: int, size: int, match: str) -> None:
    with refused(400, match):
        regions.register(name, "mine_a", offset, size)


def test_a_name_is_given_once(regions: SharedRegions) -> None:
    regions.register("in", "mine_a", 0, 10)
    with refused(409, "registered already"):
        regions.register("in", "mine_a", 0, 10)
    regions.unregister("in")
    regions.unregister("in")
    regions.register("in", "mine_a", 0, 20)
    regions.register("out", "mine_a", 20, 20)
    regions.unregister()
    assert regions.status() == []
    with refused(404, "no region 'in'"):
        regions.status("in")


@pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (2**40, 2**40), (101, 0)])
def test_a_part_lies_in_its_region(regions: SharedRegions, offset: int, size: int) -> None:
    regions.register("in", "mine_a", 0, 100)
    with refused(400, "at most"):
        regions.read(RegionPart("in", offset, size), "inputs[0]")
    with refused(400, "registered region"):
        regions.read(RegionPart("nobody", 0, 1), "inputs[0]")


def test_a_segment_that_its_client_cuts(regions: SharedRegions, folder: Path) -> None:
    regions.register("in", "mine_a", 0, 256)
    os.truncate(folder / "mine_a", 10)
    with refused(400, "expected 100 bytes in region 'in', got 10"):
        regions.read(RegionPart("in", 0, 100), "inputs[0]")
    with refused(400, "its segment shrank"):
        regions.write(RegionPart("in", 0, 100), np.zeros(100, np.uint8), "outputs[0]")
    assert (folder / "mine_a").stat().st_size == 10


def test_an_output_that_does_not_fit(regions: SharedRegions) -> None:
    regions.register("out", "mine_a", 0, 256)
    with refused(400, "at least 8"):
        regions.write(RegionPart("out", 0, 7), np.zeros(2, np.float32), "outputs[0]")


def times_open(file: Path) -> int:
    """How often this process has a file open now."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread closed it meanwhile
            found += one.readlink() == file
    return found


def test_files_are_closed(regions: SharedRegions, folder: Path) -> None:
    file = (folder / "mine_a").resolve()
    for i in range(20):
        regions.register(str(i), "mine_a", 0, 1)
    assert times_open(file) == 20
    regions.unregister()
    assert times_open(file) == 0


@pytest.mark.parametrize(
    "parameters",
    [
        {"shared_memory_region": 3, "shared_memory_byte_size": 1},
        {"shared_memory_region": "a"},
        {"shared_memory_region": "a", "shared_memory_byte_size": "1"},
        {"shared_memory_region": "a", "shared_memory_byte_size": -1},
        {"shared_memory_region": "a", "shared_memory_byte_size": True},
        {"shared_memory_region": "a", "shared_memory_byte_size": 1, "shared_memory_offset": 2**63},
    ],
)
def test_parameters_that_name_no_place(parameters: dict[str, Any]) -> None:
    with refused(400, "inputs.0..parameters.shared_memory"):
        RegionPart.of(parameters, "inputs[0]")


def test_parameters_of_a_place() -> None:
    part = RegionPart.of({"shared_memory_region": "a", "shared_memory_byte_size": 8, "shared_memory_offset": 4}, "x")
    assert part == RegionPart("a", 4, 8)
    assert part.to_parameters(6) == {"shared_memory_region": "a", "shared_memory_byte_size": 6, "shared_memory_offset": 4}
    assert RegionPart.of({"mode": "sum"}, "x") is None


@pytest.mark.parametrize("prefix", ["", "/mine", "a/b", ".."])
def test_prefixes_are_parts_of_names(prefix: str) -> None:
    with pytest.raises(ConfigError):
        SharedRegions([prefix])
