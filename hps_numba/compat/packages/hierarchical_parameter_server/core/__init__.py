"""HugeCTR's ``hierarchical_parameter_server.core``."""

from hierarchical_parameter_server import hps_lib
from hierarchical_parameter_server.core import _version, initialize, lookup_layer, lookup_ops, sparse_lookup_layer
from hierarchical_parameter_server.core._version import __version__
from hierarchical_parameter_server.core.initialize import Init
from hierarchical_parameter_server.core.lookup_layer import LookupLayer
from hierarchical_parameter_server.core.sparse_lookup_layer import SparseLookupLayer

__all__ = [
    "Init",
    "LookupLayer",
    "SparseLookupLayer",
    "__version__",
    "_version",
    "hps_lib",
    "initialize",
    "lookup_layer",
    "lookup_ops",
    "sparse_lookup_layer",
]
