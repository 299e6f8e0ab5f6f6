"""Blocks that others wait for: an interrupt anywhere, also in entering and leaving, does not keep one open."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from types import FrameType
from typing import Any

import numpy as np
import pytest
from support.interrupts import interrupted_everywhere
from support.oracles import rows_of
from support.waiting import HANG_SECONDS, join_all, wait_until

from hps_numba.runtime.blocks import Blocks, EnteredAt, has_ended
from hps_numba.storage.host import store as module
from hps_numba.storage.host.epochs import Epochs
from hps_numba.storage.host.store import HostStore
from hps_numba.storage.tier_stack import TierStack

FILES = ("runtime/blocks.py", "storage/host/epochs.py", "storage/tier_stack.py", "contextlib.py")
KEYS, DIM = np.arange(20), 3


def test_an_interrupted_block_is_not_waited_for() -> None:
    blocks = Blocks()

    def call() -> None:
        with blocks.block():
            pass

    kept = []
    for interrupt in interrupted_everywhere(call, *FILES):
        kept.append(interrupt)  # with the variables of the call, as a notebook keeps the last traceback
        assert blocks.wait(HANG_SECONDS)
    assert len(kept) > 10


@pytest.mark.parametrize("step", ["plain", "stacked", "generator"])
def test_a_block_that_is_entered_is_waited_for(step: str) -> None:
    blocks, inside, leave = Blocks(), threading.Event(), threading.Event()

    @contextmanager
    def suspended() -> Iterator[None]:
        with blocks.block():
            yield

    def work() -> None:
        with ExitStack() as stack:
            if step == "plain":
                with blocks.block():
                    inside.set()
                    assert leave.wait(HANG_SECONDS)
                return
            stack.enter_context(blocks.block() if step == "stacked" else suspended())
            inside.set()
            assert leave.wait(HANG_SECONDS)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(HANG_SECONDS)
    assert not blocks.wait(0.1) and len(blocks) == 1
    leave.set()
    assert blocks.wait(HANG_SECONDS) and not len(blocks)
    join_all(thread)


@pytest.mark.parametrize("step", ["plain", "stacked", "generator"])
def test_an_epoch_that_is_held_is_waited_for(step: str) -> None:
    epochs = Epochs()

    @contextmanager
    def suspended() -> Iterator[None]:
        with epochs.reading():
            yield

    with ExitStack() as stack:
        if step == "plain":
            with epochs.reading():
                assert not epochs.wait(epochs.advance(), 0.1)
        else:
            stack.enter_context(epochs.reading() if step == "stacked" else suspended())
            tag = epochs.advance()
            assert not epochs.wait(tag, 0.1)
            for _ in range(200):
                epochs.advance()
            assert epochs.oldest() <= tag
    assert epochs.wait(epochs.advance(), HANG_SECONDS)


def reads(store: HostStore) -> dict[str, Callable[[], object]]:
    rows, words = np.empty((len(KEYS), DIM), np.float32), np.empty(len(KEYS), np.int64)
    return {"keys": store.keys, "gather": lambda: store.gather(KEYS, rows, words)}


@pytest.mark.parametrize("read", ["keys", "gather"])
def test_an_interrupted_read_of_a_store_keeps_no_memory(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", HANG_SECONDS)
    store = HostStore(DIM)
    store.upsert(KEYS, rows_of(KEYS, DIM))
    kept = []
    for interrupt in interrupted_everywhere(reads(store)[read], *FILES):
        kept.append(interrupt)
        assert store.wait_for_readers(HANG_SECONDS)
    assert len(kept) > 10
    store.close()


def test_an_interrupted_read_that_nobody_waits_for_does_not_pin_memory_forever() -> None:
    store = HostStore(DIM)
    store.upsert(KEYS, rows_of(KEYS, DIM))
    read, kept = reads(store)["keys"], []
    for interrupt in interrupted_everywhere(read, *FILES):
        kept.append(interrupt)
        tag = store.epochs.advance()
        for _ in range(200):
            store.epochs.advance()
        wait_until(lambda tag=tag: store.epochs.oldest() > tag)  # type: ignore[misc]
    store.close()


def test_an_interrupted_read_of_slower_tiers_does_not_keep_them_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TierStack, "GRACE_SECONDS", HANG_SECONDS)
    kept = []
    stack = TierStack([])

    def call() -> None:
        nonlocal stack
        stack = TierStack([])
        stack.contains("m", KEYS)

    for interrupt in interrupted_everywhere(call, *FILES):
        kept.append(interrupt)
        stack.close()
    assert len(kept) > 10


def interrupted_once_entered(call: Callable[[], object]) -> KeyboardInterrupt:
    """Interrupt a call when the first ``__enter__`` of a block has done its work and is about to return."""
    entered = False

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal entered
        ours = frame.f_code.co_name == "__enter__" and frame.f_code.co_filename.endswith(FILES)
        if ours and event == "return" and not entered:
            entered = True
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as problem:
        return problem
    finally:
        sys.settrace(before)
    raise AssertionError("no block was entered")


def test_a_read_interrupted_once_it_has_entered_its_block_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    store = HostStore(DIM)
    store.upsert(KEYS, rows_of(KEYS, DIM))
    kept = [interrupted_once_entered(read) for read in reads(store).values()]
    assert store.wait_for_readers(HANG_SECONDS)
    store.close()
    monkeypatch.setattr(TierStack, "GRACE_SECONDS", HANG_SECONDS)
    stack = TierStack([])
    kept.append(interrupted_once_entered(lambda: stack.contains("m", KEYS)))
    stack.close()
    assert len(kept) == 3


def test_whether_a_frame_has_ended_is_told_while_threads_run_in_it() -> None:
    """Asked of many threads that return all the time; a walk of their stacks crashed CPython 3.11."""
    frames: list[FrameType | None] = [None] * 50  # the last ones
    places, stop = count(), threading.Event()

    def inner(depth: int) -> int:
        if depth:
            return inner(depth - 1)
        frames[next(places) % 50] = frame = sys._getframe()
        assert not has_ended(frame)
        return depth

    def work() -> None:
        while not stop.is_set():
            inner(5)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        for frame in list(frames):
            has_ended(frame)
    wait_until(lambda: frames[-1] is not None)
    stop.set()
    join_all(*threads)
    assert all(map(has_ended, frames)) and not has_ended(sys._getframe()) and not has_ended(None)


def test_a_frame_that_raised_has_ended_while_its_traceback_is_kept() -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError) as caught:
        fail()
    assert has_ended(caught.tb.tb_next.tb_frame) and not has_ended(caught.tb.tb_frame)  # type: ignore[union-attr]


class Entered:
    """Notes where it is entered."""

    def __init__(self) -> None:
        self.at: list[EnteredAt] = []

    def __enter__(self) -> None:
        self.at.append(EnteredAt(sys._getframe(1)))

    def __exit__(self, *problem: Any) -> None:
        return


def test_where_a_block_was_entered_tells_that_it_is_over_only_if_that_is_certain() -> None:
    block = Entered()

    def by_statement() -> None:
        for _ in range(2):
            with block:
                assert not block.at[-1].is_over
        with block:
            pass

    def by_call() -> None:
        block.__enter__()

    def by_stack() -> None:
        ExitStack().enter_context(block)

    def by_generator() -> Iterator[None]:
        with block:
            yield

    by_statement()
    first, again, other = block.at
    assert again.is_over and first.is_left_for(again) and not again.is_left_for(other)
    assert "test_blocks.py, in " in str(first) and "by_statement" in str(first)
    block.at.clear()
    by_call()
    by_stack()
    list(by_generator())
    assert len(block.at) == 3 and not any(at.is_over for at in block.at)
