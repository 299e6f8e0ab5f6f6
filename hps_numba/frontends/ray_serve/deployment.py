"""Servers of a config as applications of Ray Serve: how many replicas, on which nodes, and which versions of models.

Choice: an application a config, whose replicas are whole servers behind the ingress of Ray Serve (HAProxy), or one a model
(``apps``), each with the memory that its plan says, so that Ray puts large models on nodes that have room for them; the ingress
finds the application by the path of the request. Turned down: a router in Python that passes requests on to replicas of models,
which costs each request a second hop and its copy in Ray's object store.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hps_numba.config import ConfigSource, ServerConfig, read_config
from hps_numba.errors import ConfigError, ModelFileError, TierUnavailable
from hps_numba.frontends.open_inference.limits import Limits
from hps_numba.frontends.ray_serve.entrance import Entrance
from hps_numba.frontends.ray_serve.replica import Replica
from hps_numba.server.plan import make_plan

__all__ = ["ModelVersion", "app", "apps", "build", "run"]

#: what Ray Serve reads when it is imported, and nodes must be started with: HAProxy in front, requests straight to replicas
_FAST_INGRESS = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model that all replicas have to take over, one after the other.

    Attributes:
        version: its number, at least 0.   sparse_files: one a table, readable on every node.
    """

    version: int
    sparse_files: Sequence[str]


def app(
    config: ConfigSource,
    *,
    models: Sequence[str] | None = None,
    replicas: int = 1,
    max_replicas: int | None = None,
    requests_per_replica: float = 8.0,
    cpus: float = 1.0,
    gpus: float = 0.0,
    memory: int | None = None,
    max_ongoing_requests: int = 64,
    max_queued_requests: int = 1024,
    versions: Mapping[str, ModelVersion] | None = None,
    limits: Limits | None = None,
    allow_code: bool = False,
    name: str = "hps",
) -> Any:
    """An application of Ray Serve that serves a config; give it to ``ray.serve.run`` or name it in a config of Serve.

    A new version of a model reaches all replicas by a message on the bus (``hps-numba publish``), which keeps them as they are;
    or by ``versions``, with which new replicas start, or those of a config file of Serve take it over in place (``build``).

    Args:
        config: as for ``HPS``; it is read here, its sparse files on the node of each replica.
        models: names of those to serve; by default all.
        replicas: how many, or the least if ``max_replicas`` says that Ray may start more: as many as keep
            ``requests_per_replica`` requests at work or in the queue of each.
        cpus, gpus: of a replica; one that has a GPU sees it as device 0.
        memory: bytes of host memory of a replica; by default what ``plan`` says, which needs the sparse files here.
        max_ongoing_requests: of a replica at a time.   max_queued_requests: that wait for one; more get 503.
        versions: of models, by name.   limits: of a request.   allow_code: as for ``HPS``.
        name: of the deployment.

    Raises:
        ConfigError: a value is out of range, a model is unknown.   TierUnavailable: Ray Serve is not installed.
        ModelFileError: ``memory`` is not given and the sparse files are not here.
    """
    serve = _serve()
    read = _config_of(config, models)
    _check(replicas, max_replicas, cpus, gpus, memory)
    limits = limits or Limits()
    wanted = {model: asdict(version) for model, version in sorted((versions or {}).items())}
    unknown = [model for model in wanted if model not in {entry.model for entry in read.models}]
    if unknown:
        raise ConfigError(f"versions: expected models of the config, got {unknown[0]!r}")
    memory = planned_memory(read) if memory is None else memory
    how_many: dict[str, Any] = {"num_replicas": replicas}
    if max_replicas is not None:
        how_many = {
            "autoscaling_config": {
                "min_replicas": replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": requests_per_replica,
            }
        }
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=name,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus, "memory": memory},
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        user_config=wanted,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        graceful_shutdown_timeout_s=30.0,
        **how_many,
    )
    return deployment.bind(read, limits, allow_code)


def apps(config: ConfigSource, **options: Any) -> dict[str, Any]:
    """An application for each model of a config, by the prefix of its paths: ``{"/v2/models/m": application, ..., "/": ...}``.

    Each asks for the memory that its own model takes, so models spread over the nodes of a cluster; what is at ``/`` answers
    for all of them (ready, index). Run each under the name of its model, as ``run(a_model_each=True)`` does.

    Args:
        options: as for ``app``, for each of them.

    Raises:
        as ``app``.
    """
    serve = _serve()
    read = read_config(config)
    chosen = options.pop("models", None) or [entry.model for entry in read.models]
    versions = options.pop("versions", None) or {}
    found = {
        f"/v2/models/{model}": app(
            read,
            models=[model],
            name=f"hps-{model}",
            versions={name: version for name, version in versions.items() if name == model},
            **options,
        )
        for model in chosen
    }
    entrance = serve.deployment(serve.ingress()(Entrance), name="hps-entrance", ray_actor_options={"num_cpus": 0.1})
    return {**found, "/": entrance.bind({model: model for model in chosen})}


