"""The TensorFlow front end, in place of ``import hierarchical_parameter_server as hps``::

    import hps_numba.frontends.tensorflow as hps

    hps.Init(global_batch_size=1024, ps_config_file="ps_config.json")
    rows = hps.LookupLayer("model", 0, 16)(ids)

A SavedModel with these layers runs only in a process that has imported this package.
"""

from __future__ import annotations

import sys

from hps_numba.frontends.tensorflow.export import load, split
from hps_numba.frontends.tensorflow.initialize import Init
from hps_numba.frontends.tensorflow.layers import LookupCollection, LookupLayer, SparseLookupLayer
from hps_numba.frontends.tensorflow.lookup import Table, embedding_lookup, embedding_lookup_many, embedding_lookup_sparse
from hps_numba.frontends.tensorflow.training import SGD, Adagrad, Adam, load_checkpoint, publish_rows, save_checkpoint
from hps_numba.server.registry import server_of

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Init",
    "LookupCollection",
    "LookupLayer",
    "SparseLookupLayer",
    "Table",
    "__version__",
    "embedding_lookup",
    "embedding_lookup_many",
    "embedding_lookup_sparse",
    "load",
    "load_checkpoint",
    "publish_rows",
    "save_checkpoint",
    "server_of",
    "split",
]

__version__: str = sys.modules["hps_numba"].__version__
