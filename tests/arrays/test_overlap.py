"""Overlaps found by addresses are those that NumPy's own exact test finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hps_numba.arrays.overlap import is_shared, overlaps_itself

SIZES = st.lists(st.integers(0, 5), min_size=0, max_size=4)


@given(shape=SIZES, data=st.data())
def test_an_array_overlaps_itself_if_two_elements_share_a_byte(shape: list[int], data: st.DataObject) -> None:
    strides = data.draw(st.lists(st.integers(-30, 30), min_size=len(shape), max_size=len(shape)))
    itemsize = data.draw(st.sampled_from([1, 2, 4]))
    places = [0]
    for size, stride in zip(shape, strides):
        places = [place + i * stride for place in places for i in range(size)]
    touched = [place + byte for place in places for byte in range(itemsize)]
    assert overlaps_itself(shape, strides, itemsize) == (len(set(touched)) < len(touched))


def test_an_array_of_many_elements_over_little_memory_is_not_listed() -> None:
    assert overlaps_itself((10**6, 10**6), (4, 4), 4)
    assert overlaps_itself((10**9, 10**9), (0, 4), 4)
    assert not overlaps_itself((10**6, 10**6), (4 * 10**6, 4), 4)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_ranges_share_memory_if_a_byte_is_in_both(size: int) -> None:
    for other in range(90, 112):
        for length in (0, 1, 4):
            both = set(range(100, 100 + size)) & set(range(other, other + length))
            assert is_shared(100, size, [(other, length)]) == bool(both)
    assert not is_shared(100, size, [])
    assert is_shared(100, 4, [(0, 4), (103, 1)])
    np.testing.assert_equal(is_shared(100, 4, [(0, 4), (104, 1)]), False)
