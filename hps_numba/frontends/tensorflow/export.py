"""Models that leave the process: loading a SavedModel, and splitting a model in two for servers without Python."""

from __future__ import annotations

import os
from typing import Any

import keras
import tensorflow as tf

from hps_numba.errors import ConfigError
from hps_numba.frontends.tensorflow.layers import LookupCollection, LookupLayer, SparseLookupLayer

__all__ = ["load", "split"]

_LAYERS = (LookupLayer, SparseLookupLayer, LookupCollection)


def load(path: str | os.PathLike[str]) -> Any:
    """``tf.saved_model.load``; calling it from here makes sure that this package, which the lookups need, is imported.

    Raises:
        As ``tf.saved_model.load``.
    """
    return tf.saved_model.load(os.fspath(path))


def split(model: Any) -> tuple[Any, Any]:
    """Split a functional model after its lookup layers, for a server that cannot run Python (TF-Serving).

    Returns:
        ``(lookup, dense)``: two functional models; ``dense(lookup(inputs))`` is ``model(inputs)``. ``dense`` has no
        lookups: its inputs are the outputs of the lookup layers, and those inputs of ``model`` that it needs directly.

    Raises:
        ConfigError: ``model`` is not a functional model, or has no lookup layers.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None) or layers is None:
        raise ConfigError(f"model: expected a functional keras.Model, got {type(model).__name__}")
    cuts = [tensor for layer in layers if isinstance(layer, _LAYERS) for tensor in keras.tree.flatten(layer.output)]
    if not cuts:
        raise ConfigError(f"model: expected lookup layers in {model.name!r}, got none")
    passed = [tensor for tensor in model.inputs if _reaches(model, tensor, cuts)]
    lookup = keras.Model(model.inputs, [*cuts, *passed], name=f"{model.name}_lookup")
    dense = keras.Model([*cuts, *passed], model.outputs, name=f"{model.name}_dense")
    return lookup, dense


def _reaches(model: Any, tensor: Any, cuts: list[Any]) -> bool:
    """Whether the outputs of a model depend on ``tensor`` other than through one of ``cuts``."""
    stops, waiting, seen = {id(cut) for cut in cuts}, list(model.outputs), set()
    while waiting:
        here = waiting.pop()
        if id(here) in stops or id(here) in seen:
            continue
        seen.add(id(here))
        if here is tensor:
            return True
        operation, node_number, _ = here._keras_history
        waiting.extend(operation._inbound_nodes[node_number].input_tensors)
    return False
