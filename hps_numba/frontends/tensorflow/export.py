"""Models that leave the process: loading a SavedModel, and splitting a model in two for servers without Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from hps_numba.errors import ConfigError
from hps_numba.frontends.tensorflow.keras_version import IS_KERAS_2, keras, node_inputs
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
        ConfigError: ``model`` is not a functional model, has no lookup layers, or has some inside other layers or models.
    """
    if not isinstance(model, keras.Model) or not (getattr(model, "inputs", None) and getattr(model, "outputs", None)):
        raise ConfigError(f"model: expected a functional keras.Model, got {type(model).__name__}")
    cuts = _lookup_outputs(model)
    if not cuts:
        raise ConfigError(f"model: expected lookup layers that {model.name!r} itself calls, got none")
    reached = {id(tensor) for tensor, _ in _graph(model, stops=cuts)}
    passed = [tensor for tensor in model.inputs if id(tensor) in reached]
    given = {id(tensor) for tensor in (*cuts, *passed)}
    # an output that is also an input needs a layer between
    outputs = [keras.layers.Activation("linear")(one) if id(one) in given else one for one in model.outputs]
    lookup = keras.Model(model.input, [*cuts, *passed], name=f"{model.name}_lookup")
    dense = keras.Model([*cuts, *passed], outputs, name=f"{model.name}_dense")
    if IS_KERAS_2:
        inputs = [*(_named_input(number, cut) for number, cut in enumerate(cuts)), *passed]
        dense = keras.Model(inputs, dense(inputs), name=dense.name)
    left = [layer.name for layer in dense._flatten_layers() if isinstance(layer, _LAYERS)]
    if left:
        expected = f"lookup layers that {model.name!r} itself calls"
        raise ConfigError(f"model: expected {expected}, got {', '.join(left)} inside another layer")
    return lookup, dense


def _named_input(number: int, cut: Any) -> Any:
    """An input like ``cut``. Keras 2 would name them all alike, and then cannot export the model."""
    name = f"{cut._keras_history[0].name}_{number}"
    return keras.Input(cut.shape[1:], cut.shape[0], name, cut.dtype, ragged=isinstance(cut.type_spec, tf.RaggedTensorSpec))


def _lookup_outputs(model: Any) -> list[Any]:
    """The outputs of lookups that a model uses, in the order of its layers; a layer may be called several times."""
    graph = list(_graph(model))
    nodes, used = {id(node) for _, node in graph}, {id(tensor) for tensor, _ in graph}
    return [
        tensor
        for layer in model.layers
        if isinstance(layer, _LAYERS)
        for node in layer._inbound_nodes
        if id(node) in nodes
        for tensor in tf.nest.flatten(node.output_tensors)
        if id(tensor) in used
    ]


def _graph(model: Any, stops: Sequence[Any] = ()) -> Iterator[tuple[Any, Any]]:
    """The symbolic tensors on which the outputs of a model depend, without going through ``stops``, and the node of each."""
    seen, waiting = {id(stop) for stop in stops}, list(model.outputs)
    while waiting:
        here = waiting.pop()
        if id(here) in seen:
            continue
        seen.add(id(here))
        layer, node_number, _ = here._keras_history
        node = layer._inbound_nodes[node_number]
        yield here, node
        waiting.extend(node_inputs(node))
