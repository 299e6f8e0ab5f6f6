"""``Init``: load the models before the first lookup, once for each process and config."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import tensorflow as tf

from hps_numba.config.arguments import as_count, as_flag
from hps_numba.errors import ConfigError
from hps_numba.frontends.tensorflow.operator import init_op
from hps_numba.server.registry import SERVERS, config_of

__all__ = ["Init", "replica_count"]

log = logging.getLogger(__name__)


def replica_count() -> int:
    """Replicas that share a global batch: of the active ``tf.distribute`` strategy, of Horovod if it was imported, of Open MPI.

    Raises:
        ConfigError: ``OMPI_COMM_WORLD_SIZE`` is not a number from 1 on.
    """
    if tf.distribute.has_strategy():
        return int(tf.distribute.get_strategy().num_replicas_in_sync)
    horovod = sys.modules.get("horovod.tensorflow")
    if horovod is not None:
        return int(horovod.size())
    size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"OMPI_COMM_WORLD_SIZE: expected a number from 1 on, got {size!r}")
    return int(size)


@tf.autograph.experimental.do_not_convert
def Init(**kwargs: Any) -> Any:
    """Build the server of a config and load its models; do nothing if this process already has that server.

    Under a strategy, call it inside ``strategy.scope()``; under Horovod or MPI, once per process. Layers do the same when they
    are first called with a ``ps_config_file``.

    Args:
        global_batch_size: int, the batch size of all replicas together; a multiple of their number.
        ps_config_file: path of the JSON, or its content as a dict.
        allow_code: bool, the config may name Python code to run (``path.py:NAME``, ``package.module:NAME``); not in a graph,
            which could be saved with a model.

    Other arguments are ignored, with a warning.

    Returns:
        A scalar string tensor "OK". Inside the scope of a strategy, but not in a replica: a tuple, one for each local replica.
        In a graph (``tf.function``, ``tf.compat.v1``) the server is built when the tensor is computed.

    Raises:
        KeyError: one of the two arguments is missing.
        ConfigError: the config is wrong, or ``global_batch_size`` does not fit it and the number of replicas.
        Otherwise as ``hps_numba.HPS``. A failed call may be repeated.
    """
    for name in ("global_batch_size", "ps_config_file"):
        if name not in kwargs:
            raise KeyError(f"{name}: missing, expected Init(global_batch_size=..., ps_config_file=...)")
    batch, config = kwargs.pop("global_batch_size"), kwargs.pop("ps_config_file")
    allow_code = kwargs.pop("allow_code", False)
    if kwargs:
        log.warning("Init: ignored %s", ", ".join(kwargs))
    batch, allow_code = as_count(batch, "global_batch_size"), as_flag(allow_code, "allow_code")
    config = config_of(config)
    if tf.executing_eagerly():
        SERVERS.open(config, global_batch_size=batch, replicas=replica_count(), allow_code=allow_code)
    elif allow_code:
        raise ConfigError("allow_code: expected a call of Init outside of a graph, got one inside")
    ok = init_op(config, batch, replica_count())
    if tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context():
        return (ok,) * len(tf.distribute.get_strategy().extended.worker_devices)
    return ok
