"""The servers of this process, one for each config, shared by every layer of every framework."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from hps_numba import plugins
from hps_numba.config import ServerConfig, read_config
from hps_numba.config.arguments import as_flag
from hps_numba.config.messages import dotted
from hps_numba.errors import ClosedError, ConfigError, UnknownModelError
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.runtime.reentry import ExclusiveLock
from hps_numba.server.hps import HPS

__all__ = ["SERVERS", "Config", "Servers", "check_batch", "config_of", "server_of"]

log = logging.getLogger(__name__)

Config = str | Mapping[str, Any]
"""``ps_config_file`` of a layer: a path, the content as a dict, or an empty path: a server that is initialised already."""


def check_batch(config: ServerConfig, global_batch_size: int, replicas: int) -> None:
    """Check that every replica can take its share of the batch.

    Raises:
        ConfigError: it cannot.
    """
    if global_batch_size < 1:
        raise ConfigError(f"global_batch_size: expected at least 1, got {global_batch_size}")
    if global_batch_size % replicas:
        raise ConfigError(f"global_batch_size: expected a multiple of the {replicas} replicas, got {global_batch_size}")
    share = global_batch_size // replicas
    for number, model in enumerate(config.models):
        if share > model.max_batch_size:
            raise ConfigError(
                f"global_batch_size: {global_batch_size} is {share} for each of {replicas} replicas, but "
                f"models[{number}].max_batch_size is {model.max_batch_size}"
            )


_TIERS, _SOURCES, _POLICIES = "hps_numba.storage.tiers", "hps_numba.updates", "hps_numba.kernels.policies"


def _check_imports_nothing(config: ServerConfig) -> None:
    """Check that a config from a model file names no plugin that would have to be imported.

    Raises:
        ConfigError: it does.
    """
    named = [(_TIERS, (*place, "type"), section.type) for place, section in config.tier_sections()]
    named += [(_SOURCES, (*place, "type"), section.type) for place, section in config.source_sections()]
    for number, model in enumerate(config.models):
        policies = (model.cache_policy,) if isinstance(model.cache_policy, str) else model.cache_policy
        named += [(_POLICIES, ("models", number, "cache_policy"), policy) for policy in policies]
    for package, place, name in named:
        if why := plugins.why_not_importable(package, name):
            raise ConfigError(
                f"{dotted(place)}: {why}: if you trust it, call Init or server_of with the same config first"
                + (", and allow_code=True" if plugins.is_reference(name) else "")
            )


_LENT = "<server "  # how names of ``lend`` begin


class Servers:
    """Servers by config.

    What a config may import is decided by the call that builds its server. A later call for the same config shares the server
    and imports nothing: whoever built it allowed exactly that code. After ``close`` the next call decides anew.

    Thread safety: every method. A thread that asks for a server that another thread is building waits for it; after a failure
    the next call tries again.
    """

    def __init__(self) -> None:
        self._servers: dict[str, HPS] = {}
        self._lent: WeakValueDictionary[str, HPS] = WeakValueDictionary()
        self._numbers = count(1)
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """New locks, as a forked child needs them."""
        self._lock = threading.RLock()
        self._building: dict[str, ExclusiveLock] = {}

    def open(
        self,
        config: Config,
        *,
        global_batch_size: int = 1,
        replicas: int = 1,
        allow_code: bool = False,
        from_model: bool = False,
    ) -> HPS:
        """The server of a config; built, with every row loaded, if this process has none yet.

        Only a server that is built is checked against the batch: later calls take it as it is.

        Args:
            allow_code: as for ``HPS``.
            from_model: the config may come from a model file: it imports nothing, neither code nor installed plugins.

        Raises:
            ConfigError: the config or the batch is wrong.   Otherwise as ``HPS``.
            ReentryError: this thread is building it already.   ClosedError: the config is a name of ``lend``, and its server
                was closed.
        """
        if isinstance(config, str) and config.startswith(_LENT):
            return self._lent_by(config)
        if not config:
            raise ConfigError(
                "ps_config_file: expected a path or a dict, got an empty one, and no server was initialised before"
            )
        parsed = None
        if isinstance(config, str):
            identity = _identity_of(config)
        else:
            parsed = read_config(config)
            identity = parsed.identity
        server = self._servers.get(identity)
        if server is not None and not server.closed:
            return server
        with self._lock:
            building = self._building.setdefault(identity, ExclusiveLock(f"server of {_short(config)}"))
        with building.held():
            server = self._servers.get(identity)
            if server is not None and not server.closed:
                return server
            parsed = read_config(config) if parsed is None else parsed
            check_batch(parsed, global_batch_size, replicas)
            if from_model:
                _check_imports_nothing(parsed)
            others = len(self.opened)
            server = HPS(parsed, allow_code=allow_code and not from_model)
            self._servers[identity] = server
            log.info("%s: models %s%s", _short(config), ", ".join(server.models), f"; beside {others} others" if others else "")
            return server

    def lend(self, server: HPS) -> str:
        """A name that stands in place of a config for a server that somebody else opened, and closes.

        Whoever asks for the name gets that server, also after ``close``; a closed one gives ClosedError, and is never built.
        """
        for name, known in list(self._lent.items()):
            if known is server:
                return name
        name = f"{_LENT}{next(self._numbers)} of process {os.getpid()}>"
        self._lent[name] = server
        return name

    def _lent_by(self, name: str) -> HPS:
        server = self._lent.get(name)
        if server is None or server.closed:
            raise ClosedError(f"{name} is closed, or of another process")
        return server

    @property
    def opened(self) -> list[HPS]:
        """The servers that are open."""
        return [server for server in list(self._servers.values()) if not server.closed]

    def of_model(self, config: Config, model_name: str, *, global_batch_size: int = 1, replicas: int = 1) -> HPS:
        """The server of a layer: of its config, or for an empty one the only open server with its model.

        The layer may come from a model file, so a server that has to be built imports nothing (``from_model`` of ``open``).

        Raises:
            UnknownModelError: an empty config, and no server or more than one has the model.   Otherwise as ``open``.
        """
        if config:
            return self.open(config, global_batch_size=global_batch_size, replicas=replicas, from_model=True)
        servers = self.opened
        having = [server for server in servers if model_name in server.models]
        if len(having) == 1:
            return having[0]
        if not servers:
            return self.open(config)
        names = ", ".join(sorted({name for server in servers for name in server.models}))
        found = "several have it" if having else f"they have {names}"
        raise UnknownModelError(
            f"model_name: {model_name!r} without ps_config_file, and of {len(servers)} initialised servers {found}"
        )

    def close(self) -> None:
        """Close all servers; the next call that asks for one builds it again."""
        with self._lock:
            servers, self._servers = self._servers, {}
        for server in servers.values():
            server.close()


def _identity_of(path: str) -> str:
    try:
        return str(Path(path).resolve())
    except (OSError, ValueError, RuntimeError):  # a zero byte, a loop of links: reading it says so
        return path


def _short(config: Config) -> str:
    return config if isinstance(config, str) else "a config given as a dict"


SERVERS = Servers()
"""Those of this process."""


def config_of(ps_config_file: Any) -> Config:
    """A user's ``ps_config_file`` as a path in text or a dict.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(ps_config_file, Mapping):
        return dict(ps_config_file)
    if isinstance(ps_config_file, (str, os.PathLike)):
        try:
            return os.fsdecode(ps_config_file)
        except Exception as problem:  # whatever a foreign ``__fspath__`` raises
            raise ConfigError(f"ps_config_file: expected a path or a dict, got {type(problem).__name__}") from problem
    raise ConfigError(f"ps_config_file: expected a path or a dict, got {type(ps_config_file).__name__}")


def server_of(ps_config_file: str | os.PathLike[str] | Mapping[str, Any], *, allow_code: bool = False) -> HPS:
    """The server of a config, built if this process has none: to update rows, read ``stats()`` and so on.

    Args:
        allow_code: as for ``hps_numba.HPS``; only the call that builds the server needs it.

    Raises:
        As ``hps_numba.HPS``.
    """
    return SERVERS.open(config_of(ps_config_file), allow_code=as_flag(allow_code, "allow_code"))
