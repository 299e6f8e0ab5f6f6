"""HugeCTR's Python objects in the spelling of the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hps_numba.config.messages import failed, problem, unexpected
from hps_numba.config.params import MAPS, InferenceParams, ParameterServerConfig, VolatileDatabaseParams
from hps_numba.config.plain import plain
from hps_numba.config.schema import ModelConfig

__all__ = ["FILE_KEYS", "json_form"]

FILE_KEYS = {
    "model_name": "model",
    "max_batchsize": "max_batch_size",
    "sparse_model_files": "sparse_files",
    "use_gpu_embedding_cache": "gpucache",
    "cache_size_percentage": "gpucacheper",
    "number_of_worker_buffers_in_pool": "num_of_worker_buffer_in_pool",
    "number_of_refresh_buffers_in_pool": "num_of_refresher_buffer_in_pool",
    "deployed_devices": "deployed_device_list",
    "i64_input_key": "supportlonglong",
    "dense_model_file": "dense_file",
    "backend": "type",
}
"""Arguments of the objects that the file calls differently."""

_KEY_WIDTH = "i64_input_key"
_DATABASES = ("volatile_db", "persistent_db", "update_source")


def json_form(source: ParameterServerConfig | Sequence[InferenceParams]) -> dict[str, Any]:
    """``source`` as the content of a file; values are not checked yet.

    Raises:
        ConfigError: models disagree on the key width or, without a ``ParameterServerConfig``, on a database; an entry of a list
            is not an ``InferenceParams``; a ``device_id`` is not deployed.
    """
    if isinstance(source, ParameterServerConfig):
        return {
            **_together(source.inference_params_array, (_KEY_WIDTH,)),
            **{name: _section(getattr(source, name)) for name in _DATABASES},
            "models": [_model(params) | _shape(source, params.model_name) for params in source.inference_params_array],
            "require_gpu": source.require_gpu,
            "cache_on_cpu": source.cache_on_cpu,
        }
    return {**_together(source, (_KEY_WIDTH, *_DATABASES)), "models": [_model(params) for params in source]}


def _together(models: Sequence[InferenceParams], shared: Sequence[str]) -> dict[str, Any]:
    """What the models say of the whole server; they have to agree on the fields named in ``shared``."""
    problems = [*_not_models(models)] or [*_disagreements(models, shared), *_undeployed(models)]
    if problems:
        raise failed(problems)
    said = {FILE_KEYS.get(name, name): _section(getattr(models[0], name)) for name in shared if models}
    return {**said, "fuse_embedding_table": any(params.fuse_embedding_table is True for params in models)}


def _not_models(models: Sequence[object]) -> Iterator[str]:
    for i, params in enumerate(models):
        if not isinstance(params, InferenceParams):
            yield unexpected(("models", i), params, "an InferenceParams")


def _disagreements(models: Sequence[InferenceParams], shared: Sequence[str]) -> Iterator[str]:
    for name in shared:
        for i, params in enumerate(models):
            if getattr(params, name) != getattr(models[0], name):
                yield problem(("models", i, name), getattr(params, name), "differs from models[0], all must agree")


def _undeployed(models: Sequence[InferenceParams]) -> Iterator[str]:
    for i, params in enumerate(models):
        devices = plain(params.deployed_devices)
        if isinstance(devices, tuple) and params.device_id not in (0, *devices):
            yield problem(("models", i, "device_id"), params.device_id, "is not in deployed_devices")


def _section(params: Any) -> Any:
    if not is_dataclass(params):
        return params
    section = {FILE_KEYS.get(field.name, field.name): getattr(params, field.name) for field in fields(params)}
    if section.get("num_node_connections") == VolatileDatabaseParams.num_node_connections:
        del section["num_node_connections"]  # the default of a file: this many, or fewer on a host with fewer partitions
    return section


def _shape(source: ParameterServerConfig, model_name: str) -> dict[str, Any]:
    return {key: getattr(source, name)[model_name] for name, key in MAPS.items()}


def _model(params: InferenceParams) -> dict[str, Any]:
    model = {key: plain(value) for key, value in _section(params).items() if key in ModelConfig.model_fields}
    if model["embedding_table_names"] == ("",):
        del model["embedding_table_names"]
    defaults, files = model["default_value_for_each_table"], model["sparse_files"]
    if isinstance(defaults, tuple) and isinstance(files, tuple) and len(defaults) == 1:
        model["default_value_for_each_table"] = defaults * len(files)
    return model
