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

#: says what it begins and what is acknowledged; each row has the stamp of its insert
WRITER = """
import random, sys
import numpy as np
from support.oracles import rows_of
from support.tiers import DIM, TAG
from hps_numba.storage.tiers.row_log import RowLogTier
path, stamp, seed, sync, bound = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
choose = random.Random(seed)
tier = RowLogTier.from_options(path=path, segment_bytes=8192, sync=sync, reads="threads", max_bytes=bound or None)
while True:
    keys = [choose.randrange(200) for _ in range(choose.choice([1, 5, 40]))]
    action = choose.random()
    stamp += 1
    kind = "erase" if action < 0.2 else "insert"
    print(kind, stamp, *keys, flush=True)
    if kind == "erase":
        tier.erase(TAG, np.array(keys))
    else:
        tier.insert(TAG, np.array(keys), rows_of(keys, DIM, stamp))
    if action > 0.95:
        tier.compact(TAG)
    print("done", flush=True)
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
            states = {ERASED: None} | {stamp: rows_of([key], DIM, stamp)[0].tobytes() for stamp in allowed - {ERASED}}
            found = [stamp for stamp in allowed if states[stamp] == content.get(key)]
            assert found, f"key {key}: expected the row of one of {allowed}"
            self.certain[key] = found[0]
        self.begun = {}


@pytest.mark.parametrize(("sync", "bound"), [("always", 0), ("never", 0), ("never", 1 << 16)])
def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path: Path, sync: str, bound: int) -> None:
    choose = random.Random(7)
    expected = Expected()
    read_only = {"path": str(tmp_path), "read_only": True, "segment_bytes": 8192, "max_bytes": bound or None}
    kills = max(1, CRASHES // 3) if bound or sync == "always" else CRASHES - 2 * max(1, CRASHES // 3)
    for number in range(max(1, kills)):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(expected.stamp), str(number), sync, str(bound)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert child.stdout is not None
        lines = [child.stdout.readline()]  # it works
        for _ in range(choose.randrange(60)):
            lines.append(child.stdout.readline())
        spins = choose.randrange(30_000)
        while spins:
            spins -= 1
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate(timeout=HANG_SECONDS)
        assert child.returncode == -signal.SIGKILL, rest
        lines += rest.splitlines()
        expected.read([line for line in lines if line.strip()])
        reader = RowLogTier.from_options(**read_only)
        content_of(reader, TAG, 64)  # opens beside nobody
        reader.close()
        tier = RowLogTier.from_options(**{**read_only, "read_only": False, "sync": sync})
        expected.check(content_of(tier, TAG, 64), evicting=bool(bound))
        assert not bound or tier.disk_bytes(TAG) <= bound
        tier.close()
    assert expected.acknowledged > 0
    print(f"{kills} kills, {expected.acknowledged} acknowledged writes")  # noqa: T201
