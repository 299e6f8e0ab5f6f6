"""A writer that is killed at random moments: nothing that it acknowledged is lost, and no row is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.oracles import rows_of
from support.processes import environment
from support.tiers import DIM, TAG, content_of
from support.waiting import HANG_SECONDS

from hps_numba.storage.tiers.row_log import RowLogTier

CRASHES = int(os.environ.get("HPS_NUMBA_CRASHES", "4"))
KEYS = 200
ERASED = -1

#: forks a writer for each line that it reads. The writer says its pid, what it begins and what is acknowledged; a row has the
#: stamp of its insert
WRITERS = """
import os, random, sys
import numpy as np
from support.oracles import rows_of
from support.tiers import DIM, TAG
from hps_numba.storage.tiers.row_log import RowLogTier

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # at once: a kill does not cut a line

def write(path, stamp, seed, sync, bound, most):
    choose = random.Random(seed)
    tier = RowLogTier.from_options(path=path, segment_bytes=8192, sync=sync, reads="threads", max_bytes=bound or None)
    for _ in range(most):
        keys = [choose.randrange(200) for _ in range(choose.choice([1, 5, 40]))]
        action = choose.random()
        stamp += 1
        kind = "erase" if action < 0.2 else "insert"
        say(kind, stamp, *keys)
        if kind == "erase":
            tier.erase(TAG, np.array(keys))
        else:
            tier.insert(TAG, np.array(keys), rows_of(keys, DIM, stamp % 64))
        if action > 0.95:
            tier.compact(TAG)
        say("done")
    tier.close()

write(sys.argv[1], 0, 0, "never", 0, 30)  # kernels are loaded before the forks
say("ready")
for line in sys.stdin:
    path, *numbers, sync = line.split()
    stamp, seed, bound = map(int, numbers)
    child = os.fork()
    if child == 0:
        say(os.getpid())
        write(path, stamp, seed, sync, bound, 10**9)
    say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


class Expected:
    """What each key may be: its last acknowledged state, or one that was begun since."""

    def __init__(self) -> None:
        self.certain: dict[int, int] = dict.fromkeys(range(KEYS), ERASED)
        self.begun: dict[int, int] = {}
        self.stamp = 0
        self.acknowledged = 0

    def read(self, lines: list[str]) -> None:
        """What a writer said until it was killed."""
        for line in lines:
            kind, *numbers = line.split()
            if kind == "done":
                self.certain.update(self.begun)
                self.begun = {}
                self.acknowledged += 1
            else:
                self.stamp, *keys = (int(number) for number in numbers)
                self.begun = dict.fromkeys(keys, ERASED if kind == "erase" else self.stamp)

    def check(self, content: dict[int, bytes], *, evicting: bool) -> None:
        """Compare; what is there is certain from now on."""
        for key in range(KEYS):
            allowed = {self.certain[key], self.begun.get(key, self.certain[key])} | ({ERASED} if evicting else set())
            states = {ERASED: None} | {stamp: rows_of([key], DIM, stamp % 64)[0].tobytes() for stamp in allowed - {ERASED}}
            found = [stamp for stamp in allowed if states[stamp] == content.get(key)]
            assert found, f"key {key}: expected the row of one of {allowed}"
            self.certain[key] = found[0]
        self.begun = {}


@pytest.mark.parametrize(("sync", "bound"), [("always", 0), ("never", 0), ("never", 1 << 16)])
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path: Path, sync: str, bound: int) -> None:
    choose = random.Random(7)
    expected = Expected()
    folder = tmp_path / "log"
    command = [sys.executable, "-c", WRITERS, str(tmp_path / "warm")]
    writers = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    assert writers.stdin is not None and writers.stdout is not None
    while writers.stdout.readline() != "ready\n":
        assert writers.poll() is None
    for number in range(max(1, CRASHES // 3)):
        print(folder, expected.stamp, number, bound, sync, file=writers.stdin, flush=True)
        pid = int(writers.stdout.readline())
        lines = [writers.stdout.readline() for _ in range(choose.randrange(1, 80))]
        for _ in range(choose.randrange(20_000)):  # some moment within the next steps
            pass
        os.kill(pid, signal.SIGKILL)
        while not lines[-1].startswith("ended"):
            lines.append(writers.stdout.readline())
            assert lines[-1], "the writers have ended"
        assert lines.pop() == f"ended {-signal.SIGKILL}\n"
        expected.read(lines)
        options = {"path": str(folder), "segment_bytes": 8192, "max_bytes": bound or None, "sync": sync}
        reader = RowLogTier.from_options(**options, read_only=True)
        content_of(reader, TAG, 64)  # no row that it finds is damaged
        reader.close()
        tier = RowLogTier.from_options(**options)
        expected.check(content_of(tier, TAG, 64), evicting=bool(bound))
        assert not bound or tier.disk_bytes(TAG) <= bound
        tier.close()
    writers.communicate(timeout=HANG_SECONDS)
    assert expected.acknowledged > 0
    print(f"{number + 1} kills, {expected.acknowledged} acknowledged writes")  # noqa: T201
