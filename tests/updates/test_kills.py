"""A consumer that is killed with -9 at any time and started again ends with the rows of one that was not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.factories import COLD, Workshop
from support.oracles import rows_of
from support.trainers import KILLS, TRAINED_DIM, Oracle, Trainer, content_of, kill_consumers
from support.updates import offset_in
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.updates.files import FilesProducer


@pytest.mark.parametrize("durable", [True, False], ids=["on-disk", "in-memory"])
def test_a_killed_consumer_loses_nothing_and_applies_nothing_in_another_order(workshop: Workshop, durable: bool) -> None:
    bus, place = workshop.folder / "bus", workshop.folder / "place.json"
    log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
    source = {"type": "files", "folder": str(bus), "position_file": str(place), "poll_interval_ms": 1, "max_batch_size": 300}
    config: dict[str, Any] = {
        "models": [workshop.model((range(9), TRAINED_DIM), (range(9), TRAINED_DIM))],
        "tiers": [COLD, log] if durable else [{"type": "hash_map"}],
        "update_source": source,
    }
    path = workshop.folder / "ps.json"
    path.write_text(json.dumps(config))
    start = {} if durable else {key: rows_of([key], TRAINED_DIM)[0].tobytes() for key in range(9)}
    oracle: Oracle = [dict(start), dict(start)]
    with FilesProducer.from_options(folder=str(bus), sync=False, linger_ms=0) as producer:
        trainer = Trainer(producer, oracle, pause=0.02)
        trainer.start()
        try:
            kill_consumers(path, lambda: offset_in(place) if durable else 0)
            wait_until(trainer.enough)
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
