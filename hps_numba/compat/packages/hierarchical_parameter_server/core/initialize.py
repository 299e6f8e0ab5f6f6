"""HugeCTR's module of this name."""

from hps_numba.frontends.tensorflow import Init

__all__ = ["Init"]
