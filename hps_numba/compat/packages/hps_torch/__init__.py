"""HugeCTR's ``hps_torch``: the Torch front end of hps_numba, and ``torch.ops.hps_torch.hps_embedding_lookup``."""

import _hps_numba_found  # noqa: F401

from hps_numba.frontends.torch import *  # noqa: F403
from hps_numba.frontends.torch import __all__, __version__, hugectr_operator  # noqa: F401
