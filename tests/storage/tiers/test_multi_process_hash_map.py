"""One copy of the rows for several processes: what they see of each other, in which order they come and go, what they share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.children import in_child
from support.oracles import assert_same_bits, rows_of
from support.shared_memory import MIB, Peer, kill_self, killed, new_name, open_tier, segment_file
from support.tiers import DIM, TAG, content_of, fetch, ints
from support.waiting import wait_until

from hps_numba.errors import CapacityError, ClosedError, ConfigError, TierError, TierUnavailable
from hps_numba.kernels.host.write import STATE_RETIRED
from hps_numba.storage.shared import segment
from hps_numba.storage.shared import segment_file as files
from hps_numba.storage.shared.content import SharedContent
from hps_numba.storage.shared.layout import LAYOUT_VERSION, PAGE, SPACE, W_LAYOUT
from hps_numba.storage.tiers.multi_process_hash_map import MultiProcessHashMapTier

OTHER = "hps_et.m.b"
Open = Callable[..., MultiProcessHashMapTier]


@pytest.fixture
def name() -> Iterator[str]:
    given = new_name()
    yield given
    segment_file(given).unlink(missing_ok=True)


@pytest.fixture
def opened(name: str) -> Iterator[Open]:
    made: list[MultiProcessHashMapTier] = []

    def one(size: int = 16 * MIB, **options: Any) -> MultiProcessHashMapTier:
        made.append(open_tier(name, size, **options))
        return made[-1]

    yield one
    for tier in made:
        tier.close()


def served_rows(tier: MultiProcessHashMapTier, keys: np.ndarray, table: str = TAG, dim: int = DIM) -> np.ndarray:
    answer, rows = fetch(tier, table, keys, dim)
    assert answer.found.all()
    return rows


# -- several processes ----------------------------------------------------------------------------------------------------


def test_processes_read_and_write_the_same_rows_and_the_last_one_removes_the_segment(  # D14
    name: str, opened: Open
) -> None:
    first, keys = opened(), ints(*range(50))
    first.insert(TAG, keys, rows_of(keys, DIM))
    peer = Peer(name=name)
    assert (peer.do("tables"), peer.do("size", table=TAG)) == ([TAG], 50)
    assert_same_bits(peer.rows(TAG, keys), rows_of(keys, DIM))
    newer = rows_of(keys, DIM, 1)
    assert peer.do("insert", table=TAG, keys=[*range(40, 50), 99], rows=[*newer[40:].tolist(), [1, 2, 3]]) == 1
    assert_same_bits(served_rows(first, keys[40:]), newer[40:])
    assert first.size(TAG) == 51
    assert peer.do("insert", table=OTHER, keys=[1], rows=[[5.0]]) == 1
    assert served_rows(first, ints(1), OTHER, 1).tolist() == [[5.0]]
    first.close()  # in any order
    assert_same_bits(peer.rows(TAG, keys[40:]), newer[40:])
    second = opened()
    assert second.size(TAG) == 51
    peer.end()
    assert served_rows(second, ints(99)).tolist() == [[1, 2, 3]]
    assert segment_file(name).exists()
    second.close()
    assert not segment_file(name).exists()


def test_a_table_that_another_process_erases_is_unknown_and_may_come_back_with_another_width(name: str, opened: Open) -> None:
    tier = opened()
    tier.insert(TAG, ints(1), rows_of([1], DIM))
    store = tier.store(TAG, DIM)
    assert in_child(lambda: tier.erase(TAG) == 1) == 0
    with pytest.raises(ClosedError, match="closed"):
        store.lookup(ints(1), np.empty((1, DIM), np.float32))
    assert (tier.tables(), tier.size(TAG), fetch(tier, TAG, ints(1))[0].found.tolist()) == ([], 0, [False])
    assert in_child(lambda: tier.insert(TAG, ints(1, 2), rows_of([1, 2], DIM + 1)) == 2) == 0
    assert_same_bits(served_rows(tier, ints(1, 2), dim=DIM + 1), rows_of([1, 2], DIM + 1))
    with pytest.raises(TierError, match=f"expected rows of width {DIM + 1}, got {DIM}"):
        tier.insert(TAG, ints(1), rows_of([1], DIM))


def test_tables_grow_in_turns_of_two_processes(opened: Open) -> None:
    """Each growth of one table finds the other one behind it, so rows move; each writer goes on with the slots of the other."""
    tier, step = opened(), 700

    def insert_some(first: int) -> bool:
        for table in (TAG, OTHER):
            for start in range(first, first + 2 * step, step):
                keys = np.arange(start, start + step)
                tier.insert(table, keys, rows_of(keys, DIM))
                tier.erase(table, keys[::7])
        return True

    for turn in range(6):
        if turn % 2:
            assert in_child(partial(insert_some, 2 * step * turn)) == 0
        else:
            insert_some(2 * step * turn)
    every = np.arange(12 * step)
    kept = every[(every % step) % 7 != 0]
    for table in (TAG, OTHER):
        assert content_of(tier, table, 4096) == dict(zip(kept.tolist(), map(bytes, rows_of(kept, DIM)), strict=True))
        assert tier.size(table) == len(kept)


def test_rows_are_evicted_by_one_bound_whoever_writes(name: str, opened: Open) -> None:
    bound = {"overflow_margin": 100, "num_partitions": 1, "overflow_policy": "evict_oldest", "max_batch_size": 20}
    tier = opened(**bound)
    tier.insert(TAG, np.arange(30), rows_of(np.arange(30), DIM))
    assert in_child(lambda: tier.insert(TAG, np.arange(30, 90), rows_of(np.arange(30, 90), DIM)) == 60) == 0
    tier.insert(TAG, np.arange(90, 110), rows_of(np.arange(90, 110), DIM))
    assert (tier.size(TAG), tier.capacity(TAG)) == (80, 100)
    assert sorted(content_of(tier, TAG)) == list(range(30, 110))
    other = opened(**{**bound, "overflow_margin": 99})
    with pytest.raises(ConfigError, match=r"overflow_policy.*100 rows, evict_oldest, 0\.8.*got Bounds\(max_rows=99"):
        other.insert(TAG, ints(1), rows_of([1], DIM))


# -- forks ----------------------------------------------------------------------------------------------------------------


def test_a_forked_child_reads_and_writes_and_leaves_by_ending(opened: Open, name: str) -> None:
    tier, keys = opened(), np.arange(20)
    tier.insert(TAG, keys, rows_of(keys, DIM))

    def work() -> bool:
        same = np.array_equal(served_rows(tier, keys), rows_of(keys, DIM))
        return same and tier.insert(TAG, keys + 10, rows_of(keys + 10, DIM, 1)) == 10

    assert in_child(work) == 0
    assert_same_bits(served_rows(tier, keys + 10), rows_of(keys + 10, DIM, 1))
    tier.close()
    assert not segment_file(name).exists()


# -- processes that die ---------------------------------------------------------------------------------------------------


def test_a_writer_that_is_killed_in_the_middle_of_a_write_blocks_nobody(  # D14
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, keys = opened(), np.arange(1000)
    tier.insert(TAG, keys, rows_of(keys, DIM))

    def end_here(content: SharedContent, epochs: object) -> None:
        if content.state[STATE_RETIRED]:  # rows have been changed
            kill_self()

    def write_half() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedContent, "retire_slots", end_here)
            tier.insert(TAG, keys[:300], rows_of(keys[:300], DIM, 1))

    killed(write_half)
    assert_same_bits(served_rows(tier, keys[300:]), rows_of(keys[300:], DIM))
    assert_same_bits(served_rows(tier, keys[:300]), rows_of(keys[:300], DIM, 1))  # the batch was as good as done
    slots = tier.store(TAG, DIM).slots
    for stamp in range(2, 12):  # the slots of the old rows are found again
        tier.insert(TAG, keys[:30], rows_of(keys[:30], DIM, stamp))
    assert tier.size(TAG) == 1000
    assert tier.store(TAG, DIM).slots <= slots + 30
    assert_same_bits(served_rows(tier, keys[:30]), rows_of(keys[:30], DIM, 11))


def test_a_writer_that_is_killed_while_a_table_grows_leaves_no_space_behind(opened: Open) -> None:
    tier, keys, more = opened(2 * MIB), np.arange(8000), np.arange(8000, 16000)
    tier.insert(TAG, keys, rows_of(keys, DIM))

    def grow(step: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SharedContent, step, lambda *given: kill_self())
            tier.insert(TAG, more, rows_of(more, DIM))

    for _ in range(6):  # each leaves a part of the segment that only it knew
        killed(partial(grow, "_copied_to"))
    killed(partial(grow, "use_index"))  # readers of others have the new index already
    tier.insert(TAG, more, rows_of(more, DIM))
    assert_same_bits(served_rows(tier, np.arange(16000)), rows_of(np.arange(16000), DIM))
    assert tier.size(TAG) == 16000


def test_a_reader_that_is_killed_keeps_no_memory(opened: Open) -> None:
    tier, keys = opened(), np.arange(100)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    store = tier.store(TAG, DIM)

    def read() -> None:
        with store.reading():
            kill_self()

    killed(read)
    tag = store.epochs.advance()
    wait_until(lambda: store.epochs.oldest() > tag)


def test_a_segment_whose_processes_were_all_killed_is_made_anew(name: str, opened: Open) -> None:
    peer = Peer(name=name)
    peer.do("insert", table=TAG, keys=[1], rows=[[1, 2, 3]])
    peer.kill()
    assert segment_file(name).exists()
    assert opened().tables() == []


def test_without_auto_remove_rows_outlive_the_processes(name: str, opened: Open) -> None:
    peer = Peer(name=name, auto_remove=False)
    peer.do("insert", table=TAG, keys=[1], rows=[[1, 2, 3]])
    peer.kill()
    with pytest.raises(ConfigError, match=r"shared_memory_auto_remove: expected false, as the creator of .* gave, got true"):
        opened()
    tier = opened(auto_remove=False)
    assert served_rows(tier, ints(1)).tolist() == [[1, 2, 3]]
    tier.close()
    assert segment_file(name).exists()


# -- segments that cannot be used -----------------------------------------------------------------------------------------


def left_behind(name: str) -> Path:
    """The file of a segment that nobody uses."""
    open_tier(name, auto_remove=False).close()
    return segment_file(name)


def test_a_segment_of_another_layout_is_refused(name: str, opened: Open) -> None:
    with left_behind(name).open("r+b") as file:
        file.seek(8 * W_LAYOUT)
        file.write((77).to_bytes(8, "little"))
    with pytest.raises(TierUnavailable, match=f"expected layout version {LAYOUT_VERSION}, got 77"):
        opened(auto_remove=False)


@pytest.mark.parametrize("begin", [b"xxxxxxxx", bytes(8)])
def test_a_file_that_is_no_segment_is_refused_and_kept(name: str, opened: Open, begin: bytes) -> None:
    foreign = begin + b"x" * 2 * PAGE
    segment_file(name).write_bytes(foreign)
    segment_file(name).chmod(0o600)
    with pytest.raises(
        TierUnavailable, match=re.escape(f"expected a segment of hps_numba, got a file that begins with {begin!r}")
    ):
        opened()
    assert segment_file(name).read_bytes() == foreign


def test_a_segment_whose_maker_was_killed_is_made_anew(name: str) -> None:
    for step in ("pwrite", "ftruncate", "posix_fallocate"):

        def maker_killed_after(step: str = step) -> None:
            make = getattr(os, step)

            def made(file: int, *given: object) -> None:
                make(file, *given)
                if os.fstat(file).st_size:
                    kill_self()

            setattr(os, step, made)
            open_tier(name, 2 * MIB)

        killed(maker_killed_after)
        assert segment_file(name).stat().st_size == (8 if step == "pwrite" else SPACE + 2 * MIB)
    tier = open_tier(name, MIB)
    assert segment_file(name).stat().st_size == SPACE + MIB
    tier.close()


def test_a_segment_that_others_may_read_or_own_is_refused(name: str, opened: Open) -> None:
    file = left_behind(name)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(
        TierUnavailable, match=r"expected a file of user \d+ with mode 0600, got one of user \d+ with mode 0644"
    ):
        opened(auto_remove=False)
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
        with pytest.raises(TierUnavailable, match="got one of user 12345 with mode 0600"):
            opened(auto_remove=False)
    file.unlink()
    file.symlink_to("/etc/hostname")
    with pytest.raises(TierUnavailable, match="cannot be opened"):
        opened(auto_remove=False)


def test_an_address_that_is_taken_is_named(name: str, opened: Open) -> None:
    peer = Peer(name=name)
    words = np.fromfile(segment_file(name), np.int64, 4)
    address, size = int(words[2]), int(words[3])
    files.cover(address, size)  # as a library that maps memory there would
    files._covered.pop(address)
    with pytest.raises(TierUnavailable, match=f"expected to map .* at {address:#x}"):
        opened()
    peer.end()


@pytest.fixture
def small_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Where segments are: a file system of the given size, as in a container."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / size
        folder.mkdir()
        if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size={size} tmpfs {folder} 2>/dev/null"):
            pytest.skip("needs root, to mount a file system that is soon full")
        mounted.append(folder)
        monkeypatch.setattr(segment, "FOLDER", folder)
        return folder

    yield mount
    for folder in mounted:
        assert os.system(f"umount {folder}") == 0


def test_a_full_file_system_is_an_error_and_no_crash(small_folder: Callable[[str], Path], name: str) -> None:
    folder = small_folder("3m")
    tier, keys = open_tier(name, 64 * MIB), np.arange(1000)
    tier.insert(TAG, keys, rows_of(keys, 32))
    with pytest.raises(CapacityError, match=rf"more of shared memory, got No space left.*in {folder} \(Docker: --shm-size\)"):
        for start in range(1000, 100_000, 1000):
            tier.insert(TAG, keys + start, rows_of(keys + start, 32))
    assert tier.size(TAG) > 1000
    written = np.arange(tier.size(TAG))
    assert_same_bits(served_rows(tier, written, dim=32), rows_of(written, 32))
    tier.close()
    assert not list(folder.iterdir())


def test_a_file_system_without_room_for_a_segment_is_left_as_it_was(small_folder: Callable[[str], Path], name: str) -> None:
    folder = small_folder("256k")
    with pytest.raises(CapacityError, match="more of shared memory"):
        open_tier(name)
    assert not list(folder.iterdir())


def test_a_full_segment_names_the_table_and_keeps_what_it_has(opened: Open, name: str) -> None:
    tier, keys = opened(256 << 10), np.arange(500)
    tier.insert(TAG, keys, rows_of(keys, DIM))
    with pytest.raises(CapacityError, match=rf"{TAG}: .*: expected .* in one piece of .*{name}.*a larger shared_memory_size"):
        for start in range(500, 100_000, 500):
            tier.insert(TAG, keys + start, rows_of(keys + start, DIM))
    written = np.arange(tier.size(TAG))
    assert len(written) > 1000
    assert_same_bits(served_rows(tier, written), rows_of(written, DIM))
    assert tier.erase(TAG, written[:200]) == 200
    tier.insert(TAG, written[:200], rows_of(written[:200], DIM, 1))  # and there is room again
    assert_same_bits(served_rows(tier, written[:200]), rows_of(written[:200], DIM, 1))


def test_a_process_comes_back_to_a_segment_that_was_made_with_another_size(name: str, opened: Open) -> None:
    for size in (2, 4, 1):
        peer = Peer(name=name, size=size * MIB)
        tier = opened(size=7 * MIB)  # its creator's counts
        tier.insert(TAG, np.arange(9), rows_of(range(9), DIM, size))
        assert_same_bits(peer.rows(TAG, np.arange(9)), rows_of(range(9), DIM, size))
        tier.close()
        peer.end()
    assert not segment_file(name).exists()


def test_what_was_left_gives_no_memory_behind_it_away(name: str, opened: Open) -> None:
    peer = Peer(name=name, size=MIB)
    tier = opened()
    address, size = tier._tables.segment.address, tier._tables.segment.size
    tier.close()
    peer.end()
    files.cover(address + size, PAGE)  # as a library that maps memory there would
    files._covered.pop(address + size)
    peer = Peer(name=name, size=2 * MIB)
    with pytest.raises(TierUnavailable, match=f"expected to map .* at {address:#x}"):
        opened()
    peer.end()
