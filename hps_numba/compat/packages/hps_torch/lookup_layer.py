"""HugeCTR's ``hps_torch.lookup_layer``."""

from hps_numba.frontends.torch import LookupLayer

__all__ = ["LookupLayer"]
