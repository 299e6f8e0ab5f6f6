"""Where ``hps-numba publish`` sends: the bus that a config reads, or one that a URL names; and the table that it is for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

import typer

from hps_numba.errors import ConfigError

if TYPE_CHECKING:
    from hps_numba.config import ServerConfig, UpdateSourceConfig

__all__ = ["Target", "target_of"]

_SCHEMES = ("files", "kafka", "redis", "rediss")


@dataclass(frozen=True)
class Target:
    """A bus.

    Attributes:
        section: of its producer.   text: names it, without passwords.   config: that reads it, or None.
    """

    section: dict[str, Any]
    text: str
    config: ServerConfig | None = None


def target_of(to: str, source: str | None, settings: Sequence[str], *, allow_code: bool) -> Target:
    """The bus of ``--to``, with the keys of ``--set``.

    Raises:
        typer.BadParameter: it is no URL of a bus, or ``source`` is none of the config.   ConfigError: the config is not valid.
    """
    more = dict(_setting(text) for text in settings)
    if "://" in to:
        if source is not None:
            raise typer.BadParameter("is an option for a config only", param_hint="--source")
        keys, text = _of_url(to)
        return Target({**keys, **more}, text)
    from hps_numba.config import read_config

    config = read_config(Path(to))
    name, section = _chosen(config, source, to)
    keys = _shared_keys(section, allow_code=allow_code)
    width = {"key_bits": 64 if config.supportlonglong else 32}
    return Target({"type": section.type, **width, **keys, **more}, f"{to}: {name}", config)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise typer.BadParameter(f"expected KEY=VALUE, got {text!r}", param_hint="--set")
    return key, _value(value)


def _value(text: str) -> Any:
    """A number, true or false if the text is one, else the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, (int, float, bool)) else text


def _of_url(url: str) -> tuple[dict[str, Any], str]:
    try:
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as problem:
        raise _no_bus(url.partition("?")[0].rpartition("@")[2], str(problem)) from None
    host = parts.netloc.rpartition("@")[2]
    text = f"{parts.scheme}://{host}{parts.path}"
    keys = _keys_of(parts, host, text)
    return {**keys, **{key: _value(value) for key, value in query}}, text


def _keys_of(parts: SplitResult, host: str, text: str) -> dict[str, Any]:
    path = unquote(parts.path)
    if parts.scheme == "files" and (host or path):
        return {"type": "files", "folder": f"{unquote(parts.netloc)}{path}"}
    if parts.scheme == "kafka" and host:
        return {"type": "kafka_message_queue", "brokers": host}
    if parts.scheme in ("redis", "rediss") and host:
        login = {"user_name": parts.username, "password": parts.password}
        given = {key: unquote(value) for key, value in login.items() if value}
        stream = {"stream": path.strip("/")} if path.strip("/") else {}
        return {"type": "redis_streams", "address": host, "enable_tls": parts.scheme == "rediss", **given, **stream}
    raise _no_bus(text, "")


def _no_bus(text: str, why: str) -> typer.BadParameter:
    expected = "a config, files://FOLDER, redis://HOST:PORT/STREAM, rediss://... or kafka://BROKERS"
    return typer.BadParameter(f"expected {expected}, got {text!r}{why and f': {why}'}", param_hint="--to")


def _chosen(config: ServerConfig, source: str | None, to: str) -> tuple[str, UpdateSourceConfig]:
    """Place and section of the source of that place, name or type; without, of the only one."""
    from hps_numba.config.messages import dotted

    sections = {dotted(place): section for place, section in config.source_sections()}
    if not sections:
        raise ConfigError(f"{to}: expected a config with an update_source, got none")
    chosen = [(name, one) for name, one in sections.items() if source in (None, name, one.name or None, one.type)]
    if len(chosen) != 1:
        known = ", ".join(f"{name} ({one.type})" for name, one in sections.items())
        raise typer.BadParameter(f"expected one of {known}, got {source!r}", param_hint="--source")
    return chosen[0]


def _shared_keys(section: UpdateSourceConfig, *, allow_code: bool) -> dict[str, Any]:
    """The keys given for the source that its producer has too, such as an address."""
    from hps_numba.updates._producer import producer_of

    kind = producer_of(section.type, allow_code=allow_code)
    given = {**{key: getattr(section, key) for key in section.model_fields_set}, **(section.model_extra or {})}
    return {one.name: given[one.name] for one in fields(kind.Options) if one.name in given}
