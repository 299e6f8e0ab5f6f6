"""Types of rows, answers and keys: every name has a number and a size, and stored rows do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from hps_numba.kernels import dtypes


@pytest.mark.parametrize("stored", dtypes.TYPE_NUMBERS)
def test_rows_do_not_overlap_and_scales_follow_the_elements(stored):
    for dim in range(1, 600):
        stride, scale_at = dtypes.row_stride(dim, stored), dtypes.scale_offset(dim, stored)
        size = dim * dtypes.ELEMENT_BYTES[stored]
        if stored in ("int8", "float8_e4m3"):
            assert scale_at % 4 == 0 and size <= scale_at < size + 4
            size = scale_at + 4
        else:
            assert scale_at == 0
        assert size <= stride <= max(2 * size, 4)
        assert stride % 16 == 0 or stride in (4, 8)
        assert stride < size + 16


def test_every_type_has_a_number_and_a_size():
    assert sorted(dtypes.TYPE_NUMBERS.values()) == list(range(len(dtypes.TYPE_NUMBERS)))
    assert set(dtypes.ELEMENT_BYTES) == set(dtypes.TYPE_NUMBERS) >= set(dtypes.OUT_TYPES)


def test_every_key_form_has_a_number_and_a_dtype():
    assert sorted(dtypes.KEY_FORMS.values()) == list(range(len(dtypes.KEY_FORMS)))
    assert set(dtypes.KEY_FORMS) == set(dtypes.KEY_DTYPES) == set(dtypes.KEY_BYTES)
    assert all(np.dtype(dtypes.KEY_DTYPES[form]).itemsize == size for form, size in dtypes.KEY_BYTES.items())
