"""A client of servers of the Open Inference Protocol: ``hps_numba.client.Client``. It needs NumPy alone."""

from hps_numba.client.client import Client

__all__ = ["Client"]
