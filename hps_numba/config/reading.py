"""From whatever a caller has to a checked :class:`ServerConfig`: one way for files, dicts and objects.

Problem: HugeCTR HPS ignores unknown keys, turns unknown words into defaults and checks hardly any number, so that a typo
shows as a slow or wrong server. Choice: read once, collect every problem, and report them together, each with the dotted path
of its value; log what was absent (INFO) and what will not do what its author expects (WARNING). Turned down: rejecting unknown
keys by default, because files written for HugeCTR carry many.
"""

from __future__ import annotations

import difflib
import logging
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hps_numba.config.arguments import as_flag, as_optional, as_path
from hps_numba.config.cross_checks import completed, contradictions, warnings
from hps_numba.config.databases import (
    PersistentDatabaseConfig,
    PluginSection,
    Section,
    UpdateSourceConfig,
    VolatileDatabaseConfig,
    tier_class,
)
from hps_numba.config.json_text import parse
from hps_numba.config.leniency import SectionRead, relax
from hps_numba.config.messages import Location, dotted, failed, show, unexpected
from hps_numba.config.objects import FILE_KEYS, json_form
from hps_numba.config.params import InferenceParams, ParameterServerConfig
from hps_numba.config.plain import plain
from hps_numba.config.schema import ModelConfig, ServerConfig
from hps_numba.config.validation import validate
from hps_numba.errors import ConfigError
from hps_numba.runtime import hugectr_log

__all__ = ["ConfigSource", "read_config"]

ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | ParameterServerConfig | Sequence[InferenceParams] | ServerConfig
"""What :func:`read_config` reads."""

_LOG = logging.getLogger(__package__)
_LARGEST = 64 << 20  # bytes of a file: far more than any config has
_SECTIONS: dict[str, type[Section]] = {
    "volatile_db": VolatileDatabaseConfig,
    "persistent_db": PersistentDatabaseConfig,
    "update_source": UpdateSourceConfig,
}
_RENAMED = {"cpu_memory_db": "volatile_db of type hash_map", "distributed_db": "volatile_db of type redis_cluster"}
"""Sections of old versions, with what they became."""


def read_config(source: ConfigSource, *, strict: bool = False, beside: Path | None = None) -> ServerConfig:
    """Read and check a config; a file may have ``//`` and ``/* */`` comments.

    Every absent key is logged at INFO with its default. An unknown key is logged as a WARNING with the nearest known name. Keys
    of a tier or update source that HugeCTR does not have may be options of its own: they are checked when it is opened.

    Args:
        source: path of a JSON file, a mapping in the spelling of the file, a :class:`ParameterServerConfig`, a list of
            :class:`InferenceParams`, or a :class:`ServerConfig`, which is returned as it is.
        strict: an unknown key is an error, and so is a value that is only read with a WARNING: a number or boolean as text, a
            list that is longer than the tables, a key given twice (docs/config.md lists them).
        beside: for a source without a file, the file in whose folder relative ``sparse_files`` are looked up too.

    Raises:
        ConfigError: the file is missing or not JSON, or a value is missing, of the wrong type, out of range or contradicts
            another. The message begins with the dotted path of the first problem; attribute ``problems`` holds all.
    """
    strict, beside = as_flag(strict, "strict"), as_optional(beside, as_path, "beside")
    hugectr_log.install()
    if isinstance(source, ServerConfig):
        return source
    raw, path = _raw(source, strict)
    server = _checked(raw, path, strict)
    _report(raw, server, path)
    server._source = path or beside
    server._strict = strict
    if path is not None:
        server._identity = str(path.resolve())
    return server


def _raw(source: Any, strict: bool) -> tuple[Any, Path | None]:
    """The content of ``source`` as plain values, and the absolute path of the file it came from."""
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
        raise failed(["config: expected a path or a dict, got JSON text: give json.loads(text) instead of the text"])
    if isinstance(source, (str, os.PathLike)):
        path = _path(source)
        return plain(parse(_content(path), _place(path), strict=strict)), path.absolute()
    if isinstance(source, (ParameterServerConfig, list, tuple)):
        return plain(json_form(source)), None
    if isinstance(source, Mapping):
        return plain(source), None
    expected = "a path, a mapping, a ParameterServerConfig, a list of InferenceParams or a ServerConfig"
    raise failed([unexpected((), source, expected)])


def _path(source: str | os.PathLike[str]) -> Path:
    try:
        return Path(os.fsdecode(source))
    except Exception as problem:  # whatever a foreign ``__fspath__`` raises
        raise failed([f"config: expected a path, got one that raises {type(problem).__name__}"]) from problem


