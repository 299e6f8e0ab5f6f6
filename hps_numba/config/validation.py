"""Types and ranges of single values: pydantic finds the problems, this module says them in our words.

What was wanted is read from the JSON schema at the place of the value, so a limit is written down once, in ``schema.py``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hps_numba.config.fields import EACH, ONE, REFUSED
from hps_numba.config.messages import Location, dotted, problem
from hps_numba.config.schema import ServerConfig, json_schema

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["validate"]

_OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}
_PLAIN_TYPES = {"boolean": "true or false", "string": "a string", "object": "an object"}


def validate(raw: object) -> tuple[ServerConfig | None, list[str]]:
    """The config that ``raw`` says, or None and its problems, in the order of the keys in ``schema.py``."""
    try:
        return ServerConfig.model_validate(raw), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, [_line(detail) for detail in details if not _follows_from_another(detail)]


def _follows_from_another(detail: ErrorDetails) -> bool:
    """True if a list is called too short only because entries of it were refused."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _line(detail: ErrorDetails) -> str:
    location = [part for part in detail["loc"] if part not in (ONE, EACH)]
    if detail["type"] == "missing":
        return f"{dotted(location)}: missing, wanted {_wanted(_node(detail['loc']))}"
    return problem(location, detail["input"], _reason(detail))


def _reason(detail: ErrorDetails) -> str:
    kind, ctx = detail["type"], detail.get("ctx", {})
    if kind == REFUSED:
        return str(ctx["wanted"])
    if kind in _OUT_OF_RANGE:
        return f"is not in {_range(_node(detail['loc']))}"
    if kind == "too_short":
        return f"has too few entries, wanted at least {ctx['min_length']}"
    if kind == "string_too_long":
        return f"is too long, wanted at most {ctx['max_length']} characters"
    if kind == "string_unicode":
        return "is not valid Unicode text"
    return f"is not {_wanted(_node(detail['loc']))}"


def _wanted(node: dict[str, Any]) -> str:
    """The values that a node of the JSON schema allows, in words."""
    node = _resolved(node)
    kind = node.get("type", "string")
    if kind == "array":
        return f"a list, each entry {_wanted(node['items'])}"
    if kind in ("integer", "number"):
        return f"{'an integer' if kind == 'integer' else 'a number'} in {_range(node)}"
    return _PLAIN_TYPES[kind]


def _range(node: dict[str, Any]) -> str:
    low = _short(node["exclusiveMinimum"] if "exclusiveMinimum" in node else node["minimum"])
    return f"{low}..{_short(node['maximum'])}" + (f" without {low}" if "exclusiveMinimum" in node else "")


def _short(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:.8g}"


def _node(location: Location) -> dict[str, Any]:
    """The part of the JSON schema that describes the value at ``location``."""
    node = _schema()
    for part in location:
        node = _resolved(node)
        if part in (ONE, EACH):
            node = node["oneOf"][(ONE, EACH).index(str(part))]
        elif isinstance(part, int):
            node = node["items"]
        else:
            node = node["properties"][part]
    return node


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in node:
        return node
    resolved: dict[str, Any] = _schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return resolved


@cache
def _schema() -> dict[str, Any]:
    return json_schema()
