"""How a process follows what others publish, and that nothing is freed before it has."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from support.children import in_child
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import kill_self, killed, new_name, open_tier
from support.waiting import HANG_SECONDS, wait_until

from hps_numba.storage.shared import epochs as epochs_module
from hps_numba.storage.shared.layout import R_TAG
from hps_numba.storage.shared.segment_file import word_view
from hps_numba.storage.shared.table import SharedHeader
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

TAG, DIM = "hps_et.m.a", 4


@pytest.fixture
def tier() -> Iterator[MultiProcessHashMapTier]:
    opened = open_tier(new_name())
    opened.insert(TAG, np.arange(10), rows_of(np.arange(10), DIM))
    yield opened
    opened.close()


def grow_elsewhere(tier: MultiProcessHashMapTier, first: int = 10, last: int = 3000) -> None:
    keys = np.arange(first, last)
    assert in_child(lambda: tier.insert(TAG, keys, rows_of(keys, DIM)) == last - first) == 0


def test_watchers_are_told_of_an_index_that_another_process_publishes(tier: MultiProcessHashMapTier) -> None:
    store, told = tier.store(TAG, DIM), []
    store.watch(told.append)
    assert told == [store.block]
    grow_elsewhere(tier)
    wait_until(lambda: told[-1] == store.block)
    assert len(told) > 1 and all(before != after for before, after in pairwise(told))
    store.unwatch(told.append)


def test_memory_stays_until_the_caches_of_every_process_were_told(
    tier: MultiProcessHashMapTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs_module, "_FOLLOW_SECONDS", HANG_SECONDS)  # the test takes the steps
    store, told = tier.store(TAG, DIM), []
    store.watch(told.append)
    epochs = store.epochs
    assert isinstance(epochs, epochs_module.SharedEpochs)
    first, words = epochs.oldest(), word_view(store.block, 5)
    kept = words.copy()
    grow_elsewhere(tier)
    assert in_child(lambda: tier.insert(TAG, np.arange(9), rows_of(np.arange(9), DIM, 1)) == 0) == 0
    assert told == [told[0]] and epochs.oldest() <= first  # nobody may free what it leads to
    assert np.array_equal(words, kept)  # the index that the caches still read
    with store.reading():  # a reader that may have begun with the old index
        epochs.step()
        epochs.step()
        assert told[-1] == store.block and epochs.oldest() <= first
    epochs.step()
    wait_until(lambda: epochs.oldest() > first)  # the children have ended, too
    assert_same_bits(np.stack([store_row(tier, key) for key in range(9)]), rows_of(np.arange(9), DIM, 1))
    store.unwatch(told.append)


def test_a_cache_leaves_an_index_whose_writer_was_killed_before_it_said_so(
    tier: MultiProcessHashMapTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(epochs_module, "_FOLLOW_SECONDS", HANG_SECONDS)  # the test takes the steps
    store, told = tier.store(TAG, DIM), []
    store.watch(told.append)
    epochs, regions = store.epochs, tier._tables.regions
    assert isinstance(epochs, epochs_module.SharedEpochs)
    epochs.step()
    region, publish = regions.at(store.block), SharedHeader.publish

    def killed_when_published() -> None:
        def published(header: SharedHeader, block: int) -> None:
            header._epochs.segment.note_published = kill_self  # type: ignore[method-assign]
            publish(header, block)

        SharedHeader.publish = published  # type: ignore[method-assign]
        keys = np.arange(10, 3000)
        tier.insert(TAG, keys, rows_of(keys, DIM))

    killed(killed_when_published)
    assert told == [told[0]] and told[0] != store.block
    with tier._tables.segment.turn():  # any other writer that needs space
        regions.sweep()
        epochs.advance()
    tag = int(regions._table[region, R_TAG])
    assert tag > 0
    assert epochs.oldest() <= tag
    while epochs.oldest() <= tag:
        epochs.step()
    assert told[-1] == store.block
    store.unwatch(told.append)


def store_row(tier: MultiProcessHashMapTier, key: int) -> np.ndarray:
    rows = np.empty((1, DIM), np.float32)
    assert tier.fetch(TAG, np.array([key]), rows).found.all()
    return rows[0]


def test_a_process_with_more_readers_than_records_gets_more(tier: MultiProcessHashMapTier) -> None:
    store = tier.store(TAG, DIM)
    records = [store.epochs.acquire() for _ in range(40)]
    assert len(set(records)) == 40
    for record in records:
        store.epochs.release(record)
    assert_same_bits(store_row(tier, 3), rows_of([3], DIM)[0])


def test_a_forked_child_follows_too(tier: MultiProcessHashMapTier) -> None:
    store, told = tier.store(TAG, DIM), []
    store.watch(told.append)

    def work() -> bool:
        before = len(told)
        grow_elsewhere(tier)
        wait_until(lambda: len(told) > before and told[-1] == store.block)
        return True

    assert in_child(work) == 0
    store.unwatch(told.append)
