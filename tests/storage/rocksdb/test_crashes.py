"""A process that writes is killed at random moments: nothing acknowledged is lost, no row is wrong, the database opens again.

``HPS_NUMBA_CRASHES=200`` kills 200 times, ``HPS_NUMBA_CRASH_SEED`` chooses other moments.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.oracles import rows_of
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba.storage.tiers.rocks_db import RocksTier

pytest.importorskip("rocksdict")
CRASHES = int(os.environ.get("HPS_NUMBA_CRASHES", "4"))
SEED = os.environ.get("HPS_NUMBA_CRASH_SEED", "1")
TABLES = {"hps_et.m.a": 16, "hps_et.m.b": 128}

STEP = """
import numpy as np
TABLES = ["hps_et.m.a", "hps_et.m.b"]
def step(number):
    chance = np.random.default_rng(number)
    table = TABLES[int(chance.random() < 0.3)]
    what = chance.random()
    if what < 0.02:
        return table, "drop", None
    keys = chance.integers(0, 3000, int(chance.integers(1, 1500)))
    return table, "erase" if what < 0.2 else "insert", keys
"""

WRITER = (
    STEP
    + """
import os, sys
from support.oracles import rows_of
from hps_numba.storage.tiers.rocks_db import RocksTier
tier = RocksTier.from_options(path=sys.argv[1], max_batch_size=400, num_threads=2)
os.write(1, b"open\\n")
number = int(sys.argv[2])
while True:
    table, what, keys = step(number)
    if what == "insert":
        tier.insert(table, keys, rows_of(keys, 16 if table.endswith("a") else 128, number % 100))
    else:
        tier.erase(table, keys)
    os.write(1, b"%d\\n" % number)
    number += 1
"""
)

scope: dict[str, object] = {}
exec(STEP, scope)
step = scope["step"]
State = dict[str, dict[int, bytes]]


def apply(state: State, number: int) -> None:
    table, what, keys = step(number)  # type: ignore[operator]
    rows = state.setdefault(table, {})
    if what == "drop":
        rows.clear()
    elif what == "erase":
        for key in keys:
            rows.pop(int(key), None)
    else:
        rows.update(
            {int(key): row.tobytes() for key, row in zip(keys, rows_of(keys, TABLES[table], number % 100), strict=True)}
        )


def killed(path: Path, first: int, chance: random.Random) -> int:
    """Let a process write from step ``first`` on, and kill it; the number of the step after the last acknowledged one."""
    command = [sys.executable, "-c", WRITER, str(path), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        assert next(lines) == b"open\n"
        done = []
        for line in lines:
            done.append(int(line))
            if len(done) > chance.randrange(60):
                for _ in range(chance.randrange(30_000)):  # somewhere within the next steps
                    pass
                process.kill()
                break
        done += [int(line) for line in lines]
        assert process.wait(HANG_SECONDS) == -signal.SIGKILL
    assert done == list(range(first, first + len(done)))
    return first + len(done)


def differences(state: State, after: State, tier: RocksTier) -> list[str]:
    """Keys whose row is neither the one of before the step that was cut short nor the one after it."""
    wrong = []
    for table in TABLES:
        found = {int(key): row.tobytes() for keys, rows in tier.scan(table) for key, row in zip(keys, rows, strict=True)}
        before, later = state.get(table, {}), after.get(table, {})
        for key in found.keys() | before.keys() | later.keys():
            if found.get(key) not in (before.get(key), later.get(key)):
                wrong.append(f"{table}: {key}")
        if tier.size(table) != len(found):
            wrong.append(f"{table}: size {tier.size(table)}, rows {len(found)}")
        state[table] = found
    return wrong


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_kills_at_random_moments(tmp_path: Path) -> None:  # D20
    chance, state, number, acknowledged = random.Random(SEED), {}, 0, 0
    for crash in range(CRASHES):
        following = killed(tmp_path / "database", number, chance)
        for done in range(number, following):
            apply(state, done)
        after = {table: dict(rows) for table, rows in state.items()}
        apply(after, following)
        acknowledged += following - number
        tier = RocksTier.from_options(path=str(tmp_path / "database"), num_threads=2)
        try:
            wrong = differences(state, after, tier)
            probe = np.array(sorted(state["hps_et.m.a"]), np.int64)
            rows = np.empty((len(probe), 16), np.float32)
            assert tier.fetch("hps_et.m.a", probe, rows).found.all()
            assert [row.tobytes() for row in rows] == [state["hps_et.m.a"][int(key)] for key in probe]
        finally:
            tier.close()
        assert not wrong, f"crash {crash}, step {following}: {wrong[:10]}"
        number = following + 1  # the step that was cut short is not repeated
    logging.getLogger(__name__).info("%d crashes, %d acknowledged writes", CRASHES, acknowledged)
    assert acknowledged >= CRASHES
