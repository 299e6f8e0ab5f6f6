"""Any sequence of updates, deletions, damaged messages, failures and restarts leaves what a dict would have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.factories import COLD, Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.updates import TABLE, applied, offset_in
from support.waiting import wait_until

from hps_numba.updates import Outgoing
from hps_numba.updates.files import FilesProducer

EXAMPLES = int(os.environ.get("HPS_NUMBA_UPDATE_EXAMPLES", "6"))
DIM, LAST = 17, 12  # a width that other tests have kernels for
KEYS = st.lists(st.integers(0, LAST), max_size=6)


class Updates(RuleBasedStateMachine):
    """A folder as the bus; rows on disk, where reading resumes, or in memory, where everything is replayed."""

    @initialize(durable=st.booleans())
    def begin(self, durable: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.workshop = Workshop(Path(self.folder.name))
        self.durable = durable
        self.published = self.bad = 0
        self.model = self.workshop.model((range(9), DIM))
        self.oracle = {} if durable else {key: rows_of([key], DIM)[0] for key in range(9)}
        bus, self.place = str(Path(self.folder.name) / "bus"), Path(self.folder.name) / "place.json"
        self.producer = FilesProducer.from_options(folder=bus, linger_ms=0, sync=False, send_buffer_size=250)
        log = {"type": "row_log", "path": str(Path(self.folder.name) / "log"), "initialize_after_startup": False}
        self.top: dict[str, Any] = {
            "tiers": [COLD, log] if durable else [{"type": "hash_map"}, {"type": "support.fakes:FlakyDictTier"}],
            "update_source": {
                "type": "files",
                "folder": bus,
                "poll_interval_ms": 1,
                "failure_backoff_ms": 1,
                "max_batch_size": 5,
            },
            "cache_on_cpu": True,
        }
        self.open()

    def open(self) -> None:
        self.server = self.workshop.open(self.model, allow_code=True, **self.top)
        assert self.server.update_stats()[0].resumes is self.durable

    @rule(keys=KEYS, stamp=st.integers(0, 20))
    def write(self, keys: list[int], stamp: int) -> None:
        rows = rows_of(keys, DIM, stamp).reshape(-1, DIM)
        self.producer.update("m", "sparse_embedding0", np.array(keys, np.int64), rows)
        self.producer.flush()
        self.oracle.update(zip(keys, rows))

    @rule(keys=KEYS)
    def delete(self, keys: list[int]) -> None:
        self.producer.erase("m", "sparse_embedding0", np.array(keys, np.int64))
        self.producer.flush()
        for key in keys:
            self.oracle.pop(key, None)

    @rule(value=st.binary(max_size=24), table=st.sampled_from([TABLE, "hps_et.m.other", "hps_et.x", "x"]))
    def publish_what_is_no_update(self, value: bytes, table: str) -> None:
        assert self.producer._send([Outgoing(table, 0, value)]) == 1

    @rule()
    def fail_and_mend_a_tier(self) -> None:
        if not self.durable:
            tier = slower_tier(self.server)
            tier.fail_on = {"insert", "erase"}
            self.write([1], 3)
            before = self.server.update_stats()[0].retries
            wait_until(lambda: self.server.update_stats()[0].retries > before)
            tier.fail_on = set()

    @rule()
    def restart(self) -> None:
        self.server.close()
        self.open()

    @rule()
    def compare(self) -> None:
        manifest = self.producer._manifest
        wait_until(lambda: manifest.next_offset == 0 or self.position(manifest.stream) >= manifest.next_offset - 1)
        keys = np.arange(LAST + 2)
        expected = np.full((len(keys), DIM), -7.5, np.float32)
        for key, row in self.oracle.items():
            expected[key] = row
        assert_same_bits(self.server.lookup(keys, "m", 0), expected)
        assert self.server.contains(keys, "m", 0).tolist() == [int(key) in self.oracle for key in keys]

    def position(self, stream: str) -> int:
        """The last offset that is applied, now or, where reading resumes, before a restart."""
        if not self.durable:
            return self.server.update_stats()[0].positions.get(stream, -1)
        return offset_in(self.place)

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.compare()
            self.producer.close()
            self.server.close()
            assert applied(self.server) or not self.server.update_stats()[0].positions
            self.folder.cleanup()


TestUpdates = Updates.TestCase
TestUpdates.settings = settings(max_examples=EXAMPLES, stateful_step_count=15, deadline=None)
