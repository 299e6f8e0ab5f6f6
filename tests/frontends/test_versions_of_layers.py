"""``version=`` of calls of layers: an answer of that version of the model, or VersionError; never a part of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import assert_same_bits, rows_of

from hps_numba.errors import ConfigError, VersionError

DIM, KEYS = 3, [[1, 2], [3, 1]]
Case = tuple[Callable[..., Any], Callable[[Any], np.ndarray], np.ndarray]


def config_of(workshop: Workshop) -> dict[str, Any]:
    return {"supportlonglong": True, "models": [workshop.model((range(9), DIM))]}


def replaced(server: Any, workshop: Workshop) -> None:
    """Version 7 is in force, with other rows."""
    server.replace_model("m", [workshop.table("seven", range(9), DIM, 7)], version=7)


def checked(layer: Callable[..., Any], keys: Any, expected: np.ndarray) -> None:
    assert_same_bits(np.asarray(layer(keys, version=7)), expected)
    for wrong in (1, 8):
        with pytest.raises(VersionError, match=f"expected 7, which is in force of model 'm', got {wrong}"):
            layer(keys, version=wrong)
    with pytest.raises(ConfigError, match="version: expected"):
        layer(keys, version=-1)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_layers_of_torch(workshop: Workshop) -> None:
    torch = pytest.importorskip("torch")
    from hps_numba.frontends import torch as hps

    config, keys = config_of(workshop), torch.tensor(KEYS)
    layer = hps.LookupLayer(config, "m", 0, DIM)
    bag = hps.HPSEmbeddingBag(config, "m", 0, DIM, mode="sum")
    collection = hps.LookupCollection(config, "m", {"a": (0, DIM), "b": (0, DIM)})
    assert_same_bits(layer(keys, version=1).numpy(), rows_of(KEYS, DIM))
    replaced(hps.server_of(config), workshop)
    checked(layer, keys, rows_of(KEYS, DIM, 7))
    checked(bag, keys, rows_of(KEYS, DIM, 7).sum(1))
    checked(lambda keys, version: collection({"b": keys}, version=version)["b"], keys, rows_of(KEYS, DIM, 7))
    assert_same_bits(torch.jit.script(layer)(keys).numpy(), rows_of(KEYS, DIM, 7))
    for scripted in map(torch.jit.script, (layer, bag)):
        with pytest.raises(Exception, match="version: expected None in a script"):
            scripted(keys, version=7)
    with pytest.raises(ConfigError, match="expected None in a call that is compiled or exported, got 7"):
        torch.jit.trace(lambda keys: layer(keys, version=7), (keys,))


def test_layers_of_tensorflow(workshop: Workshop) -> None:
    tf = pytest.importorskip("tensorflow")
    from hps_numba.frontends import tensorflow as hps

    config, keys = config_of(workshop), tf.constant(KEYS, tf.int64)
    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=config)
    pooled = hps.SparseLookupLayer("m", 0, DIM, ps_config_file=config)
    collection = hps.LookupCollection("m", {"a": (0, DIM)}, ps_config_file=config)
    assert_same_bits(layer(keys, version=1).numpy(), rows_of(KEYS, DIM))
    replaced(hps.server_of(config), workshop)
    checked(layer, keys, rows_of(KEYS, DIM, 7))
    ragged = tf.RaggedTensor.from_tensor(keys)
    checked(lambda ids, version: pooled(ids, combiner="sum", version=version), ragged, rows_of(KEYS, DIM, 7).sum(1))
    checked(lambda ids, version: collection({"a": ids}, version=version)["a"], keys, rows_of(KEYS, DIM, 7))
    with pytest.raises(Exception, match="version: expected None in a graph, got 7"):  # in one of TensorFlow's
        tf.function(lambda ids: layer(ids, version=7))(keys)
