"""Memory of answers that is used again, and never while somebody holds it."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from hps_numba.arrays.buffer_pool import BufferPool, _rounded, aligned_empty

FLOAT = np.dtype(np.float32)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1000, 16), (100_000, 8), (0, 8)])
def test_arrays_are_aligned_and_writable(shape: tuple[int, ...]) -> None:
    for dtype in (np.float32, np.float16, np.int64):
        array = aligned_empty(shape, dtype)
        assert array.shape == shape and array.dtype == dtype and array.flags.carray
        assert address(array) % 64 == 0 or not array.size
        array[...] = 1


def test_memory_is_used_again_when_the_last_view_is_gone() -> None:
    used = BufferPool(1 << 20)
    first = used.array((100, 10), FLOAT)
    where, view = address(first), first[5:]
    del first
    assert used.bytes == 0 and address(used.array((100, 10), FLOAT)) != where
    view[:] = 7
    del view
    gc.collect()
    again = [used.array((10, 100), FLOAT), used.array((10, 100), FLOAT)]
    assert where in {address(array) for array in again}
    assert address(again[0]) != address(again[1])


def test_no_more_is_kept_than_the_bound() -> None:
    used = BufferPool(10_000)
    arrays = [used.array((1000,), FLOAT) for _ in range(5)]
    arrays.clear()
    assert used.bytes == 2 * _rounded(4000) <= 10_000
    large = used.array((10_000,), FLOAT)
    del large
    assert used.bytes <= 10_000
    used.reset_after_fork()
    assert used.bytes == 0


def test_sizes_are_rounded_up_by_an_eighth_at_most() -> None:
    sizes = [_rounded(size) for size in range(1, 5000)]
    assert all(size <= rounded <= size * 1.125 for size, rounded in zip(range(1, 5000), sizes, strict=True))
    assert sizes == sorted(sizes) and len(set(sizes)) < 100


def test_threads_never_share_memory() -> None:
    used, wrong = BufferPool(1 << 24), []

    def work(number: int) -> None:
        for turn in range(2000):
            array = used.array((64 + turn % 5, 16), FLOAT)
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
