"""How the popularity of keys changes over a trace."""

from __future__ import annotations

import numpy as np

from hps_numba.simulate.dense_trace import DenseTrace

__all__ = ["popularity_over_time"]

_GROUPS = 12


def popularity_over_time(trace: DenseTrace, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Popularity of groups of keys by window, see ``Simulation``.

    Returns:
        ``heat``, float64 ``[groups, windows]``; ``group_keys``, int64 ``[groups]``; requests, int64 ``[windows]``.
    """
    shuffled = np.random.default_rng(0).permutation(trace.distinct)  # equally popular keys must not be ordered by time
    order = shuffled[np.argsort(-trace.counts[shuffled], kind="stable")]
    before = np.cumsum(trace.counts[order]) - trace.counts[order]
    groups = min(_GROUPS, trace.distinct)
    group_of = np.empty(trace.distinct, np.int64)
    group_of[order] = before * groups // max(1, len(trace))
    present, group_of = np.unique(group_of, return_inverse=True)  # one key may fill several groups
    groups, windows = len(present), -(-len(trace) // window)
    counts = np.zeros((windows, groups), np.int64)
    for at, ids in trace.pieces():
        cell = np.arange(at, at + len(ids)) // window * groups + group_of[ids]
        counts += np.bincount(cell, minlength=counts.size).reshape(counts.shape)
    shares = counts / counts.sum(1, keepdims=True)
    heat = (shares / (counts.sum(0) / len(trace))).T
    return heat, np.bincount(group_of, minlength=groups), counts.sum(1)
