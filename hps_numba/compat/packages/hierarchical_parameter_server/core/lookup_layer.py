"""HugeCTR's module of this name."""

from hps_numba.frontends.tensorflow import LookupLayer

__all__ = ["LookupLayer"]
