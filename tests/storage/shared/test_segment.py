"""A segment in one process: pinned for devices, waited for, left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from support.children import in_child
from support.oracles import rows_of
from support.pinned import Registrar
from support.shared_memory import MIB, kill_self, killed, new_name, open_tier, segment_file, started_child
from support.waiting import wait_until

from hps_numba.errors import CapacityError, ConfigError, TierUnavailable
from hps_numba.storage.shared import segment as segments
from hps_numba.storage.shared.content import SharedContent
from hps_numba.storage.shared.layout import PAGE, R_OWNER, R_SIZE, R_TAG, SPACE, W_WRITER

TAG, DIM = "hps_et.m.a", 16


@pytest.fixture
def name() -> Iterator[str]:
    given = new_name()
    yield given
    segment_file(given).unlink(missing_ok=True)


def test_a_segment_is_pinned_whole_and_once_and_by_its_process_only(name: str) -> None:
    tier, registrar = open_tier(name, MIB), Registrar()
    segment = tier._tables.segment
    for _ in range(2):
        segment.pin(registrar.register, registrar.unregister)
    pinned = {segment.address: segment.size}
    assert registrar.ranges == pinned
    assert segments.present_bytes(name) == segment.size

    def leave() -> bool:
        tier.close()
        return registrar.ranges == pinned  # they are the parent's

    assert in_child(leave) == 0
    tier.insert(TAG, np.arange(9), rows_of(range(9), 4))
    tier.close()
    assert registrar.ranges == {}


def test_others_write_while_a_segment_is_pinned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "LOCK_SECONDS", 0.1)
    tier, registrar = open_tier(name, MIB), Registrar()
    segment, steps = tier._tables.segment, []
    tier.insert(TAG, np.arange(9), rows_of(range(9), DIM))

    def beside(step: Callable[[int, int], object]) -> Callable[[int, int], None]:
        def done(start: int, size: int) -> None:
            steps.append(in_child(lambda: tier.insert(TAG, np.arange(9), rows_of(range(9), DIM)) == 0))
            step(start, size)

        return done

    monkeypatch.setattr(segment, "fill", beside(segment.fill))
    segment.pin(beside(registrar.register), registrar.unregister)
    assert steps == [0, 0]
    assert registrar.ranges == {segment.address: segment.size}
    tier.close()


def test_a_segment_that_cannot_be_pinned_is_an_error(name: str) -> None:
    tier = open_tier(name, MIB)
    with pytest.raises(CapacityError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        tier._tables.segment.pin(Registrar(limit=4096).register, Registrar().unregister)
    tier.insert(TAG, np.arange(9), rows_of(range(9), 4))
    tier.close()


def test_a_writer_that_is_stopped_is_named_to_those_who_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier(name, MIB)
    tier.insert(TAG, np.arange(9), rows_of(range(9), 4))
    segment = tier._tables.segment

    def hold() -> None:
        with segment.turn():
            os.kill(os.getpid(), signal.SIGSTOP)

    child = started_child(hold)
    os.waitpid(child, os.WUNTRACED)
    wait_until(lambda: segment.words[W_WRITER] == child)
    monkeypatch.setattr(segments, "LOCK_SECONDS", 0.01)
    with pytest.raises(TierUnavailable, match=f"process {child} has kept the turn of the writers"):
        tier.insert(TAG, np.arange(9), rows_of(range(9), 4))
    rows = np.empty((9, 4), np.float32)
    assert tier.fetch(TAG, np.arange(9), rows).found.all()  # readers do not wait
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert tier.insert(TAG, np.arange(10), rows_of(range(10), 4)) == 1
    tier.close()


def test_two_users_in_one_process_share_a_segment_and_agree(name: str) -> None:
    first, second = open_tier(name, MIB), open_tier(name, MIB)
    first.insert(TAG, np.arange(9), rows_of(range(9), 4))
    assert second.size(TAG) == 9
    with pytest.raises(ConfigError, match="shared_memory_auto_remove: expected true"):
        open_tier(name, MIB, auto_remove=False)
    first.close()
    assert second.insert(TAG, np.arange(10), rows_of(range(10), 4)) == 1
    second.close()
    assert not segment_file(name).exists()


def test_a_growth_that_fails_gives_back_the_space_behind_the_rows(name: str) -> None:
    tier = open_tier(name, MIB)
    segment, regions = tier._tables.segment, tier._tables.regions
    rows_bytes = PAGE  # of 64 slots
    with segment.turn():
        gap = regions.allocate(2 * rows_bytes, "gap")
        barrier = regions.allocate(1, "barrier")
        regions.free(gap)
        content = SharedContent.create(segment, regions, DIM, 0)
        table, rows = content.places
        assert regions.address(rows) < regions.address(barrier) < regions.address(table)
        rest = regions.allocate(MIB - (regions.address(table) + regions.size(table) - segment.address - SPACE), "rest")
        sizes = regions.size(rows), regions.committed(rows)
        with pytest.raises(CapacityError, match="table: index"):
            content.build_index(32)
        assert (regions.size(rows), regions.committed(rows)) == sizes
        regions.free(rest)
        index, live = content.build_index(32)
        content.use_index(index, live)
        assert content.places[1] == rows and regions.size(rows) > sizes[0]
    tier.close()


def test_space_of_a_killed_process_is_free_though_another_one_has_its_pid_and_block(name: str) -> None:
    tier = open_tier(name, MIB)
    segment, regions = tier._tables.segment, tier._tables.regions

    def take() -> None:
        with segment.turn():
            regions.allocate(PAGE, "of the killed one")
        kill_self()

    killed(take)
    (region,) = np.flatnonzero(regions._table[:, R_SIZE]).tolist()
    block = (int(regions._table[region, R_OWNER]) & 0xFFFF) - 1
    pid = int(segment.pids[block])

    def sweep() -> bool:
        assert segment.blocks == [block]
        segment.pids[block] = pid  # as in a container that was started again
        with segment.turn():
            regions.sweep()
            return bool(regions._table[region, R_TAG])

    assert in_child(sweep) == 0
    tier.close()


def test_a_process_that_is_interrupted_while_it_waits_to_leave_keeps_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(name, MIB)
    segment = tier._tables.segment

    def interrupted(*given: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(segments, "lock_within", interrupted)
        tier.close()
    assert segment._file == -1 and not np.count_nonzero(segment.pids) and segment_file(name) not in segments._attached
    again = open_tier(name, MIB)
    assert again._tables.segment is not segment
    again.close()
    assert not segment_file(name).exists()


def test_a_segment_whose_leaving_was_interrupted_before_it_began_is_left_later(name: str) -> None:
    tier = open_tier(name, MIB)
    segment = tier._tables.segment
    segment.users = 0  # as of a process that is interrupted right then
    again = open_tier(name, MIB)
    assert segment._file == -1 and again._tables.segment.users == 1
    again.close()
    assert not segment_file(name).exists()
    tier.close()
