"""A row_log does what a dict does, through restarts, compactions and readers beside it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from support.oracles import rows_of
from support.row_logs import READS
from support.tiers import DIM, TAG, content_of, fetch, ints

from hps_numba.storage.tiers.row_log import RowLogTier

KEYS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
EXAMPLES = int(os.environ.get("HPS_NUMBA_EXAMPLES", "2"))  # a hundred or more for a long run
OTHER = "hps_et.m.other"


class Machine(RuleBasedStateMachine):
    """Two tables of a writer, and what a reader beside it sees."""

    reads = "mmap"
    bound: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.expected: dict[str, dict[int, bytes]] = {TAG: {}, OTHER: {}}
        self.stamp = 0
        self.tier = self.open()
        self.reader = self.open(read_only=True)

    def open(self, **keys: Any) -> RowLogTier:
        options = {"reads": self.reads, "segment_bytes": 4096, "max_batch_size": 5, "sync": "never", **self.bound}
        return RowLogTier.from_options(path=str(self.folder), **options, **keys)

    @rule(keys=KEYS, table=st.sampled_from([TAG, OTHER]))
    def insert(self, keys: list[int], table: str) -> None:
        self.stamp += 1
        rows = rows_of(keys, DIM, self.stamp)
        new = self.tier.insert(table, ints(*keys), rows)
        before = self.expected[table]
        assert new == len(set(keys) - before.keys())
        before.update({key: row.tobytes() for key, row in zip(keys, rows, strict=True)})

    @rule(keys=KEYS, table=st.sampled_from([TAG, OTHER]))
    def erase(self, keys: list[int], table: str) -> None:
        present = self.expected[table].keys() & set(keys)
        assert self.tier.erase(table, ints(*keys)) == len(present)
        for key in present:
            del self.expected[table][key]

    @rule()
    def drop(self) -> None:
        assert self.tier.erase(OTHER) == len(self.expected[OTHER])
        self.expected[OTHER] = {}

    @rule(table=st.sampled_from([TAG, OTHER]))
    def compact(self, table: str) -> None:
        assert self.tier.compact(table) >= 0

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self.open()

    @rule()
    def another_reader(self) -> None:
        self.reader.close()
        self.reader = self.open(read_only=True)

    @rule(keys=KEYS, by_reader=st.booleans())
    def look_up(self, keys: list[int], by_reader: bool) -> None:
        tier = self.reader if by_reader else self.tier
        answer, rows = fetch(tier, TAG, ints(*keys))
        for key, found, row in zip(keys, answer.found, rows, strict=True):
            assert found == (key in self.expected[TAG])
            assert not found or row.tobytes() == self.expected[TAG][key]

    @precondition(lambda self: self.stamp % 3 == 0)
    @invariant()
    def holds_what_the_dict_holds(self) -> None:
        for table, expected in self.expected.items():
            for tier in (self.tier, self.reader):
                assert content_of(tier, table, 7) == expected
                assert tier.size(table) == len(expected)

    def teardown(self) -> None:
        self.tier.close()
        self.reader.close()
        shutil.rmtree(self.folder)


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("bound", [{}, {"max_bytes": 1 << 16}], ids=["without a bound", "within a bound"])
def test_it_does_what_a_dict_does(reads: str, bound: dict[str, Any]) -> None:
    machine = type("OfReads", (Machine,), {"reads": reads, "bound": bound})
    few = settings(
        max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
    )
    run_state_machine_as_test(machine, settings=few)


def test_each_compaction_frees_what_is_not_needed(tmp_path: Path) -> None:
    with_garbage = RowLogTier.from_options(path=str(tmp_path), segment_bytes=4096)
    keys = np.arange(300)
    for stamp in range(10):
        with_garbage.insert(TAG, keys, rows_of(keys, DIM, stamp))
    before = with_garbage.disk_bytes(TAG)
    freed = with_garbage.compact(TAG)
    after = with_garbage.disk_bytes(TAG)
    assert freed == before - after > 0.8 * before
    files = sum(path.stat().st_size for path in tmp_path.glob("table-*/*"))
    assert files == after
    assert content_of(with_garbage, TAG, 100) == {int(key): rows_of([key], DIM, 9)[0].tobytes() for key in keys}
    with_garbage.close()
