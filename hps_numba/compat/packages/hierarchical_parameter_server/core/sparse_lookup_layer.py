"""HugeCTR's module of this name."""

from hps_numba.frontends.tensorflow import SparseLookupLayer

__all__ = ["SparseLookupLayer"]
