"""U-C over Redis Streams: consumers and Redis itself are killed at any time; in the end the rows are those of an oracle."""

from __future__ import annotations

import json
import random
import threading
from functools import partial
from typing import Any

import pytest
from support.factories import COLD, Workshop
from support.oracles import rows_of
from support.redis_servers import Server, one_server
from support.trainers import KILLS, TRAINED_DIM, Oracle, Trainer, content_of, kill_consumers
from support.updates import wait_for
from support.waiting import join_all, wait_until

import hps_numba
from hps_numba.updates._redis_streams.entries import offset_of
from hps_numba.updates.redis_streams import RedisStreamsProducer

STREAM = "kills"
#: what Redis has acknowledged is on the disk before it says so
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def acknowledged(server: Server) -> int:
    """Entries that the group has acknowledged; 0 while Redis is down."""
    try:
        groups = server.client.xinfo_groups(STREAM)
    except Exception:
        return 0
    return sum((group["entries-read"] or 0) - group["pending"] for group in groups)


def kill_redis(server: Server, trainer: Trainer, kill: int) -> None:
    """Every other time; it is down for a moment, in which the trainer notices."""
    if kill % 2 == 0:
        server.kill()
        before = trainer.failures
        wait_until(lambda: trainer.failures > before or trainer.problem)
        threading.Event().wait(random.Random(kill).uniform(0, 0.5))
        server.start()


def all_acknowledged(server: Server, last: bytes) -> bool:
    """Whether the group has applied everything up to an entry, this server or those that were killed."""
    (group,) = server.client.xinfo_groups(STREAM)
    return bool(group["last-delivered-id"] == last and not group["pending"])


@pytest.mark.parametrize("durable", [True, False], ids=["group", "oldest"])
def test_killed_consumers_and_a_killed_redis_lose_nothing_and_change_no_order(workshop: Workshop, durable: bool) -> None:
    with one_server(workshop.folder / "redis", *DURABLE) as redis:
        bus = {"type": "redis_streams", "address": redis.address, "stream": STREAM}
        log = {"type": "row_log", "path": str(workshop.folder / "log"), "initialize_after_startup": False}
        config: dict[str, Any] = {
            "models": [workshop.model((range(9), TRAINED_DIM), (range(9), TRAINED_DIM))],
            "tiers": [COLD, log] if durable else [{"type": "hash_map"}],
            "update_source": {**bus, "poll_timeout_ms": 20, "max_batch_size": 300},
        }
        path = workshop.folder / "ps.json"
        path.write_text(json.dumps(config))
        start = {} if durable else {key: rows_of([key], TRAINED_DIM)[0].tobytes() for key in range(9)}
        oracle: Oracle = [dict(start), dict(start)]
        with RedisStreamsProducer.from_options(address=redis.address, stream=STREAM, linger_ms=0) as producer:
            trainer = Trainer(producer, oracle, pause=0.02)
            trainer.start()
            try:
                kill_consumers(path, partial(acknowledged, redis), partial(kill_redis, redis, trainer))
                wait_until(trainer.enough)
            finally:
                trainer.stopping = True
                join_all(trainer)
            assert trainer.problem is None
            assert trainer.failures > 0
        facts = redis.client.xinfo_stream(STREAM)
        assert facts["entries-added"] > 4 * KILLS
        with hps_numba.HPS(path) as server:
            if durable:
                wait_until(partial(all_acknowledged, redis, facts["last-generated-id"]))
            else:
                wait_for(server, offset_of(facts["last-generated-id"]), partition=STREAM)
            (stats,) = server.update_stats()
            assert (stats.resumes, stats.lost, stats.skipped, stats.retries) == (durable, 0, {}, 0)
            for table in range(2):
                assert content_of(server, table) == oracle[table]
        if durable:
            assert redis.client.xinfo_groups(STREAM)[0]["pending"] == 0
