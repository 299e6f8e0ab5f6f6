"""Online updates: rows that change while the server runs, from a bus to every tier and cache.

========== ==============================================================================================
file       content
========== ==============================================================================================
_update    what travels: updates, messages in wire form, gaps
_wire      HugeCTR's wire format and its extension by headers
_source    ``UpdateSource``, the base of sources; one source a file: ``in_process``, ``files``
_producer  ``UpdateProducer``, the base of what publishes; it stands in the file of its bus
_consumer  reads a source and applies it to the tables of a server: two threads a source
_backlog   what was read and waits to be applied
_batches   from what came for a table to the last write of each key
_counts    what a consumer counts
_manifests messages that name a version of a model
_outgoing  messages that a producer fills and sends
_polled    what a consumer needs of a source
========== ==============================================================================================
"""

from hps_numba.updates._producer import Outgoing, ProducerOptions, UpdateProducer, open_producer
from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import NO_TIME, Lost, Message, Position, Update

__all__ = [
    "NO_TIME",
    "Lost",
    "Message",
    "Outgoing",
    "Position",
    "ProducerOptions",
    "Update",
    "UpdateProducer",
    "UpdateSource",
    "open_producer",
]
