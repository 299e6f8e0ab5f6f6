"""Types and ranges of single values: pydantic finds the problems, this module says them in our words.

What is expected is read from the JSON schema at the place of the value, so a limit is written down once, in ``schema.py`` or in
the ``Options`` of a plugin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hps_numba.config.fields import REFUSED, UNION_TAGS
from hps_numba.config.messages import Location, dotted, problem, unexpected
from hps_numba.config.schema import ServerConfig, json_schema

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

__all__ = ["problems_of", "validate"]

_Schema = Mapping[str, Any]
_OUT_OF_RANGE = {"greater_than_equal", "greater_than", "less_than_equal", "less_than"}
_PLAIN_TYPES = {"boolean": "true or false", "string": "a string", "object": "an object", "null": "null"}


def validate(raw: object) -> tuple[ServerConfig | None, list[str]]:
    """The config that ``raw`` says, or None and its problems, in the order of the keys in ``schema.py``."""
    try:
        return ServerConfig.model_validate(raw), []
    except ValidationError as error:
        return None, problems_of(error, _server_schema())


def problems_of(error: ValidationError, schema: _Schema, place: Location = ()) -> list[str]:
    """A line for each problem that pydantic found.

    Args:
        schema: the JSON schema of what was validated.
        place: where in the config that is.
    """
    details = error.errors(include_url=False)
    lines = [_line(detail, schema, place) for detail in details if not _follows_from_another(detail)]
    return list(dict.fromkeys(lines))


@cache
def _server_schema() -> _Schema:
    return json_schema()


def _follows_from_another(detail: ErrorDetails) -> bool:
    """True if a list is called too short only because entries of it were refused."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _line(detail: ErrorDetails, schema: _Schema, place: Location) -> str:
    inner, node = _walk(schema, detail["loc"])
    location = (*place, *inner)
    kind, ctx, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "missing":
        expected = _expected(node, schema)
        return f"{dotted(location)}: missing{f', expected {expected}' if expected else ''}"
    if kind == REFUSED:
        return unexpected(location, value, ctx["expected"], ctx["hint"])
    if kind in _OUT_OF_RANGE and len(_limits(node)) == 2:
        return problem(location, value, f"is not in {_range(node)}")
    if kind in ("value_error", "assertion_error"):
        return problem(location, value, f"is not valid: {ctx['error']}")
    expected = _by_kind(kind, ctx) or _expected(node, schema) or _as_pydantic_says(detail)
    return unexpected(location, value, expected, _hint(value, expected))


def _hint(value: object, expected: str) -> str:
    held = isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and expected.startswith(("an object", "a list"))
    return ": write it without the quotes" if held else ""


def _by_kind(kind: str, ctx: Mapping[str, Any]) -> str:
    if kind == "too_short":
        return f"at least {ctx['min_length']} {'entry' if ctx['min_length'] == 1 else 'entries'}"
    if kind == "string_too_long":
        return f"at most {ctx['max_length']} characters"
    if kind in ("literal_error", "enum"):
        return str(ctx["expected"])
    return {"string_unicode": "valid Unicode text"}.get(kind, "")


def _as_pydantic_says(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Input should be ").rstrip(".")


def _expected(node: _Schema, schema: _Schema) -> str:
    """The values that a node of the JSON schema allows, in words; empty if it says nothing that we have words for."""
    node = _resolved(node, schema)
    if choices := node.get("anyOf", node.get("oneOf")):
        texts = [_expected(choice, schema) for choice in choices]
        return " or ".join(dict.fromkeys(texts)) if all(texts) else ""
    kind = node.get("type", "")
    if kind == "array":
        entries = _expected(node.get("items", {}), schema)
        return f"a list, each entry {entries}" if entries else "a list"
    if kind in ("integer", "number"):
        return ("an integer" if kind == "integer" else "a number") + _limits_in_words(node)
    if kind == "string" and "format" in node:
        return ""
    return _PLAIN_TYPES.get(kind, "")


def _limits(node: _Schema) -> dict[str, Any]:
    limits = {key: node[key] for key in ("minimum", "maximum") if key in node}
    if "exclusiveMinimum" in node:
        limits["minimum"] = node["exclusiveMinimum"]
    return limits


def _limits_in_words(node: _Schema) -> str:
    limits = _limits(node)
    if len(limits) == 2:
        return f" in {_range(node)}"
    if "minimum" in limits:
        return f" {'above' if 'exclusiveMinimum' in node else 'of at least'} {_short(limits['minimum'])}"
    return f" of at most {_short(limits['maximum'])}" if limits else ""


def _range(node: _Schema) -> str:
    low, high = _short(_limits(node)["minimum"]), _short(_limits(node)["maximum"])
    return f"{low}..{high}" + (f" without {low}" if "exclusiveMinimum" in node else "")


def _short(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:.8g}"


def _walk(schema: _Schema, location: Sequence[str | int]) -> tuple[list[str | int], _Schema]:
    """The keys and indices of a location that pydantic reports, and the JSON schema there; empty if that is not known.

    Where a value may have several forms, pydantic names the form too: that is no key.
    """
    keys: list[str | int] = []
    node = _resolved(schema, schema)
    for part in location:
        forms = node.get("oneOf", node.get("anyOf"))
        if forms and isinstance(part, str):
            node = _resolved(forms[UNION_TAGS[part]], schema) if part in UNION_TAGS else node
            continue
        keys.append(part)
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        node = _resolved(inner or {}, schema)
    return keys, node


def _resolved(node: _Schema, schema: _Schema) -> _Schema:
    if "$ref" not in node:
        return node
    resolved: _Schema = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return resolved
