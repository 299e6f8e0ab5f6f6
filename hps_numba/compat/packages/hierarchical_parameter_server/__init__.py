"""HugeCTR's ``hierarchical_parameter_server``: the TensorFlow front end of hps_numba."""

import _hps_numba_found  # noqa: F401

from hps_numba.frontends.tensorflow import *  # noqa: F403
from hps_numba.frontends.tensorflow import __all__  # noqa: F401
