"""Compiled kernels on disk: found again, never trusted, never required."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import environment

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
import numpy as np
from hps_numba.kernels import compile as c
from hps_numba.storage.host_store import HostStore
from hps_numba.kernels.host_lookup import host_lookup
store = HostStore(4)
store.upsert(np.arange(3), np.ones((3, 4), np.float32))
out = np.zeros((3, 4), np.float32)
assert store.lookup(np.arange(3), out) == 0 and (out == 1).all()
print(sum(host_lookup.stats.cache_hits.values()), c.cache_folder())
"""


def run(folder, **env):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment(HPS_NUMBA_CACHE_DIR=str(folder), **env),
        capture_output=True,
        text=True,
        timeout=120,
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


def test_the_folder_is_the_users_own(warm):
    (inside,) = warm.iterdir()
    assert inside.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("suffix", "damage"), [(".nbi", b""), (".nbi", b"garbage"), (".nbc", None)])
def test_damaged_files_are_compiled_anew_and_mended(warm, suffix, damage):
    run(warm)
    for file in warm.rglob("*" + suffix):
        file.write_bytes(file.read_bytes()[:50] if damage is None else damage)
    assert run(warm).stdout.startswith("0 ")
    assert run(warm).stdout.startswith("1 ")


@pytest.mark.skipif(os.name == "nt", reason="needs /dev/null as a folder that cannot be made")
def test_without_a_writable_folder_kernels_are_compiled_and_it_is_said_once():
    done = run("/dev/null/nowhere")
    assert done.stdout.startswith("0 None")
    assert done.stderr.count("compiled anew in each process") == 1
