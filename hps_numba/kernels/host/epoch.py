"""Single ordered steps on words that threads share: epochs, counters, the header of a table."""

from __future__ import annotations

from hps_numba.kernels.compiler.njit import host_kernel
from hps_numba.kernels.host.atomics import add_word, full_fence, load_word_acquire, store_word_release
from hps_numba.kernels.host.probe import enter_epoch, leave_epoch

__all__ = ["count", "epoch_advance", "epoch_enter", "epoch_leave", "load", "publish"]


@host_kernel
def epoch_enter(epoch, record):
    """``enter_epoch`` for a reader that outlives one kernel."""
    enter_epoch(epoch, record)


@host_kernel
def epoch_leave(record):
    """``leave_epoch`` for a reader that outlives one kernel."""
    leave_epoch(record)


@host_kernel
def epoch_advance(epoch):
    """Begin a new epoch; returns the one that ended. What was retired before is tagged with it. A full fence follows."""
    ended = add_word(epoch, 1)
    full_fence()
    return ended


@host_kernel
def count(counter, amount):
    """Add to a counter that many threads share.   **Writes:** counter."""
    add_word(counter, amount)


@host_kernel
def load(place):
    """The int64 that another thread published, with all that it wrote before."""
    return load_word_acquire(place)


@host_kernel
def publish(place, value):
    """Make an address visible to readers, after all that it points to.   **Writes:** place."""
    store_word_release(place, value)
