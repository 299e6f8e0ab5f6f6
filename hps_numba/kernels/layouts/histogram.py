"""The words of a log-linear histogram, as kernels add to them: buckets, then the sum of all values.

``hps_numba.metrics.histogram`` explains the buckets and reads them. It stands below the kernels and has the same numbers, which
the digest of the kernels' sources does not cover: a test compares both.
"""

__all__ = ["BUCKETS", "SUM"]

BUCKETS = 169
SUM = 8 * BUCKETS