def _content(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        # the name of a shell's pipe leads to no file; a named one may wait for a writer for ever
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (stat.S_ISFIFO(mode) and not path.resolve().exists())):
            raise failed([f"{_place(path)}: not a regular file, expected a JSON file"])
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise failed([f"{_place(path)}: {reason}, expected a JSON file"]) from error
    if len(data) > _LARGEST:
        raise failed([f"{_place(path)}: expected a JSON file of at most {_LARGEST >> 20} MiB, got more"])
    return data


def _place(path: Path) -> str:
    return str(path) if str(path).isprintable() and len(str(path)) < 300 else show(str(path))


def _checked(raw: Any, path: Path | None, strict: bool) -> ServerConfig:
    unknown = [*_drop_unknown_keys(raw)]
    if not strict:
        for line in relax(_sections(raw)):
            _LOG.warning("%s", line)
    server, problems = validate(raw)
    if server is not None:
        problems += contradictions(server)
    if strict:
        problems += unknown
    else:
        for line in unknown:
            _LOG.warning("%s", line)
    if server is None or problems:
        raise failed(problems, place=_place(path) if path else "")
    for line in warnings(server):
        _LOG.warning("%s", line)
    return completed(server)


def _sections(raw: Any) -> Iterator[SectionRead]:
    """Every object in ``raw`` that has keys of its own, with its location and the class that says which."""
    if not isinstance(raw, dict):
        return
    yield (), raw, ServerConfig
    models = raw.get("models")
    for i, model in enumerate(models if isinstance(models, tuple) else ()):
        if isinstance(model, dict):
            yield ("models", i), model, ModelConfig
    for key, section in _SECTIONS.items():
        if isinstance(raw.get(key), dict):
            yield (key,), raw[key], section
    tiers = raw.get("tiers")
    for i, tier in enumerate(tiers if isinstance(tiers, tuple) else ()):
        if isinstance(tier, dict):
            yield ("tiers", i), tier, tier_class(tier)
    sources = raw.get("update_sources")
    for i, source in enumerate(sources if isinstance(sources, tuple) else ()):
        if isinstance(source, dict):
            yield ("update_sources", i), source, UpdateSourceConfig


def _drop_unknown_keys(raw: Any) -> Iterator[str]:
    """Remove the keys that nobody reads; a line for each."""
    for location, given, section in _sections(raw):
        if issubclass(section, PluginSection) and section.leaves_keys_to_plugin(given.get("type")):
            continue
        for key in [key for key in given if key not in section.model_fields and key not in section.unread]:
            del given[key]
            yield f"{dotted((*location, key))}: unknown key{_hint(key, section)}"


def _hint(key: str, section: type[Section]) -> str:
    if section is ServerConfig and key in _RENAMED:
        return f", it became {_RENAMED[key]}"
    if FILE_KEYS.get(key) in section.model_fields:
        return f", in a file it is called {FILE_KEYS[key]!r}"
    places: dict[str, type[Section]] = {"models[i]": ModelConfig, "the top level": ServerConfig, **_SECTIONS}
    for where, other in places.items():
        if key in other.model_fields and key not in section.model_fields:
            return f", it belongs to {where}"
    near = difflib.get_close_matches(key[:100], section.model_fields, n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _report(raw: Any, server: ServerConfig, path: Path | None) -> None:
    """INFO lines: what was read, every absent key, and every key that HugeCTR documented but never read."""
    if not _LOG.isEnabledFor(logging.INFO):
        return
    names = ", ".join(model.model for model in server.models)
    _LOG.info("reading %s: models %s", _place(path) if path else "a config without a file", names)
    for location, given, section in _sections(raw):
        final = _at(server, location)
        for key in section.model_fields:
            if key not in given and not _is_other_form(key, raw):
                _LOG.info("%s: absent, using %s", dotted((*location, key)), _default(getattr(final, key)))
        for key in section.unread:
            if key in given:
                _LOG.info("%s: accepted, but without effect: HugeCTR never read it", dotted((*location, key)))


def _is_other_form(key: str, raw: dict[str, Any]) -> bool:
    """Whether a section that has two forms is given, or absent, in the other one."""
    if key in ("tiers", "update_sources"):
        return True
    return ("tiers" in raw and key in ("volatile_db", "persistent_db")) or ("update_sources" in raw and key == "update_source")


def _at(server: ServerConfig, location: Location) -> Any:
    value: Any = server
    for part in location:
        value = value[part] if isinstance(part, int) else getattr(value, part)
    return value


def _default(value: Any) -> str:
    if isinstance(value, PluginSection):
        return f"type {value.type!r} with its defaults"
    return show(value)
