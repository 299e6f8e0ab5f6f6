"""Ways to read rows: what becomes of rings."""

from __future__ import annotations

import gc
import weakref

import pytest

from hps_numba.storage.row_log.methods import ReadMethods
from hps_numba.storage.row_log.ring import Ring


@pytest.mark.parametrize("idle", [True, False])
def test_buffers_that_the_system_may_write_to_outlive_their_tier(idle: bool) -> None:
    reads = ReadMethods("auto", depth=2, threads=1)
    if not reads.rings:
        pytest.skip("the system allows no io_uring")
    ring = Ring(2, 4096, 512)
    reads._give_back(ring, idle)
    known = weakref.ref(ring)
    del reads, ring
    gc.collect()
    assert (known() is None) == idle
