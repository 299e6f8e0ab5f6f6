"""The options that a storage tier or an update source declares, checked like the rest of a config.

A plugin class has ``Options``: a dataclass, a pydantic model, or a section of ``databases`` that has its keys. They are
checked when the plugin is opened, not when the config is read: until then it may not be imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from hps_numba.config.databases import PluginSection, TierConfig, UpdateSourceConfig
from hps_numba.config.messages import Location, dotted, failed
from hps_numba.config.validation import problems_of

__all__ = ["checked_options", "source_config", "tier_config"]

_LOG = logging.getLogger(__package__)
_S = TypeVar("_S", bound=PluginSection)


def checked_options(section: _S, options: type | None, place: Location, *, strict: bool = False) -> _S:
    """``section`` with its attribute ``options`` set to an instance of the class ``options``, made of the keys given in it.

    If ``options`` is itself a section of the config, such an instance is returned instead.

    Args:
        section: as the config was read.
        options: a dataclass or pydantic model, or None: the plugin has no options.
        place: location of the section, e.g. ``("tiers", 1)``.
        strict: an unknown key is an error; else it is logged as a WARNING with the nearest known name.

    Raises:
        ConfigError: an option is missing, of the wrong type or out of range; the message begins with its dotted path. Or
            ``options`` is not a class as above.
    """
    if options is not None and not isinstance(options, type):
        raise failed([_unusable(section, place, f"expected a dataclass or pydantic model, got {options!r}")])
    known = _names(options)
    problems = [f"{dotted((*place, key))}: unknown key{_hint(key, section, known)}" for key in _unread(section, options, known)]
    if problems and not strict:
        for line in problems:
            _LOG.warning("%s", line)
        problems = []
    made: Any = None
    if options is not None and isinstance(section, options):
        made = section
    elif options is not None:
        own = {key: getattr(section, key) for key in section.model_fields_set if known is None or key in known}
        try:
            made, more = _validated(options, own, place)
        except PydanticUserError as problem:
            first_line = str(problem).partition("\n")[0]
            raise failed([_unusable(section, place, f"cannot be checked: {first_line}")]) from problem
        problems += more
    if problems:
        raise failed(problems)
    if isinstance(made, PluginSection):
        return cast(_S, made)
    configured = section.model_copy()
    configured.set_options(made)
    return configured


def tier_config(keys: Mapping[str, Any]) -> TierConfig:
    """The section of a tier of one's own that holds ``keys``.

    Raises:
        ConfigError: the value of a key that every tier has is not valid.
    """
    section, problems = _validated(TierConfig, keys, ())
    if problems:
        raise failed(problems)
    return cast(TierConfig, section)


def source_config(keys: Mapping[str, Any]) -> UpdateSourceConfig:
    """The section of an update source of one's own that holds ``keys``.

    Raises:
        ConfigError: the value of a key that every source has is not valid.
    """
    section, problems = _validated(UpdateSourceConfig, keys, ())
    if problems:
        raise failed(problems)
    return cast(UpdateSourceConfig, section)


def _unread(section: PluginSection, options: type | None, known: set[str] | None) -> list[str]:
    """Given keys that have no effect; also those of the section if ``options`` replaces it and lacks them."""
    unread = section.unknown(known)
    if known is not None and options is not None and issubclass(options, PluginSection):
        fields = type(section).model_fields
        unread += [
            key
            for key in sorted((section.model_fields_set & fields.keys()) - known)
            if getattr(section, key) != fields[key].get_default(call_default_factory=True)
        ]
    return unread


def _unusable(section: PluginSection, place: Location, why: str) -> str:
    return f"{dotted((*place, 'type'))}: Options of {section.type!r}: {why}"


def _names(options: type | None) -> set[str] | None:
    """Keys that a plugin takes; None if it takes any."""
    if options is None:
        return set()
    if dataclasses.is_dataclass(options):
        return {field.name for field in dataclasses.fields(options) if field.init}
    fields: Mapping[str, Any] = getattr(options, "model_fields", {})
    if getattr(options, "model_config", {}).get("extra") == "allow" and not issubclass(options, PluginSection):
        return None
    return {field.alias or name for name, field in fields.items()}


def _hint(key: str, section: PluginSection, known: set[str] | None) -> str:
    fields = type(section).model_fields
    near = difflib.get_close_matches(key[:100], [*(known or ()), *(() if key in fields else fields)], n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _validated(options: type, given: Mapping[str, Any], place: Location) -> tuple[Any, list[str]]:
    """As JSON, where strict checks still take a string for a path or a date, and a list for a tuple."""
    adapter: TypeAdapter[Any] = TypeAdapter(options)
    try:
        return adapter.validate_json(json.dumps(given), strict=True), []
    except ValidationError as error:
        return None, problems_of(error, _schema(adapter), place)


def _schema(adapter: TypeAdapter[Any]) -> Mapping[str, Any]:
    try:
        return adapter.json_schema()
    except PydanticUserError:  # a type that JSON schema has no words for: messages are pydantic's
        return {}
