"""The product under attack: interrupts, threads, forks, signal handlers, kills, damaged files, odd configs, full disks, leaks.

Each attack is a program of ``programs/`` in a process of its own, because many of them end a process that is not safe.
``HPS_NUMBA_HOSTILE_SECONDS`` (1) is how long each of the attacks goes on; ``HPS_NUMBA_HOSTILE_SEED`` (1) where they start.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile.programs import damaged, exits, writer
from support.processes import environment
from support.waiting import HANG_SECONDS

SECONDS = float(os.environ.get("HPS_NUMBA_HOSTILE_SECONDS", "1"))
SEED = os.environ.get("HPS_NUMBA_HOSTILE_SEED", "1")
_HANG = SECONDS * 8 + HANG_SECONDS

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="signals, forks and limits as POSIX has them"),
    pytest.mark.timeout(_HANG + 60),
]


def attack(program: str, folder: Path, *arguments: str) -> int:
    """Runs a program of ``programs/``; returns the number that it prints, of what it did."""
    command = [sys.executable, "-m", f"hostile.programs.{program}", str(folder), str(SECONDS), SEED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=_HANG, check=False)
    assert done.returncode == 0, f"{program} {arguments} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return int(done.stdout.split()[-1])


BOTH = pytest.mark.parametrize("cached", ["cached", "host"])


@BOTH
def test_interrupted_operations_finish_or_roll_back(tmp_path: Path, cached: str) -> None:
    assert attack("interrupts", tmp_path, cached) > 0


@BOTH
@pytest.mark.parametrize("seed", ["2", "3"], ids=["writes", "replacements"])
def test_answers_beside_writers_are_whole_fresh_and_of_one_version(tmp_path: Path, cached: str, seed: str, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "SEED", seed)
    assert attack("threads", tmp_path, cached) > 1000


@BOTH
def test_forked_children_serve_and_close(tmp_path: Path, cached: str) -> None:
    assert attack("forks", tmp_path, cached) >= 3


@BOTH
def test_signal_handlers_may_call_the_server(tmp_path: Path, cached: str) -> None:
    assert attack("handlers", tmp_path, cached) > 0


@pytest.mark.parametrize("tier", exits.TIERS)
def test_a_process_ends_while_its_threads_use_a_server(tmp_path: Path, tier: str) -> None:
    if tier == "rocks_db":
        pytest.importorskip("rocksdict")
    for turn in range(1 + int(SECONDS)):
        (tmp_path / str(turn)).mkdir()
        assert attack("exits", tmp_path / str(turn), tier) > 0


@BOTH
def test_nothing_leaks(tmp_path: Path, cached: str) -> None:
    assert attack("leaks", tmp_path, cached) >= 5000


def test_servers_whose_rows_threads_gather_leave_nothing(tmp_path: Path) -> None:
    """``HPS_NUMBA_SERVERS`` (30) is how many there are at least."""
    assert attack("gathering_servers", tmp_path) >= 30


@pytest.mark.parametrize("kinds", damaged.KINDS)
def test_damaged_files_are_read_or_refused(tmp_path: Path, kinds: str) -> None:
    assert attack("damaged", tmp_path, kinds) > 0


@pytest.mark.parametrize("form", ["dict", "file"])
def test_changed_configs_open_or_are_refused(tmp_path: Path, form: str) -> None:
    assert attack("configs", tmp_path, form) >= 20


@pytest.mark.parametrize("kind", writer.KINDS)
def test_writers_survive_a_full_disk(tmp_path: Path, kind: str) -> None:
    assert attack("full_disk", tmp_path, kind) > 0


@pytest.mark.parametrize("kind", writer.KINDS)
def test_killed_writers_leave_a_whole_file(tmp_path: Path, kind: str) -> None:
    """The writer is killed at a random moment, again and again; the file is then whole, and the next writer cleans up."""
    chance, end, kills = random.Random(f"{SEED} {kind}"), time.monotonic() + SECONDS, 0
    command = [sys.executable, "-m", "hostile.programs.writer", kind, str(tmp_path)]
    while kills < 2 or time.monotonic() < end:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()  # the first write is done: imports and compilation are not what is killed
        assert line, process.stderr.read()[-3000:]
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        kills += 1
        assert writer.version_in(kind, tmp_path) >= int(line)
    writer.writer_of(kind, tmp_path)(1)
    names = {entry.name for entry in tmp_path.iterdir()} - {"start.model"}
    assert names == {writer.target_of(kind, tmp_path).name}, names
