"""A consumer that is killed with -9 at any time and started again ends with the rows of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.factories import COLD, Workshop
from support.oracles import rows_of
from support.processes import environment
from support.updates import offset_in
from support.waiting import HANG_SECONDS, join_all, wait_until

import hps_numba
from hps_numba.updates.files import FilesProducer

KILLS = int(os.environ.get("HPS_NUMBA_UPDATE_KILLS", "4"))
DIM, KEYS = 8, 3000
Oracle = list[dict[int, bytes]]


class Trainer(threading.Thread):
    """Publishes random changes of two tables, and does them to dicts, until it is told to stop."""

    def __init__(self, producer: FilesProducer, oracle: Oracle) -> None:
        super().__init__()
        self.producer, self.oracle = producer, oracle
        self.stopping = False
        self.problem: BaseException | None = None

    def run(self) -> None:
        numbers = np.random.default_rng(7)
        try:
            while not self.stopping:
                for table in range(2):
                    self._change(numbers, table)
                self.producer.flush()
        except BaseException as problem:
            self.problem = problem

    def _change(self, numbers: np.random.Generator, table: int) -> None:
        name, keys = f"sparse_embedding{table}", numbers.integers(0, KEYS, 400)
        rows = numbers.standard_normal((400, DIM)).astype(np.float32)
        self.producer.update("m", name, keys, rows)
        self.oracle[table].update((int(key), row.tobytes()) for key, row in zip(keys, rows))
        gone = numbers.integers(0, KEYS, 40)
        self.producer.erase("m", name, gone)
        for key in gone.tolist():
            self.oracle[table].pop(key, None)


def content_of(server: hps_numba.HPS, table: int) -> dict[int, bytes]:
    with server.locked_table("m", table) as (keys, rows_at):
        return {int(key): row.tobytes() for key, row in zip(keys, rows_at(keys))}


@pytest.mark.parametrize("durable", [True, False], ids=["on-disk", "in-memory"])
def test_a_killed_consumer_loses_nothing_and_applies_nothing_in_another_order(workshop: Workshop, durable: bool) -> None:
    bus, place = workshop.folder / "bus", workshop.folder / "place.json"
    log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
    source = {"type": "files", "folder": str(bus), "position_file": str(place), "poll_interval_ms": 1, "max_batch_size": 300}
    config: dict[str, Any] = {
        "models": [workshop.model((range(9), DIM), (range(9), DIM))],
        "tiers": [COLD, log] if durable else [{"type": "hash_map"}],
        "update_source": source,
    }
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps(config))
    start = {} if durable else {key: rows_of([key], DIM)[0].tobytes() for key in range(9)}
    oracle: Oracle = [dict(start), dict(start)]
    with FilesProducer.from_options(folder=str(bus), sync=False, linger_ms=0) as producer:
        trainer = Trainer(producer, oracle)
        trainer.start()
        try:
            kill_at_any_time(path, lambda: offset_in(place) if durable else 0)
        finally:
            trainer.stopping = True
            join_all(trainer)
        assert trainer.problem is None
        manifest = producer._manifest
    server = hps_numba.HPS(path)
    workshop.servers.append(server)
    wait_until(lambda: server.update_stats()[0].lag_messages == 0 and not server.update_stats()[0].backlog_messages)
    (stats,) = server.update_stats()
    assert (stats.resumes, stats.lost, stats.skipped, stats.retries) == (durable, 0, {}, 0)
    assert manifest.next_offset > 4 * KILLS
    for table in range(2):
        assert content_of(server, table) == oracle[table]


def reached(offset: Callable[[], int], target: int) -> bool:
    return not offset() or offset() >= target


def kill_at_any_time(config: Path, offset: Callable[[], int]) -> None:
    """Start a consumer and kill it, again and again, once it has committed some more; sometimes before it is ready."""
    numbers = random.Random(5)
    for kill in range(KILLS):
        command = [sys.executable, "-m", "support.update_consumer", str(config)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        try:
            assert child.stdout is not None
            if kill % 4 != 3:
                assert child.stdout.readline() == "ready\n"
                target = offset() + numbers.randrange(1, 60)
                wait_until(partial(reached, offset, target))
                threading.Event().wait(numbers.uniform(0, 0.3))
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=HANG_SECONDS)
