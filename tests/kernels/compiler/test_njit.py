"""Compiled host kernels on disk: found again, never trusted, never required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import numpy as np
from hps_numba.storage.host.store import HostStore
from hps_numba.kernels.host.lookup import host_lookup
store = HostStore(4)
store.upsert(np.arange(3), np.ones((3, 4), np.float32))
out = np.zeros((3, 4), np.float32)
assert store.lookup(np.arange(3), out) == 0 and (out == 1).all()
print(sum(host_lookup.stats.cache_hits.values()), host_lookup.stats.cache_path)
"""


def run(folder, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=cwd,
        env={**environment(HPS_NUMBA_CACHE_DIR=str(folder)), **env},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    assert run(folder).stdout.startswith("0 ")
    return folder


def test_a_second_process_finds_the_kernels(warm):
    assert run(warm).stdout.startswith("1 ")


def test_host_and_device_kernels_share_one_cache(warm):
    (inside,) = warm.iterdir()
    assert inside.name == "cpu"
    assert inside.stat().st_mode & 0o777 == 0o700
    assert {file.suffix for file in inside.iterdir()} == {".object"}


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_damaged_files_are_compiled_again_and_replaced(warm, damage):
    run(warm)
    for file in warm.rglob("*.host_lookup-*"):
        file.write_bytes(file.read_bytes()[:50] if damage is None else damage)
    assert run(warm).stdout.startswith("0 ")
    assert run(warm).stdout.startswith("1 ")


def test_a_change_of_a_kernel_in_a_sub_folder_compiles_it_again(tmp_path):
    """A copy of the package runs, one file below ``kernels`` changes, and the copy runs again."""
    shutil.copytree(ROOT / "hps_numba", tmp_path / "hps_numba")
    here, cache = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path)}, tmp_path / "kernels"
    assert run(cache, **here).stdout.startswith("0 ")
    assert run(cache, **here).stdout.startswith("1 ")
    changed = tmp_path / "hps_numba" / "kernels" / "policies" / "lru.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    assert run(cache, **here).stdout.startswith("0 ")
    assert run(cache, **here).stdout.startswith("1 ")


def test_folders_of_older_versions_are_removed(tmp_path):
    old, other = tmp_path / f"host-{'0a' * 8}", tmp_path / "host-of-somebody-else"
    for folder in (old, other):
        folder.mkdir()
        (folder / "lookup.host_lookup-10.py311.nbi").write_text("kept")
    (old / "module").mkdir()
    (old / "module" / "lookup.host_lookup-10.py311.1.nbc").write_text("kept")
    run(tmp_path)
    assert not old.exists() and other.exists()


def test_what_users_put_into_the_folder_stays(tmp_path):
    mine = tmp_path / f"host-{'0a' * 8}" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    run(tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.skipif(os.name == "nt", reason="needs /dev/null as a folder that cannot be made")
def test_without_a_writable_folder_kernels_are_compiled_with_one_warning():
    done = run("/dev/null/no_folder")
    assert done.stdout == "0 \n"
    assert done.stderr.count("compiled kernels are not kept on disk") == 1
