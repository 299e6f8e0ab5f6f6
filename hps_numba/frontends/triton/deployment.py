"""One model of a config in a process of its own, as Triton wants it: each instance of a model is a process.

When Triton loads a model, a process reads its files; when it unloads the model, the process ends. So a reload, or a new version
directory, is a new process that reads the config and the files again, and Triton lets it take over when it is ready:

* ``hash_map``: the new process has the new rows; the old one answers with the old rows until then.
* ``multi_process_hash_map``: if files have changed, their rows take the place of those in shared memory in one step.
* tiers that outlive processes: the rows of the files are written over those that are there (``initialize_after_startup``).

``freeze_sparse`` keeps a load from doing either of the last two where rows are there already, as these may be newer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from hps_numba import plugins
from hps_numba.config import ServerConfig, read_config
from hps_numba.config.messages import Location, show
from hps_numba.config.spec import TableSpec
from hps_numba.errors import UnknownModelError
from hps_numba.frontends.triton.settings import Settings
from hps_numba.server.hps import HPS
from hps_numba.storage import tiers
from hps_numba.storage.model_files import open_model

__all__ = ["config_of", "lasting_tiers", "open_server"]

log = logging.getLogger(__name__)
_SAMPLE = 1024  # keys of a file by which a table is found to be there


def config_of(settings: Settings) -> ServerConfig:
    """The config of the one model, with the timers of the settings.

    Raises:
        UnknownModelError: the config has no such model.   ConfigError: it is not valid.
    """
    config = read_config(settings.ps)
    form = config.to_dict()
    entries = [entry for entry in form["models"] if entry["model"] == settings.model]
    if not entries:
        known = ", ".join(entry["model"] for entry in form["models"])
        raise UnknownModelError(f"parameters.model: expected one of {known} (of {settings.ps}), got {show(settings.model)}")
    for key in ("refresh_interval", "refresh_delay"):
        seconds = getattr(settings, key)
        if seconds is not None:
            entries[0][key] = seconds
    return read_config({**form, "models": entries}, beside=config.source)


def open_server(settings: Settings) -> HPS:
    """A server of the one model.

    Raises:
        As ``HPS``; UnknownModelError: the config has no such model.
    """
    config = config_of(settings)
    if settings.freeze_sparse:
        places = lasting_tiers(config, allow_code=settings.allow_code)
        if not places:
            log.warning("model %s: freeze_sparse: without effect, no tier of the config outlives a process", settings.model)
        elif _are_there(config, settings):
            log.info("model %s: freeze_sparse: the rows that are there stay", settings.model)
            config = _not_loading(config, places)
    return HPS(config, allow_code=settings.allow_code)


def lasting_tiers(config: ServerConfig, *, allow_code: bool = False) -> list[Location]:
    """Places of the sections whose tiers other processes share, or whose rows outlive a process."""
    places = []
    for place, section in config.tier_sections():
        tier = plugins.load(tiers.__name__, section.type, allow_code=allow_code, folder=config.folder)
        if getattr(tier, "shared", False) or getattr(tier, "persistent", False):
            places.append(place)
    return places


def _not_loading(config: ServerConfig, places: Iterable[Location], **others: Any) -> ServerConfig:
    """The same config, but tiers at these places take no rows of files at the start; ``others`` are further keys to set."""
    form = {**config.to_dict(), **others}
    for place in places:
        section: Any = form
        for part in place:
            section = section[part]
        section["initialize_after_startup"] = False
    return read_config(form, beside=config.source)


def _are_there(config: ServerConfig, settings: Settings) -> bool:
    """Whether tiers that outlive processes have rows of every table: of one of the first keys of its file, at least."""
    places = [place for place, _ in config.tier_sections()]
    entries = [{**entry, "deployed_device_list": []} for entry in config.to_dict()["models"]]
    no_updates: dict[str, Any] = {"type": "null"}
    sources = {"update_sources": [no_updates]} if config.update_sources else {"update_source": no_updates}
    quiet = _not_loading(config, places, models=entries, cache_on_cpu=False, require_gpu=False, **sources)
    with HPS(quiet, allow_code=settings.allow_code) as server:
        return all(_has_rows(server, spec) for spec in config.tables())


def _has_rows(server: HPS, spec: TableSpec) -> bool:
    with open_model(spec.source, spec.dim) as reader:
        keys = np.empty(min(reader.rows, _SAMPLE), np.int64)
        reader.read(0, len(keys), keys, None)
    return not len(keys) or bool(server.contains(keys, spec.model, spec.name).any())
