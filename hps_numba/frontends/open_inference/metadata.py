"""What a server says of itself and its models, in the JSON of the Open Inference Protocol and of Triton's extensions of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hps_numba import __version__
from hps_numba.frontends.inference.model import InferenceModel
from hps_numba.frontends.inference.repository import IndexEntry
from hps_numba.frontends.inference.tensors import TensorSpec

__all__ = ["EXTENSIONS", "index_json", "model_config", "model_metadata", "server_metadata"]

EXTENSIONS = ("binary_tensor_data", "model_configuration", "model_repository", "parameters", "statistics")
"""Extensions of the protocol that are there, by their names."""


def server_metadata(*, shared_memory: bool = False) -> dict[str, Any]:
    """Name, version and extensions; ``shared_memory``: whether clients may have tensors there."""
    more = ["system_shared_memory"] if shared_memory else []
    return {"name": "hps_numba", "version": __version__, "extensions": [*EXTENSIONS, *more]}


def model_metadata(model: InferenceModel) -> dict[str, Any]:
    """Inputs and outputs of a model, shapes with the axis of the batch."""
    return {
        "name": model.name,
        "versions": list(model.versions()),
        "platform": model.platform,
        "inputs": [_tensor(spec) for spec in model.inputs],
        "outputs": [_tensor(spec) for spec in model.outputs],
    }


def model_config(model: InferenceModel) -> dict[str, Any]:
    """The configuration of a model as Triton tells it: shapes without the axis of the batch if ``max_batch_size`` is not 0."""
    batched = model.max_batch_size > 0
    return {
        "name": model.name,
        "platform": model.platform,
        "backend": "hps_numba",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": model.max_batch_size,
        "input": [{**_config_tensor(spec, batched), "optional": spec.optional} for spec in model.inputs],
        "output": [_config_tensor(spec, batched) for spec in model.outputs],
        "model_transaction_policy": {"decoupled": False},
    }


def index_json(entries: Iterable[IndexEntry], *, ready_only: bool = False) -> list[Mapping[str, str]]:
    """The index of a repository."""
    return [
        {"name": entry.name, "version": entry.version, "state": entry.state, "reason": entry.reason}
        for entry in entries
        if entry.state == "READY" or not ready_only
    ]


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _config_tensor(spec: TensorSpec, batched: bool) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[1:] if batched else spec.shape)}
