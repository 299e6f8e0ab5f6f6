"""Any sequence of updates, deletions, versions, damaged messages, failures and restarts leaves what a dict would have."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.factories import COLD, Workshop
from support.internals import slower_tier
from support.oracles import assert_same_bits, rows_of
from support.updates import TABLE, fresh_bus
from support.waiting import wait_until

from hps_numba.updates import Outgoing, UpdateProducer, open_producer

EXAMPLES = int(os.environ.get("HPS_NUMBA_UPDATE_EXAMPLES", "6"))
DIM, LAST = 17, 12  # a width that other tests have kernels for
NAME = "sparse_embedding0"
KEYS = st.lists(st.integers(0, LAST), max_size=6)
Rows = dict[int, np.ndarray]


class Updates(RuleBasedStateMachine):
    """One table, one bus. Rows are on disk, where reading resumes, or in memory, where everything is replayed.

    Attributes:
        rows: what the server has to serve.
        number, previous, managed: version in force, the one before it, and whether a message has named one; as the server
            knows them, which forgets them at a restart where it resumes.
        told: messages since the last restart that are about versions, or name one.
    """

    server: Any = None
    producer: UpdateProducer

    @initialize(bus=st.sampled_from(["files", "in_process"]), durable=st.booleans())
    def begin(self, bus: str, durable: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.workshop = Workshop(Path(self.folder.name))
        self.durable = durable or bus == "in_process"  # a queue in memory keeps nothing that was applied
        self.model = self.workshop.model((range(9), DIM))
        self.versions: dict[int, tuple[str, Rows]] = {
            1: (self.model["sparse_files"][0], {key: rows_of([key], DIM)[0] for key in range(9)})
        }
        self.rows = {} if self.durable else dict(self.versions[1][1])
        self.number, self.previous, self.managed, self.told = 1, 0, False, False
        section = {"type": "files", "folder": str(self.workshop.folder / "bus")}
        more = {"linger_ms": 0, "send_buffer_size": 250}
        if bus == "in_process":
            section = {"type": "in_process", "bus": fresh_bus().name}
        else:
            more["sync"] = False
        self.producer = open_producer({**section, **more})
        log = {"type": "row_log", "path": str(self.workshop.folder / "log"), "initialize_after_startup": False}
        source = {**section, "failure_backoff_ms": 1, "poll_timeout_ms": 20, "max_batch_size": 5}
        self.top: dict[str, Any] = {
            "tiers": [COLD, log] if self.durable else [{"type": "hash_map"}, {"type": "support.fakes:PartlyDownTier"}],
            "update_source": {**source, **({"poll_interval_ms": 1} if bus == "files" else {})},
            "cache_on_cpu": True,
        }
        self.open()

    def open(self) -> None:
        self.server = self.workshop.open(self.model, allow_code=True, **self.top)
        assert self.server.update_stats()[0].resumes is self.durable

    # -- rows ---------------------------------------------------------------------

    def takes(self, version: int | None) -> bool:
        return version is None or not self.managed or version == self.number

    @rule(keys=KEYS, stamp=st.integers(0, 20), how=st.sampled_from(["", "", "of this version", "of another version"]))
    def write(self, keys: list[int], stamp: int, how: str = "") -> None:
        version = None if not how else self.number if how == "of this version" else self.number + 1
        self.told = self.told or version is not None
        rows = rows_of(keys, DIM, stamp).reshape(-1, DIM)
        for _ in range(2):  # the second time it changes nothing
            self.producer.update("m", NAME, np.array(keys, np.int64), rows, version=version)
        self.producer.flush()
        if self.takes(version):
            self.rows.update(zip(keys, rows))

    @rule(keys=KEYS)
    def delete(self, keys: list[int]) -> None:
        self.producer.erase("m", NAME, np.array(keys, np.int64))
        self.producer.flush()
        for key in keys:
            self.rows.pop(key, None)

    @rule(value=st.binary(max_size=24), table=st.sampled_from([TABLE, "hps_et.m.other", "hps_et.x", "x"]))
    def publish_what_is_no_update(self, value: bytes, table: str) -> None:
        self.producer.flush()
        assert self.producer._send([Outgoing(table, 0, value)]) == 1

    # -- versions ---------------------------------------------------------------------

    @rule(keys=st.lists(st.integers(0, LAST), min_size=1, unique=True), stamp=st.integers(0, 20))
    def replace(self, keys: list[int], stamp: int) -> None:
        new = max(self.versions) + 1
        path = self.workshop.table(f"version-{new}", keys, DIM, stamp)
        self.versions[new] = path, dict(zip(keys, rows_of(keys, DIM, stamp)))
        self.producer.replace_model("m", new, {NAME: path})
        self.switch_to(new)

    def switch_to(self, number: int) -> None:
        self.previous, self.number = self.number, number
        self.rows = dict(self.versions[number][1])
        self.managed = self.told = True

    @rule()
    def roll_back(self) -> None:
        self.producer.roll_back_model("m", self.previous, [NAME])
        self.managed = self.told = True
        if self.previous:  # else it is skipped
            self.switch_to(self.previous)

    @rule(keys=KEYS, stamp=st.integers(0, 20))
    def snapshot(self, keys: list[int], stamp: int) -> None:
        """Files that hold what there was at the announcement; rows that change until they come are kept."""
        new = max(self.versions) + 1
        self.compare()
        since = self.producer.announce_snapshot("m", new, [NAME])
        before = dict(self.rows)
        self.write(keys, stamp)
        stored = list(before)
        path = self.workshop.table(f"version-{new}", stored, DIM)
        np.array([before[key] for key in stored], np.float32).reshape(-1, DIM).tofile(Path(path) / "emb_vector")
        self.producer.replace_model("m", new, {NAME: path}, since_ms=since)
        self.versions[new] = path, before
        after = self.rows
        self.switch_to(new)
        self.rows = after

    # -- faults ---------------------------------------------------------------------

    @precondition(lambda self: not self.durable)
    @rule(down=st.frozensets(st.integers(0, LAST)), stamp=st.integers(0, 20))
    def a_part_of_a_tier_fails(self, down: frozenset[int], stamp: int) -> None:
        """Until rows are compared, or the next part fails."""
        tier = slower_tier(self.server)
        tier.down, before = down, tier.refused
        self.write(list(range(0, LAST, 2)), stamp)
        if down & set(range(0, LAST, 2)):
            wait_until(lambda: tier.refused > before)

    @rule()
    def restart(self) -> None:
        if self.durable and self.told:  # what waits would be read by a server that knows of no version
            self.compare()
        self.server.close()
        if self.durable:
            self.number, self.previous, self.managed, self.told = 1, 0, False, False
        self.open()

    @rule()
    def compare(self) -> None:
        self.producer.flush()
        if not self.durable:
            slower_tier(self.server).down = frozenset()
        wait_until(self.has_everything)
        keys = np.arange(LAST + 2)
        expected = np.full((len(keys), DIM), -7.5, np.float32)
        for key, row in self.rows.items():
            expected[key] = row
        assert_same_bits(self.server.lookup(keys, "m", 0), expected)
        assert self.server.contains(keys, "m", 0).tolist() == [int(key) in self.rows for key in keys]
        assert self.server.model_version("m") == self.number

    def has_everything(self) -> bool:
        source = self.server._updates._consumers[0]._source
        behind = source.lag()  # first: what was read after that is seen to wait
        (stats,) = self.server.update_stats()
        return not stats.backlog_messages and behind == 0 and stats.committed == stats.positions

    def teardown(self) -> None:
        if self.server is not None:
            self.compare()
            self.producer.close()
            self.server.close()
            assert not self.server.update_stats()[0].lost
            self.folder.cleanup()


TestUpdates = Updates.TestCase
TestUpdates.settings = settings(max_examples=EXAMPLES, stateful_step_count=15, deadline=None)
