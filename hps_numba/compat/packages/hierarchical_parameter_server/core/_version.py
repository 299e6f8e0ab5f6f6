"""HugeCTR's module of this name."""

from hps_numba.frontends.tensorflow import __version__

__all__ = ["__version__"]
