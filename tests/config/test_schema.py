"""The JSON schema of a config file, and that it states the limits that reading enforces (rows C06 and C07 for every key)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from support.configs import MINIMAL, TWO_MODELS, changed, refused

from hps_numba.config import json_schema, read_config
from hps_numba.errors import ConfigError

SCHEMA = json_schema()
TYPES = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list, "object": dict}
SECTIONS = {
    "": SCHEMA,
    "models.0.": SCHEMA["$defs"]["ModelConfig"],
    "volatile_db.": SCHEMA["$defs"]["VolatileDatabaseConfig"],
    "persistent_db.": SCHEMA["$defs"]["PersistentDatabaseConfig"],
    "update_source.": SCHEMA["$defs"]["UpdateSourceConfig"],
}


def conforms(value: Any, node: dict[str, Any]) -> bool:
    """A JSON schema validator of the keywords that the schema uses, and of no others."""
    unknown = node.keys() - {"$schema", "$defs", "title", "description", "default", "deprecated"} - KEYWORDS.keys()
    assert not unknown, f"the schema uses {unknown}"
    return all(check(value, node[keyword], node) for keyword, check in KEYWORDS.items() if keyword in node)


def _has_type(value: Any, kind: str, _: Any) -> bool:
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


KEYWORDS: dict[str, Any] = {
    "type": _has_type,
    "enum": lambda value, words, _: value in words,
    "pattern": lambda value, pattern, _: not isinstance(value, str) or re.search(pattern, value) is not None,
    "minimum": lambda value, limit, _: not _has_type(value, "number", _) or value >= limit,
    "maximum": lambda value, limit, _: not _has_type(value, "number", _) or value <= limit,
    "exclusiveMinimum": lambda value, limit, _: not _has_type(value, "number", _) or value > limit,
    "maxLength": lambda value, limit, _: not isinstance(value, str) or len(value) <= limit,
    "minItems": lambda value, limit, _: not isinstance(value, list) or len(value) >= limit,
    "items": lambda value, node, _: not isinstance(value, list) or all(conforms(entry, node) for entry in value),
    "required": lambda value, keys, _: not isinstance(value, dict) or all(key in value for key in keys),
    "properties": lambda value, nodes, _: (
        not isinstance(value, dict) or all(conforms(value[key], nodes[key]) for key in value if key in nodes)
    ),
    "$ref": lambda value, path, _: conforms(value, SCHEMA["$defs"][path.removeprefix("#/$defs/")]),
    "oneOf": lambda value, nodes, _: sum(conforms(value, node) for node in nodes) == 1,
    "additionalProperties": lambda value, allowed, _: allowed is True,
    "anyOf": lambda value, nodes, _: any(conforms(value, node) for node in nodes),
}


def keys() -> Iterator[tuple[str, dict[str, Any]]]:
    for prefix, section in SECTIONS.items():
        for key, node in section["properties"].items():
            yield prefix + key, node


def numbers() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of a number, lists of numbers at their first entry."""
    for path, node in keys():
        for place, inner in (
            (path, node),
            (f"{path}.0", node.get("items", {})),
            *((path, one) for one in node.get("oneOf", [])),
        ):
            if inner.get("type") in ("integer", "number"):
                yield place, inner


NUMBERS = dict(numbers())
every_number = pytest.mark.parametrize("path", NUMBERS)
# every key once in a place that exists, and no limit between keys that is reached before the limit of the key
FULL = changed(read_config(MINIMAL).to_dict(), "models.0.deployed_device_list", [0])
FULL["models"][0]["embedding_vecsize_per_table"] = [1]


def loads(config: dict[str, Any]) -> bool:
    """Strict, as the schema is; what is read with a WARNING beyond that is in test_leniency.py."""
    try:
        read_config(config, strict=True)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("config", [MINIMAL, TWO_MODELS, FULL, read_config(TWO_MODELS).to_dict()])
def test_the_samples_conform(config: dict[str, Any]) -> None:
    assert conforms(config, SCHEMA)


