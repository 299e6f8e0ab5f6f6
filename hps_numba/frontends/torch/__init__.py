"""The Torch front end, in place of ``import hps_torch``::

    from hps_numba.frontends.torch import LookupLayer

    layer = LookupLayer("ps_config.json", "model", 0, 16)
    rows = layer(keys)

An exported program with this layer runs only in a process that has imported this package.
"""

from __future__ import annotations

import sys

from hps_numba.frontends.torch import operator
from hps_numba.frontends.torch.bag import HPSEmbeddingBag
from hps_numba.frontends.torch.checkpoints import load_checkpoint, save_checkpoint
from hps_numba.frontends.torch.collection import LookupCollection
from hps_numba.frontends.torch.convert import load_embedding, save_embedding
from hps_numba.frontends.torch.layer import Init, LookupLayer
from hps_numba.frontends.torch.optimizers import SGD, Adagrad, Adam
from hps_numba.frontends.torch.publishing import publish_rows
from hps_numba.frontends.torch.row_gradients import Rows
from hps_numba.frontends.torch.training import trained_rows
from hps_numba.server.registry import server_of

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "HPSEmbeddingBag",
    "Init",
    "LookupCollection",
    "LookupLayer",
    "Rows",
    "load_checkpoint",
    "load_embedding",
    "operator",
    "publish_rows",
    "save_checkpoint",
    "save_embedding",
    "server_of",
    "trained_rows",
]

__version__: str = sys.modules["hps_numba"].__version__
