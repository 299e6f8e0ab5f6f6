"""The Keras of this process: what ``tf.keras`` is: Keras 3, or with ``TF_USE_LEGACY_KERAS=1`` Keras 2 (package ``tf-keras``).

TensorFlow decides when ``tf.keras`` is first used, and keeps to it. The layers of this package are made of what it decided, not
of the package ``keras``: under ``TF_USE_LEGACY_KERAS=1`` that is another Keras, even if it was imported first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import tensorflow as tf

__all__ = ["IS_KERAS_2", "Layer", "explain_symbolic", "keras", "node_inputs", "portable_config", "sparse_if_ragged"]

_ENABLED = ("1", "true", "True")  # as TensorFlow reads it
_NEEDS_KERAS_2 = (
    "TensorFlow operations on the outputs of layers, as scripts for Keras 2 have them, need Keras 2: `pip install tf-keras`, "
    "and set TF_USE_LEGACY_KERAS=1 in the environment before TensorFlow is imported."
)
_NEEDS_DTYPE = 'Keras 3 makes inputs float32 by default: use keras.Input(shape, dtype="int64"), also to begin a Sequential.'


def _keras_of_tensorflow() -> Any:
    """``tf.keras``, loaded.

    Raises:
        ImportError: the environment asks for Keras 2, which is not installed.
    """
    try:
        loaded = tf.keras.layers
    except (ImportError, RecursionError) as problem:  # RecursionError: from the second attempt on
        asked = os.environ.get("TF_USE_LEGACY_KERAS")
        if asked not in _ENABLED:
            raise
        raise ImportError(
            f"TF_USE_LEGACY_KERAS={asked}: expected the package tf-keras (Keras 2), which is not installed: "
            "`pip install tf-keras`, or unset the variable to use Keras 3",
            name="tf_keras",
        ) from problem
    assert loaded is not None
    return tf.keras


keras = _keras_of_tensorflow()

IS_KERAS_2 = not hasattr(keras, "KerasTensor")  # in Keras 3 it is public

Layer: Any
"""The base of layers: ``tf.keras.layers.Layer``, whose symbolic outputs under Keras 3 say what scripts for Keras 2 need."""

_Base: Any = keras.layers.Layer

if IS_KERAS_2:
    Layer = _Base
else:
    _KerasTensor: Any = keras.KerasTensor

    class _Output(_KerasTensor):
        """A symbolic output; TensorFlow's operations refuse it, as they do every ``KerasTensor``."""

        def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Any:
            try:
                return super().__tf_tensor__(dtype, name)
            except ValueError as problem:
                _append(problem, _NEEDS_KERAS_2)
                raise

    def _marked(tensor: Any) -> Any:
        if type(tensor) is _KerasTensor:
            tensor.__class__ = _Output
        return tensor

    class _Keras3Layer(_Base):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._allow_non_tensor_positional_args = True  # of Keras: as Keras 2, which HugeCTR's order of arguments is for

        def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
            # not by Keras's Layer: that would take shapes from compute_output_shape, and neither check ids nor find dtypes
            try:
                return keras.tree.map_structure(_marked, super(_Base, self).compute_output_spec(*args, **kwargs))
            except TypeError as problem:
                if any(getattr(one, "dtype", "") == "float32" for one in keras.tree.flatten(args)[:1]):
                    _append(problem, _NEEDS_DTYPE)
                raise

    Layer = _Keras3Layer


def _append(problem: Exception, line: str) -> None:
    """Add a line to the text of an exception."""
    problem.args = (f"{problem}\n{line}",)


def explain_symbolic(problem: Exception, tensors: Any) -> None:
    """Add a line to the text of an exception if one of ``tensors`` is symbolic, which no lookup outside a layer can read."""
    for tensor in tensors:
        origin = type(tensor).__module__.partition(".")[0]
        if "KerasTensor" not in type(tensor).__name__ or origin not in ("keras", "tf_keras"):
            continue
        own = "tf_keras" if IS_KERAS_2 else "keras"
        if origin == own:
            line = "A KerasTensor is symbolic: in a functional model, call a layer, such as LookupLayer, instead of a function."
        elif IS_KERAS_2:
            line = (
                "This tensor is of Keras 3, the layers are of Keras 2, as TF_USE_LEGACY_KERAS=1 asks for: build the model with "
                "tf.keras instead of the package keras, or unset the variable."
            )
        else:
            line = (
                "This tensor is of Keras 2 (tf-keras), the layers are of Keras 3: set TF_USE_LEGACY_KERAS=1 in the environment "
                "before TensorFlow is imported, or build the model with tf.keras."
            )
        _append(problem, line)
        return


def sparse_if_ragged(tensor: Any) -> Any:
    """A sparse symbolic tensor of Keras 3 in place of a ragged one; anything else as it is."""
    if isinstance(tensor, keras.KerasTensor) and getattr(tensor, "ragged", False):
        return keras.KerasTensor(tensor.shape, tensor.dtype, sparse=True)
    return tensor


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a layer, saved by either Keras, for the Keras of this process."""
    own = dict(config)
    dtype = own.get("dtype")
    if isinstance(dtype, Mapping) and dtype.get("class_name") in ("DTypePolicy", "FloatDTypePolicy", "Policy", "PolicyV1"):
        own["dtype"] = dtype["config"]["name"]
    shape = own.pop("batch_input_shape", own.pop("batch_shape", None))
    if IS_KERAS_2 and shape is not None:  # Keras 3 keeps none
        own["batch_input_shape"] = shape
    return own


def node_inputs(node: Any) -> list[Any]:
    """The symbolic inputs of a node of a functional model."""
    return list(node.keras_inputs if IS_KERAS_2 else node.input_tensors)
