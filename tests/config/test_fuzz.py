"""Ten thousand damaged configs: each one loads, or is refused with a readable ConfigError (promise 2; rows C05 to C09)."""

from __future__ import annotations

import copy
import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.configs import MINIMAL, TWO_MODELS

from hps_numba.config import ServerConfig, read_config
from hps_numba.errors import ConfigError

DICTS, FILES = 8000, 2000
BATCHES = 8

WITH_EVERYTHING = read_config(
    {
        **TWO_MODELS,
        "models": [{**model, "cache_policy": ["lru"] * len(model["sparse_files"])} for model in TWO_MODELS["models"]],
        "volatile_db": {"type": "redis", "num_partitions": 8, "update_filters": ["^demo", ".+"]},
    }
).to_dict()
SAMPLES = (MINIMAL, TWO_MODELS, WITH_EVERYTHING)

Slot = tuple[Any, Any]
"""A container and the key or index of one value in it."""


def slots(value: Any) -> Iterator[Slot]:
    """Every place in a config that holds a value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from slots(entry)


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"deep": value}
    return value


NUMBERS = (0, 1, -1, 2, 16, 64, 2**31, 2**63, 2**64, -(2**63), 10**30, 2**5000, 0.0, -0.0, 0.5, 1.0, 1.5, -1e-300, 1e300)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
WORDS = ("lru", "static", "rocks_db", "redis", "none", "null", "kafka_mq", "evict", "a.b:C", "p.py:C", ":", "127.0.0.1:99999")
TEXTS = ("", " ", "x" * 5000, "ключ", "\U0001f600", "a\0b", "line\nbreak", "\ud800", "../..", "[", "(?P<", "{}", "%s %d {0}")
LISTS = ([], [[]], [None], [1], [0, 0], ["a", "a"], [1.5], [{}] * 3, ["y"] * 2000, (), (1, 2))
OTHERS = (None, True, False, {}, {"type": 3}, {"": ""}, b"raw", {1}, object(), 1j, nested(3), nested(40), nested(3000))
VALUES: tuple[Any, ...] = (*NUMBERS, *NOT_FINITE, *WORDS, *TEXTS, *LISTS, *OTHERS)
NAMES = (
    "",
    "peristent_db",
    "models",
    "gpucachper",
    "TYPE",
    "dense_file",
    "ключ",
    "a.b",
    "k" * 300,
    "\n",
    "\ud800",
    7,
    None,
    (1,),
)
TOKENS = (b'"', b"//", b"/*", b"{", b"]", b",", b"9")


def drop(rng: random.Random, container: Any, key: Any) -> None:
    del container[key]


def retype(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = rng.choice(VALUES)


def rename(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        value = container.pop(key)
        garbled = key[: len(key) // 2] + key[len(key) // 2 + 1 :] if isinstance(key, str) else "x"
        container[rng.choice((*NAMES, garbled))] = value


def scale(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container[key], (int, float)):
        container[key] *= rng.choice((-1, 0, 10, 2**40))


def repeat(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), container[key])


def wrap(rng: random.Random, container: Any, key: Any) -> None:
    container[key] = rng.choice((lambda v: [v], lambda v: {"value": v}, str, lambda v: (v, v)))(container[key])


def extend(rng: random.Random, container: Any, key: Any) -> None:
    if isinstance(container, dict):
        container[rng.choice(NAMES)] = rng.choice(VALUES)


MUTATIONS: tuple[Callable[[random.Random, Any, Any], None], ...] = (drop, retype, rename, scale, repeat, wrap, extend)


def damaged_dict(rng: random.Random) -> Any:
    config = copy.deepcopy(rng.choice(SAMPLES))
    places = list(slots(config))
    for container, key in rng.sample(places, rng.choice((1, 1, 1, 2, 5))):
        if key in container if isinstance(container, dict) else key < len(container):
            rng.choice(MUTATIONS)(rng, container, key)
    return config


def damaged_bytes(rng: random.Random) -> bytes:
    data = bytearray(json.dumps(rng.choice(SAMPLES), indent=rng.choice((None, 1))).encode())
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(data))
        end = min(len(data), start + rng.choice((0, 1, 1, 2, 30)))
        data[start:end] = rng.choice((b"", rng.randbytes(1), rng.randbytes(4), rng.choice(TOKENS)))
    return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))])


def loads(source: Any, *, strict: bool) -> bool:
    """True if ``source`` loads into a config that round-trips; False if it is refused as it should be."""
    try:
        config = read_config(source, strict=strict)
    except ConfigError as error:
        check_message(error)
        return False
    assert isinstance(config, ServerConfig)
    assert read_config(config.to_dict(), strict=True) == config
    assert all(len(model.tables()) == len(model.sparse_files) for model in config.models)
    return True


def check_message(error: ConfigError) -> None:
    lines = str(error).splitlines()
    assert 1 <= len(lines) <= 13
    assert error.problems
    for line in (*lines, *error.problems):
        assert 5 < len(line) < 1500, line
        assert line.isprintable(), line
        assert "pydantic" not in line.lower(), line
        assert "validation" not in line.lower(), line
        assert "type=" not in line, line
    assert error.__cause__ is None or isinstance(error.__cause__, OSError)


@pytest.fixture(autouse=True)
def _silent() -> Iterator[None]:
    """No log lines of ten thousand configs in the report; they are still put together."""
    log = logging.getLogger("hps_numba.config")
    level, propagate, handler = log.level, log.propagate, Formatting()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    yield
    log.removeHandler(handler)
    log.propagate = propagate
    log.setLevel(level)


class Formatting(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        assert record.getMessage().isprintable()


@pytest.mark.parametrize("batch", range(BATCHES))
def test_c05_c09_a_damaged_dict_loads_or_is_refused(batch: int) -> None:
    rng = random.Random(batch)
    found = [loads(damaged_dict(rng), strict=rng.random() < 0.2) for _ in range(DICTS // BATCHES)]
    assert 0.1 < sum(found) / len(found) < 0.6


def test_c01_a_damaged_file_loads_or_is_refused(tmp_path: Path) -> None:
    rng = random.Random(99)
    path = tmp_path / "ps.json"
    found = []
    for _ in range(FILES):
        path.write_bytes(damaged_bytes(rng))
        found.append(loads(path, strict=rng.random() < 0.2))
    assert 0.05 < sum(found) / len(found) < 0.6
