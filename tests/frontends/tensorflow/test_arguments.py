"""Wrong arguments of layers, optimizers and functions for TensorFlow: an error of this package, when built or when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.framework_rig import DIM, Rig, rig_of
from support.zoo import Foreign, refusals

from hps_numba import ConfigError, HpsError
from hps_numba.server.registry import SERVERS

tf = pytest.importorskip("tensorflow")

from hps_numba.frontends import tensorflow as hps  # noqa: E402
from hps_numba.frontends.tensorflow.training import initializer_of  # noqa: E402


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = rig_of(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield made
    SERVERS.close()


IDS = tf.constant([0, 1], tf.int64)
TRAINED = {"train_rows": True}


def lookup(rig: Rig, **more: Any) -> Any:
    given = {"model_name": "m", "table_id": 0, "emb_vec_size": DIM, "ps_config_file": rig.path, **more}
    return hps.LookupLayer(**given)(IDS)


def collection(rig: Rig, **more: Any) -> Any:
    return hps.LookupCollection(**{"model_name": "m", "tables": {"a": (0, DIM)}, "ps_config_file": rig.path, **more})(
        {"a": IDS}
    )


def optimizer(rig: Rig, kind: Any, **more: Any) -> Any:
    layer = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path, train_rows=True)
    return kind(**{"layers": layer, **more})


CALLS: dict[str, Callable[..., Any]] = {
    "LookupLayer": lookup,
    "LookupCollection": collection,
    "SGD": lambda rig, **more: optimizer(rig, hps.SGD, **more),
    "Adagrad": lambda rig, **more: optimizer(rig, hps.Adagrad, **more),
    "Adam": lambda rig, **more: optimizer(rig, hps.Adam, **more),
    "save_checkpoint": lambda rig, **more: hps.save_checkpoint(
        **{"path": Path(rig.path).parent / "c.npz", "optimizer": optimizer(rig, hps.SGD), **more}
    ),
    "Init": lambda rig, **more: hps.Init(**{"global_batch_size": 1, "ps_config_file": rig.path, **more}),
}
CASES = [
    *(("LookupLayer", name) for name in ("model_name", "table_id", "emb_vec_size", "emb_vec_dtype", "ps_config_file")),
    *(("LookupLayer", name) for name in ("global_batch_size", "train_rows", "initializer")),
    *(("LookupCollection", name) for name in ("model_name", "tables", "emb_vec_dtype", "global_batch_size")),
    *((kind, name) for kind in ("SGD", "Adagrad", "Adam") for name in ("layers", "lr")),
    *(("Adagrad", name) for name in ("eps", "initial_accumulator_value")),
    *(("Adam", name) for name in ("beta1", "beta2", "eps")),
    *(("save_checkpoint", name) for name in ("path", "optimizer")),
    *(("Init", name) for name in ("global_batch_size", "ps_config_file", "allow_code")),
]


@pytest.mark.parametrize("name", CALLS)
def test_the_good_arguments_are_good(rig: Rig, name: str) -> None:
    CALLS[name](rig)


@pytest.mark.parametrize(("name", "parameter"), CASES, ids=[".".join(pair) for pair in CASES])
def test_a_wrong_argument_is_a_typed_error(rig: Rig, name: str, parameter: str) -> None:
    more = TRAINED if parameter == "initializer" else {}

    def call(value: Any) -> None:
        if (parameter == "initializer" and callable(value)) or (parameter == "layers" and isinstance(value, Foreign)):
            return  # what the caller's own code raises passes
        CALLS[name](rig, **{**more, parameter: value})

    errors = [error for _, error in refusals(call, paths=parameter == "path") if error is not None]
    assert len(errors) > 10 and all(10 < len(str(error)) < 2000 for error in errors)


SAVED: list[dict[Any, Any]] = [
    *({"class": "Normal", name: value} for name, value in (("bad", 1), ("std", "x"), ("std", -1), ("std", float("nan")))),
    *({"class": "Uniform", name: value} for name, value in (("seed", 1.5), ("bound", None))),
    {"class": ["Normal"]}, {"class": None}, {}, {"class": "os.system"}, {1: 2}, {"class": "Normal", 1: 2},
]  # fmt: skip


@pytest.mark.parametrize("saved", SAVED)
def test_a_damaged_initializer_of_a_saved_layer_is_refused(saved: Any) -> None:
    with pytest.raises(ConfigError, match="initializer: "):
        initializer_of(saved)


def test_damaged_configs_of_saved_layers_are_refused(rig: Rig) -> None:
    config = hps.LookupLayer("m", 0, DIM, ps_config_file=rig.path).get_config()
    for name in ("model_name", "table_id", "emb_vec_size", "global_batch_size"):
        for value in (None, [], {}, 1.5, "", -(2**70)):
            if (name == "model_name" and value == "") or (name == "table_id" and value == ""):
                continue  # a name, which the server does not have
            with pytest.raises((HpsError, TypeError), match=f"{name}: expected|has no table"):  # Keras wraps it
                hps.LookupLayer.from_config({**config, name: value})(np.arange(2))