def build(args: Mapping[str, Any]) -> Any:
    """``app`` for a config file of Serve: ``import_path: hps_numba.frontends.ray_serve:build``, and the arguments as ``args``.

    Then ``user_config`` of the deployment changes versions of models in place:
    ``{"<model>": {"version": 7, "sparse_files": [...]}}``.

    Raises:
        ConfigError: an argument is missing or unknown.   Otherwise as ``app``.
    """
    known = set(inspect.signature(app).parameters)
    unknown = [name for name in args if name not in known]
    if unknown or "config" not in args:
        raise ConfigError(f"args: expected config and some of {', '.join(sorted(known))}, got {', '.join(args) or 'none'}")
    given = dict(args)
    for name, kind in (("limits", Limits), ("versions", None)):
        if isinstance(given.get(name), Mapping):
            given[name] = (
                _of(kind, given[name], name)
                if kind
                else {model: _of(ModelVersion, some, f"versions.{model}") for model, some in given[name].items()}
            )
    return app(given.pop("config"), **given)


def run(
    config: ConfigSource,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    a_model_each: bool = False,
    proxies_on: str = "HeadOnly",
    **options: Any,
) -> None:
    """Start Ray Serve, if it does not run, and serve a config on it; returns when all replicas are ready.

    The ingress is Ray's HAProxy, with requests straight to the replicas, if ``RAY_SERVE_ENABLE_HA_PROXY=1`` and
    ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` are in the environment of every node when ``ray start`` is called; for a Ray that this
    call starts they are set here. Called again, Ray starts new replicas, and stops an old one when a new one is ready: no
    request is refused meanwhile.

    Args:
        host, port: of the ingress.   a_model_each: as ``apps`` instead of ``app``.
        proxies_on: where the ingress runs: ``HeadOnly`` or ``EveryNode``.   options: as for ``app``.

    Raises:
        RuntimeError: a replica could not be made.   Otherwise as ``app``.
    """
    for variable, value in _FAST_INGRESS.items():
        os.environ.setdefault(variable, value)
    serve = _serve()
    applications = apps(config, **options) if a_model_each else {"/": app(config, **options)}
    serve.start(proxy_location=proxies_on, http_options={"host": host, "port": port})
    whole = options.get("name", "hps")
    serve.run_many(
        [
            serve.RunTarget(one, name=prefix.rpartition("/")[2] or whole, route_prefix=prefix)
            for prefix, one in applications.items()
        ]
    )


def planned_memory(config: ServerConfig) -> int:
    """Bytes of host memory that a replica takes, by its plan.

    Raises:
        ModelFileError: the sparse files are not here; it says how to go on.
    """
    try:
        plan = make_plan(config)
    except ModelFileError as problem:
        raise ModelFileError(
            f"memory: expected the sparse files here, to plan the memory of a replica, or its bytes as memory=; got {problem}"
        ) from problem
    return plan.host_bytes + plan.loading_bytes


def _serve() -> Any:
    try:
        from ray import serve
    except ImportError as problem:
        raise TierUnavailable(f"ray: expected Ray Serve (pip install hps-numba[ray]), got {problem}") from problem
    return serve


def _config_of(config: ConfigSource, models: Sequence[str] | None) -> ServerConfig:
    """The config, with those models only."""
    read = read_config(config)
    if models is None:
        return read
    known = {entry.model: entry for entry in read.models}
    unknown = [name for name in models if name not in known]
    if unknown or not models:
        raise ConfigError(f"models: expected some of {', '.join(known)}, got {', '.join(map(repr, unknown)) or 'none'}")
    if len(models) == len(known):
        return read
    return read.model_copy(update={"models": tuple(known[name] for name in models)})


def _check(replicas: int, max_replicas: int | None, cpus: float, gpus: float, memory: int | None) -> None:
    for place, value, least in (
        ("replicas", replicas, 1),
        ("max_replicas", replicas if max_replicas is None else max_replicas, replicas),
        ("cpus", cpus, 0),
        ("gpus", gpus, 0),
        ("memory", 0 if memory is None else memory, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
            raise ConfigError(f"{place}: expected at least {least}, got {value!r}")


def _of(kind: Any, given: Mapping[str, Any], place: str) -> Any:
    try:
        return kind(**given)
    except TypeError as problem:
        raise ConfigError(f"{place}: expected fields of {kind.__name__}, got {', '.join(map(str, given))}") from problem