def test_the_schema_is_json_and_names_its_dialect() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(SCHEMA, allow_nan=False)) == SCHEMA


def test_every_key_has_a_title_and_a_description_of_one_line() -> None:
    for path, node in keys():
        assert node["title"], path
        assert 10 < len(node["description"]) < 130, path
        assert node["description"].endswith(".") or node["description"].endswith("..."), path
        assert "\n" not in node["description"], path


def test_the_default_of_every_soft_key_is_stated_and_conforms() -> None:
    by_machine = {"volatile_db.num_partitions", "persistent_db.path", "models.0.embedding_table_names"}
    for prefix, section in SECTIONS.items():
        soft = section["properties"].keys() - set(section.get("required", []))
        for key in soft:
            node = section["properties"][key]
            if not node.get("deprecated") and prefix + key not in by_machine:
                assert conforms(node["default"], {name: part for name, part in node.items() if name != "minItems"}), key


@every_number
def test_c07_every_number_has_a_minimum_and_a_maximum(path: str) -> None:
    node = NUMBERS[path]
    low = node.get("minimum", node.get("exclusiveMinimum"))
    assert math.isfinite(low)
    assert math.isfinite(node["maximum"])
    assert low < node["maximum"]


@every_number
def test_c07_reading_and_schema_agree_on_every_limit(path: str) -> None:
    node = NUMBERS[path]
    step = 1 if node["type"] == "integer" else max(1e-3, abs(node["maximum"]) * 1e-6)
    low = node["minimum"] if "minimum" in node else node["exclusiveMinimum"] + step
    for value in (
        low,
        low + step,
        node["maximum"] - step,
        node["maximum"],
        low - step,
        low - 10 * step,
        node["maximum"] + step,
    ):
        config = changed(FULL, path, value)
        assert conforms(config, SCHEMA) == loads(config), value
    assert loads(changed(FULL, path, low))
    assert not loads(changed(FULL, path, low - step))


@every_number
@pytest.mark.parametrize("wrong", [True, None, "1", [], {}, [[1]], math.nan, math.inf, -math.inf])
def test_c06_c07_no_number_takes_other_types(path: str, wrong: Any) -> None:
    message = refused(changed(FULL, path, wrong), strict=True)
    assert message.startswith(re.sub(r"\.(\d+)", r"[\1]", path))


def test_c07_no_integer_takes_a_float() -> None:
    for path, node in NUMBERS.items():
        if node["type"] == "integer":
            assert "expected an integer in" in refused(changed(FULL, path, 1.0), strict=True), path
        else:
            read_config(changed(FULL, path, 1))


@pytest.mark.parametrize("wrong", [None, 5, [], {}, [None]])
def test_c06_every_key_refuses_wrong_types(wrong: Any) -> None:
    """Reading refuses whatever the schema refuses, for every key there is, and the message begins with the key."""
    may_be_empty = {"models.0.deployed_device_list", "volatile_db.update_filters", "persistent_db.update_filters"}
    for path, node in keys():
        if node.get("deprecated") or conforms(wrong, node):
            assert wrong in (5, {}) or path in may_be_empty or node.get("deprecated"), path
            continue
        assert refused(changed(FULL, path, wrong)).startswith(path.replace(".0", "[0]")), path


def test_words_of_the_schema_are_those_that_load() -> None:
    for path, node in keys():
        words = node.get("enum") or next((choice["enum"] for choice in node.get("anyOf", []) if "enum" in choice), [])
        for word in words:
            assert loads(changed(FULL, path, word)), (path, word)
        if words:
            assert not conforms("unheard of", node)
            assert not loads(changed(FULL, path, "unheard of"))


def test_keys_that_were_never_read_are_marked_deprecated() -> None:
    deprecated = {path for path, node in keys() if node.get("deprecated")}
    assert {"models.0.dense_file", "models.0.label_dim", "models.0.device_id"} <= deprecated
