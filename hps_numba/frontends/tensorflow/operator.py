"""The TensorFlow operator: one call of Python, under a token that is the same in every process.

Why an op of the ``py_function`` kind: it needs no compiled library and no tie to a build of TensorFlow. Its callback is looked
up by a token; ``tf.py_function`` makes a new token each time, so that a saved graph finds nothing in another process. Ours is
fixed and registered when this module is imported: a SavedModel serves in any process that did so. The query travels as text
(``frontends/_queries.py``), an input of the op.

Eager calls skip the op: they call Python directly, which is faster, and errors keep their type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops import script_ops  # where the callbacks of py_function are kept

from hps_numba.arrays.host_outputs import wrap_output
from hps_numba.arrays.kinds import ArrayKind
from hps_numba.errors import HpsError
from hps_numba.frontends._queries import Query, answer
from hps_numba.frontends.tensorflow.on_gpu import rows_on_gpu
from hps_numba.server.registry import SERVERS

__all__ = ["INIT_TOKEN", "LOOKUP_TOKEN", "init_op", "lookup_op", "python_op"]

LOOKUP_TOKEN = "hps_numba.lookup.1"
INIT_TOKEN = "hps_numba.init.1"

_HOST = ArrayKind("tensorflow", "CPU:0")


def _lookup(request: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    return answer(bytes(request), arrays)


def _init(request: Any) -> bytes:
    values = json.loads(bytes(request))
    size, replicas = values["global_batch_size"], values["replicas"]
    SERVERS.open(values["config"], global_batch_size=size, replicas=replicas, from_model=True)
    return b"OK"


# the registry holds its functions by weak references: this keeps them alive
_CALLBACKS: dict[str, Callable[..., Any]] = {LOOKUP_TOKEN: _lookup, INIT_TOKEN: _init}


def _register() -> None:
    """
    Raises:
        HpsError: this TensorFlow keeps the callbacks of ``py_function`` in another way.
    """
    functions = getattr(getattr(script_ops, "_py_funcs", None), "_funcs", None)
    if functions is None:
        raise HpsError(f"TensorFlow {tf.__version__} keeps the callbacks of py_function elsewhere, 2.21 is known to work")
    functions.update(_CALLBACKS)


_register()


def python_op(token: str, function: Callable[..., np.ndarray]) -> Callable[[Sequence[Any], Any], Any]:
    """An op of one output that calls ``function`` with NumPy's arrays (texts as bytes), by a token as the lookup has one."""
    _CALLBACKS[token] = function
    _register()

    def call(inputs: Sequence[Any], dtype: Any) -> Any:
        if tf.executing_eagerly():
            return tf.convert_to_tensor(function(*[tensor.numpy() for tensor in inputs]), dtype)
        (answer,) = tf.raw_ops.PyFunc(input=list(inputs), token=token, Tout=[dtype])
        return answer

    return call


def lookup_op(query: Query, inputs: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
    """The answer to a query: float32 tensors of static ``shapes``, one a table; eager or in a graph.

    Args:
        inputs: tensors, as ``_queries.answer`` takes arrays.

    Raises:
        As ``_queries.answer`` in eager calls. In a graph a ``tf.errors.OpError`` with the same text: InvalidArgumentError for
        ValueErrors and TypeErrors, UnknownError for most others.
    """
    text = query.encoded
    if tf.executing_eagerly():
        on_gpu = rows_on_gpu(query, inputs)
        if on_gpu is not None:
            return on_gpu
        rows = answer(text, [np.asarray(tensor) for tensor in inputs])
        return [wrap_output(one, _HOST) for one in rows]
    # no gradient: PyFunc has none
    answers = tf.raw_ops.PyFunc(
        input=[tf.constant(text, tf.string), *inputs], token=LOOKUP_TOKEN, Tout=[tf.float32] * len(query.tables)
    )
    for tensor, shape in zip(answers, shapes, strict=True):
        tensor.set_shape(shape)
    return list(answers)


def init_op(config: Any, global_batch_size: int, replicas: int) -> Any:
    """Open the server of a config; a scalar string tensor "OK". In a graph this happens when the tensor is computed.

    Raises:
        As ``Servers.open``, when it happens.
    """
    text = json.dumps({"config": config, "global_batch_size": global_batch_size, "replicas": replicas})
    if tf.executing_eagerly():
        return tf.constant(_init(text.encode()))
    (ok,) = tf.raw_ops.PyFunc(input=[tf.constant(text, tf.string)], token=INIT_TOKEN, Tout=[tf.string])
    ok.set_shape([])
    return ok
