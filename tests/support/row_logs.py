"""Ways in which a row_log reads, as parameters: io_uring only where the system allows it, which Docker's default does not."""

from __future__ import annotations

import os

import pytest

from hps_numba.storage.row_log.ring import Ring

__all__ = ["READS", "needs_ring"]


def _why_no_ring() -> str:
    try:
        Ring(1, 4096, 4096).close()
    except OSError as problem:
        return str(problem)
    return ""


#: skipped where io_uring is refused; CI requires it, as it requires servers
needs_ring = pytest.mark.skipif(
    not os.environ.get("HPS_NUMBA_REQUIRE_SERVERS") and bool(_why_no_ring()), reason=f"needs io_uring: {_why_no_ring()}"
)
READS = ["mmap", pytest.param("io_uring", marks=needs_ring), "threads"]
