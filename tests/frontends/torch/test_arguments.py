"""Wrong arguments of layers, optimizers and functions for Torch: an error of this package, when built or when called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.framework_rig import DIM, Rig, rig_of
from support.zoo import parameters_of, refusals

import hps_numba
from hps_numba.server.registry import SERVERS

torch = pytest.importorskip("torch")

from hps_numba.frontends import torch as hps  # noqa: E402


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = rig_of(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    yield made
    SERVERS.close()


FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(hps, name) for name in hps.__all__ if name not in ("operator", "Rows", "trained_rows")
}
FREE = {("save_checkpoint", "dense")} | {(name, "process_group") for name in ("SGD", "Adagrad", "Adam")}  # Torch's
PARAMETERS = [pair for pair in parameters_of(FUNCTIONS) if pair not in FREE]
KEYS = torch.arange(3)


def good(rig: Rig, name: str) -> dict[str, Any]:
    if name in ("Init", "server_of"):
        return {"ps_config_file": rig.path}
    if name == "LookupCollection":
        return {"ps_config_file": rig.path, "model_name": "m", "tables": {"a": (0, DIM)}}
    if name in ("LookupLayer", "HPSEmbeddingBag"):
        return {"ps_config_file": rig.path, "model_name": "m", "table_id": 0, "emb_vec_size": DIM}
    layer = hps.LookupLayer(rig.path, "m", 0, DIM, trainable=True)
    optimizer = hps.SGD(layer, lr=0.1)
    if name in ("SGD", "Adagrad", "Adam"):
        return {"params": layer}
    folder = Path(rig.path).parent
    hps.save_checkpoint(folder / "c.npz", optimizer)
    hps.save_embedding(torch.ones(3, 2), folder / "e.h5", overwrite=True)
    return {
        "save_checkpoint": {"path": folder / "d.npz", "optimizer": optimizer},
        "load_checkpoint": {"path": folder / "c.npz", "optimizer": optimizer},
        "save_embedding": {"embedding": torch.ones(3, 2), "path": folder / "f.h5", "overwrite": True},
        "load_embedding": {"path": folder / "e.h5"},
        "publish_rows": {"optimizer": optimizer, "bus": {"type": "files", "folder": str(folder / "bus")}},
    }[name]


def used(name: str, answer: Any) -> None:
    """What callers do next, where faults may show."""
    if name == "LookupCollection":
        answer({"a": KEYS})
    elif name == "LookupLayer":
        answer(KEYS)
    elif name == "HPSEmbeddingBag":
        answer(KEYS[None])
    elif name in ("SGD", "Adagrad", "Adam"):
        answer.step()
    elif name == "publish_rows":
        answer.close()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_good_arguments_are_good(rig: Rig, name: str) -> None:
    used(name, FUNCTIONS[name](**good(rig, name)))


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS, ids=[".".join(pair) for pair in PARAMETERS])
def test_a_wrong_argument_is_a_typed_error(rig: Rig, name: str, parameter: str) -> None:
    given = good(rig, name)

    def call(value: Any) -> None:
        if parameter == "initializer" and callable(value):
            return  # what the caller's own code raises passes
        used(name, FUNCTIONS[name](**{**given, parameter: value}))

    errors = [error for _, error in refusals(call, paths=parameter == "path") if error is not None]
    assert errors and all(10 < len(str(error)) < 2000 for error in errors)


LAYERS: dict[str, Callable[[Rig], Any]] = {
    "LookupLayer": lambda rig: hps.LookupLayer(rig.path, "m", 0, DIM),
    "LookupCollection": lambda rig: hps.LookupCollection(rig.path, "m", {"a": (0, DIM)}),
    "HPSEmbeddingBag": lambda rig: hps.HPSEmbeddingBag(rig.path, "m", 0, DIM),
}
FORWARD = parameters_of({name: getattr(hps, name).forward for name in LAYERS})


@pytest.mark.parametrize(("name", "parameter"), FORWARD, ids=[".".join(pair) for pair in FORWARD])
def test_wrong_inputs_of_a_layer_are_typed_errors(rig: Rig, name: str, parameter: str) -> None:
    layer = LAYERS[name](rig)
    given: dict[str, Any] = {"keys": {"a": KEYS} if name == "LookupCollection" else KEYS}
    if name == "HPSEmbeddingBag":
        given = {"input": KEYS, "offsets": torch.tensor([0, 1])}
    tensors = [
        torch.ones(2),
        torch.tensor(1.5),
        torch.tensor([True]),
        torch.zeros(2, 2, 2),
        torch.empty(0, 2),
        torch.tensor(1j),
    ]

    def call(value: Any) -> None:
        layer(**{**given, parameter: value})

    errors = [error for _, error in refusals(call) if error is not None]
    for value in tensors:
        for one in [value] if name != "LookupCollection" else [value, {"a": value}]:
            try:
                call(one)
            except hps_numba.HpsError as error:
                errors.append(error)
    assert len(errors) > 10
