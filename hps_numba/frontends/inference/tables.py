"""The tables of one model of a server as an inference model, asked in one of two ways.

*Flat*, as HugeCTR's Triton backend (spec 4.3): ``KEYS`` INT64 has the keys of table 0, then those of table 1, ...; ``NUMKEYS``
INT32 says how many of each; ``OUTPUT0`` FP32 is all rows, one after the other.

*Named*: an input with the name of each table that is wanted, of any shape ``S``, gives an output of the same name,
``S + [dim]``; with offsets beside (``<table>.offsets``, ``[bags + 1]``), and perhaps weights (``<table>.weights``), one pooled
row for each bag.

All tables of a request are answered from one version of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hps_numba.arrays.bags import COMBINERS
from hps_numba.arrays.buffer_pool import reused_empty
from hps_numba.config.spec import TableSpec
from hps_numba.errors import VersionError
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.problems import InferenceError
from hps_numba.frontends.inference.tensors import DATATYPES, InferenceRequest, InferenceResponse, TensorSpec
from hps_numba.server.hps import HPS

__all__ = ["TableSetModel"]

KEYS, NUMKEYS, FLAT = "KEYS", "NUMKEYS", "OUTPUT0"
OFFSETS, WEIGHTS = ".offsets", ".weights"  # behind the name of a table
_OUTPUT_TYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype(np.float32), "FP16": np.dtype(np.float16)}
_SMALL_KEYS = 16_384  # a lookup of so many in host memory takes well under a millisecond


class TableSetModel(InferenceModel):
    """The tables of a model of a server.

    Args:
        server: which answers.   name: of one of its models; clients call it the same.

    Raises:
        UnknownModelError: no such model.   ClosedError: the server was closed.
    """

    platform = "hps_numba_tables"

    def __init__(self, server: HPS, name: str) -> None:
        self.name = name
        self._server = server
        self._tables = server.direct.tables(name)
        self._by_name = {spec.name: spec for spec in self._tables}
        self._widest = max(spec.dim for spec in self._tables)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of both ways to ask, all optional."""
        flat = TensorSpec(KEYS, "INT64", (-1,), True), TensorSpec(NUMKEYS, "INT32", (-1,), True)
        named = []
        for spec in self._tables:
            named.append(TensorSpec(spec.name, "INT64", (-1,), True))
            named.append(TensorSpec(spec.name + OFFSETS, "INT64", (-1,), True))
            named.append(TensorSpec(spec.name + WEIGHTS, "FP32", (-1,), True))
        return (*flat, *named)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Of both ways to ask."""
        named = (TensorSpec(spec.name, "FP32", (-1, spec.dim)) for spec in self._tables)
        return (TensorSpec(FLAT, "FP32", (-1,)), *named)

    def versions(self) -> tuple[str, ...]:
        """The version in force."""
        return (str(self._server.model_version(self.name)),)

    def may_wait(self, request: InferenceRequest) -> bool:
        """Large batches, and tables whose rows may be in slower tiers."""
        return request.items > _SMALL_KEYS or self._server.direct.has_slower_tiers(self.name)

    def infer(self, request: InferenceRequest) -> InferenceResponse:
        """See the module.

        Raises:
            InferenceError: inputs that are no tables, or that do not go together.   VersionError: another version is in force.
            Otherwise as ``HPS.lookup`` and ``HPS.lookup_pooled``.
        """
        number = _version_of(request.version)
        is_flat = KEYS in request.inputs and NUMKEYS in request.inputs
        answer = self._flat if is_flat else self._named
        (outputs, parameters), version = self._server.direct.read_one_version(self.name, lambda: answer(request))
        if number not in (None, version):
            raise VersionError(f"version: expected {version}, which model {self.name!r} has, got {number}")
        if request.outputs:
            outputs = self._chosen(outputs, request.outputs)
        return InferenceResponse(self.name, str(version), outputs, request.id, parameters)

    # -- flat ---------------------------------------------------------------------

    def _flat(self, request: InferenceRequest) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
        keys, counts = request.inputs[KEYS], request.inputs[NUMKEYS]
        others = [name for name in request.inputs if name not in (KEYS, NUMKEYS)]
        if others:
            raise InferenceError(400, f"inputs: expected {KEYS} and {NUMKEYS} alone, got {', '.join(others)[:200]} too")
        _check_integers(keys, KEYS)
        _check_integers(counts, NUMKEYS)
        if keys.ndim > 2 or (keys.ndim == 2 and len(keys) != 1):
            raise InferenceError(400, f"{KEYS}: expected shape [n] or [1, n], got {list(keys.shape)}")
        per_table = counts.reshape(-1).tolist()
        if len(per_table) != len(self._tables) or counts.ndim > 2:
            raise InferenceError(
                400, f"{NUMKEYS}: expected {len(self._tables)} counts, one for each table, got shape {list(counts.shape)}"
            )
        if min(per_table) < 0 or sum(per_table) != keys.size:
            raise InferenceError(
                400, f"{NUMKEYS}: expected counts whose sum is {keys.size}, the size of {KEYS}, got {per_table}"
            )
        all_keys = keys.reshape(-1)
        out = reused_empty((sum(n * spec.dim for n, spec in zip(per_table, self._tables)),))
        key = at = 0
        for n, spec in zip(per_table, self._tables):
            if n:
                rows = out[at : at + n * spec.dim].reshape(n, spec.dim)
                self._server.direct.lookup_into(all_keys[key : key + n], self.name, spec.table_id, rows)
            key, at = key + n, at + n * spec.dim
        flat = out if keys.ndim == 1 else out.reshape(1, -1)
        return {FLAT: flat}, {"NumSample": keys.size, "DeviceID": -1}

    # -- named ---------------------------------------------------------------------

    def _named(self, request: InferenceRequest) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
        if not request.inputs:
            raise InferenceError(400, f"inputs: expected {KEYS} and {NUMKEYS}, or tables of {self._known()}, got none")
        wanted = {name: self._by_name[name] for name in request.inputs if name in self._by_name}
        for name in request.inputs:
            if name not in wanted and name.removesuffix(OFFSETS).removesuffix(WEIGHTS) not in wanted:
                raise InferenceError(400, f"inputs: expected tables of {self._known()}, got {name[:100]!r}")
        type_ = _output_type(request.parameters.get("output_dtype", "FP32"))
        return {name: self._rows(request, spec).astype(type_, copy=False) for name, spec in wanted.items()}, {}

    def _rows(self, request: InferenceRequest, spec: TableSpec) -> np.ndarray:
        keys = request.inputs[spec.name]
        offsets, weights = request.inputs.get(spec.name + OFFSETS), request.inputs.get(spec.name + WEIGHTS)
        own = request.input_parameters.get(spec.name, {})
        mode = own.get("mode", request.parameters.get("mode"))
        _check_integers(keys, spec.name)
        if offsets is None:
            if weights is not None or own.get("mode") is not None:
                raise InferenceError(400, f"{spec.name}{OFFSETS}: expected offsets with weights or mode, got none")
            rows = reused_empty((*keys.shape, spec.dim))
            self._server.direct.lookup_into(keys, self.name, spec.table_id, rows)
            return rows
        _check_integers(offsets, spec.name + OFFSETS)
        if mode is not None and mode not in tuple(COMBINERS):
            raise InferenceError(400, f"mode: expected one of {', '.join(COMBINERS)}, got {str(mode)[:40]!r}")
        pooled: np.ndarray = self._server.lookup_pooled(
            keys, offsets, self.name, spec.table_id, None, weights=weights, combiner=mode or "sum"
        )
        return pooled

    def _chosen(self, outputs: Mapping[str, np.ndarray], wanted: tuple[str, ...]) -> Mapping[str, np.ndarray]:
        """Those that are wanted; others of the model that this request does not ask for are left out.

        Perf Analyzer and others name every output of the metadata, whichever inputs they send.
        """
        chosen = {name: outputs[name] for name in wanted if name in outputs}
        strangers = [name for name in wanted if name != FLAT and name not in self._by_name]
        if strangers or not chosen:
            raise InferenceError(
                400, f"outputs: expected some of {', '.join(outputs)[:500]}, got {(strangers or wanted)[0][:100]!r}"
            )
        return chosen

    def _known(self) -> str:
        names = ", ".join(self._by_name)
        return names if len(names) <= 500 else f"{names[:500]}, ..."

    def output_bytes(self, request: InferenceRequest) -> int:
        """Bytes of the rows of an answer, by the shapes of the inputs alone, to refuse what is too large before it is made."""
        total = 0
        for name, array in request.inputs.items():
            if name == KEYS:
                total += array.size * self._widest
            elif (spec := self._by_name.get(name)) is not None:
                offsets = request.inputs.get(name + OFFSETS)
                total += (array.size if offsets is None else max(math.prod(offsets.shape), 1)) * spec.dim
        return total * DATATYPES["FP32"].itemsize


def _version_of(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise VersionError(f"version: expected the number of a version, got {text[:40]!r}")
    return int(text)


def _check_integers(array: np.ndarray, name: str) -> None:
    if array.dtype.kind not in "iu":
        raise InferenceError(400, f"{name}: expected integers, got {array.dtype}")


def _output_type(name: Any) -> np.dtype[Any]:
    found = _OUTPUT_TYPES.get(name) if isinstance(name, str) else None
    if found is None:
        raise InferenceError(400, f"output_dtype: expected one of {', '.join(_OUTPUT_TYPES)}, got {str(name)[:40]!r}")
    return found
