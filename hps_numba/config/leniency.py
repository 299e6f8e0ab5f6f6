"""What HugeCTR's readers took, and this schema does not: put right before the check, with one WARNING a value.

Real config files hold numbers as text, 1.0 for an integer, lists that are too long, and limits of older versions. Choice: mend
the value before the check, so that schema and messages stay strict and say what to write; ``strict=True`` skips this. Turned
down: lenient types in the schema, which would take the same text for every key and hide it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any

from hps_numba.config.databases import Section
from hps_numba.config.messages import Location, dotted, show, unexpected
from hps_numba.config.schema import ModelConfig, json_schema

__all__ = ["SectionRead", "relax"]

SectionRead = tuple[tuple[str | int, ...], dict[str, Any], type[Section]]
"""A section of a config: its location, its content and its class."""

_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?")
_BOOLEANS = {"true": True, "false": False}
_LONGEST = 100_000  # characters of a list that is written as text
_NOTHING = object()

_DEFAULTS = {"maxnum_catfeature_query_per_table_per_sample": 26, "default_value_for_each_table": 0.0}
"""Keys that a model of an older version may lack: their documented default, for each table."""

_CUT = (*_DEFAULTS, "embedding_table_names")
"""Lists of which HugeCTR reads as many entries as there are tables."""

_NEAREST = {
    "num_of_worker_buffer_in_pool",
    "num_of_refresher_buffer_in_pool",
    "maxnum_catfeature_query_per_table_per_sample",
    "thread_pool_size",
    "num_threads",
    "refresh_delay",
    "refresh_interval",
    "num_partitions",
    "metadata_refresh_interval_ms",
    "receive_buffer_size",
    "failure_backoff_ms",
}
"""Sizes and times beyond a limit that HugeCTR does not have: the nearest legal one does what it did."""

_UPPER_ONLY = {"num_partitions", "metadata_refresh_interval_ms", "receive_buffer_size"}
"""Those of ``_NEAREST`` whose lower limit is HugeCTR's too."""

_UNLIMITED = {"overflow_margin": 2**64 - 1}
"""Unsigned keys for which -1 means the largest number, as it does in C++."""


def relax(sections: Iterable[SectionRead]) -> Iterator[str]:
    """Change values that HugeCTR took to those that they mean; a line for each, which says what to write.

    Args:
        sections: plain values; their dicts are changed in place.
    """
    for location, given, section in sections:
        nodes = _nodes(section.__name__)
        for key in [key for key in given if key in nodes]:
            value, node = given[key], nodes[key]
            for mend in (_retyped, _in_range):
                mended = mend(key, value, node)
                if mended is not _NOTHING:
                    yield _line((*location, key), value, mended)
                    given[key] = value = mended
        if section is ModelConfig:
            yield from _fit_to_tables(location, given)


def _line(location: Location, value: object, mended: object) -> str:
    return unexpected(location, value, show(mended), f", read as {show(mended)}")


def _fit_to_tables(location: Location, model: dict[str, Any]) -> Iterator[str]:
    files = model.get("sparse_files")
    if not isinstance(files, tuple) or not files:
        return
    for key, default in _DEFAULTS.items():
        if key not in model:
            model[key] = (default,) * len(files)
            yield f"{dotted((*location, key))}: missing, read as {show(model[key])}"
    for key in _CUT:
        if isinstance(model.get(key), tuple) and len(model[key]) > len(files):
            cut = model[key][: len(files)]
            hint = f": expected {len(files)}, as many as sparse_files, got {len(model[key])}, read as {show(cut)}"
            yield f"{dotted((*location, key))}{hint}"
            model[key] = cut
    devices = model.get("deployed_device_list")
    if isinstance(devices, tuple) and all(type(device) is int for device in devices) and len(set(devices)) < len(devices):
        model["deployed_device_list"] = tuple(dict.fromkeys(devices))
        yield _line((*location, "deployed_device_list"), devices, model["deployed_device_list"])


# -- types ---------------------------------------------------------------------


def _retyped(key: str, value: Any, node: Mapping[str, Any]) -> Any:
    """``value`` in the type that the schema has at ``node``, if it is that value in another; else ``_NOTHING``."""
    scalars, entries = _kinds(node)
    if "string" in scalars or not (scalars or entries):
        return _NOTHING
    if isinstance(value, str) and entries and "string" not in entries:
        value = _list_of(value)
        if isinstance(value, tuple):
            mended = _entries(value, entries)
            return value if mended is _NOTHING else mended
    if isinstance(value, tuple):
        return _entries(value, entries)
    return _scalar(value, scalars)


def _entries(values: tuple[Any, ...], kinds: set[str]) -> Any:
    mended = [_scalar(value, kinds) for value in values] if kinds and "string" not in kinds else []
    if all(value is _NOTHING for value in mended):
        return _NOTHING
    return tuple(old if new is _NOTHING else new for old, new in zip(values, mended, strict=True))


def _list_of(text: str) -> Any:
    """The list of numbers or booleans that a text holds, or the text."""
    if not text.strip().startswith("[") or len(text) > _LONGEST:
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    flat = isinstance(found, list) and all(isinstance(value, (int, float, str)) for value in found)
    return tuple(found) if flat else text


def _scalar(value: Any, kinds: set[str]) -> Any:
    if isinstance(value, str):
        return _of_text(value.strip(), kinds)
    if isinstance(value, bool):
        return int(value) if kinds & {"integer", "number"} else _NOTHING
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return int(value)
    return _NOTHING


def _of_text(text: str, kinds: set[str]) -> Any:
    if "boolean" in kinds:
        return _BOOLEANS.get(text.lower(), _NOTHING)
    if not kinds & {"integer", "number"} or len(text) > 400 or not _NUMBER.fullmatch(text):
        return _NOTHING
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if "integer" in kinds:
        return int(number) if number.is_integer() else _NOTHING
    return number if math.isfinite(number) else _NOTHING


# -- ranges ---------------------------------------------------------------------


def _in_range(key: str, value: Any, node: Mapping[str, Any]) -> Any:
    if key in _UNLIMITED and type(value) is int and value == -1:
        return _UNLIMITED[key]
    if key not in _NEAREST:
        return _NOTHING
    limits = node.get("items", node)
    if not isinstance(value, tuple):
        return _nearest(key, value, limits)
    mended = [_nearest(key, entry, limits) for entry in value]
    if all(entry is _NOTHING for entry in mended):
        return _NOTHING
    return tuple(old if new is _NOTHING else new for old, new in zip(value, mended, strict=True))


def _nearest(key: str, value: Any, limits: Mapping[str, Any]) -> Any:
    if type(value) is not int and (type(value) is not float or not math.isfinite(value)):
        return _NOTHING
    if value > limits["maximum"]:
        return type(value)(limits["maximum"])
    if 0 <= value < limits["minimum"] and key not in _UPPER_ONLY:
        return type(value)(limits["minimum"])
    return _NOTHING


# -- what the schema says ---------------------------------------------------------------------


@cache
def _nodes(section: str) -> Mapping[str, Mapping[str, Any]]:
    """The JSON schema of each key of a section."""
    schema = json_schema()
    found: Mapping[str, Mapping[str, Any]] = (schema["$defs"].get(section) or schema)["properties"]
    return found


def _kinds(node: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Types that a value may have, and those that the entries of a list may have."""
    scalars: set[str] = set()
    entries: set[str] = set()
    for form in node.get("anyOf", node.get("oneOf", (node,))):
        if form.get("type") == "array":
            entries |= {form.get("items", {}).get("type", "")} - {""}
        elif "type" in form:
            scalars.add(form["type"])
    return scalars, entries
