"""Datatypes of the Open Inference Protocol, and the tensors of a load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hps_numba.cli._request_files import InputNames, RequestTable, requests_of
from hps_numba.cli._serve_load.connection import ModelFacts, TensorFacts
from hps_numba.errors import ConfigError

__all__ = ["Shape", "datatype_of", "form_of", "load_tensors", "table_inputs"]

_TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
        "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    }.items()
}  # fmt: skip
_NAMES = {kind: name for name, kind in _TYPES.items()}
_FLAT = ("KEYS", "NUMKEYS")
_UNUSED = InputNames("", "", "")


@dataclass(frozen=True)
class Shape:
    """The inputs of a load: ``flat`` or ``named``, and the keys of a request in each table."""

    form: str
    tables: Sequence[RequestTable]


def datatype_of(array: np.ndarray) -> str:
    """The datatype of an integer array."""
    return _NAMES[array.dtype]


def table_inputs(facts: ModelFacts) -> list[str]:
    """Inputs of the metadata that are tables: all but those of the flat form, offsets and weights."""
    return [name for name in facts.inputs if name not in _FLAT and not name.endswith((".offsets", ".weights"))]


def form_of(facts: ModelFacts, wanted: str) -> str:
    """``named`` if the model has an input for a table, else ``flat``; or what is wanted.

    Raises:
        ConfigError: the model has no inputs for that.
    """
    flat = all(name in facts.inputs for name in _FLAT)
    if not (flat or table_inputs(facts)):
        raise ConfigError(f"{facts.name}: expected inputs KEYS and NUMKEYS, or one a table, got {', '.join(facts.inputs)}")
    if wanted == "auto":
        return "named" if table_inputs(facts) else "flat"
    if wanted == "flat" and not flat:
        raise ConfigError(f"--protocol: expected inputs KEYS and NUMKEYS, which {facts.name} does not have")
    if wanted == "named" and not table_inputs(facts):
        raise ConfigError(f"--protocol: expected inputs named after tables, which {facts.name} does not have")
    return wanted


def load_tensors(facts: ModelFacts, shape: Shape, count: int) -> Iterator[Mapping[str, np.ndarray]]:
    """``count`` requests in the datatypes and dimensions of the metadata.

    Raises:
        ConfigError: an input is of a datatype that holds no keys.
    """
    for request in requests_of(shape.form, shape.tables, samples=1, count=count, dense=None, names=_UNUSED):
        yield {name: _fitting(name, array, facts.inputs[name]) for name, array in request.items()}


def _fitting(name: str, array: np.ndarray, facts: TensorFacts) -> np.ndarray:
    kind: Any = _TYPES.get(facts.datatype)
    if kind is None:
        raise ConfigError(f"input {name}: expected an integer datatype, got {facts.datatype}")
    keys = array.astype(kind, copy=False)
    return keys[None] if len(facts.shape) == 2 else keys  # a model that batches
