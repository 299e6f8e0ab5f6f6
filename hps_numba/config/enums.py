"""HugeCTR's enums, and every spelling that a file may use for them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

__all__ = [
    "CACHE_TYPES",
    "DATABASES",
    "MISS_PATHS",
    "ON_LOSS",
    "OUTPUT_DTYPES",
    "OVERFLOW_POLICIES",
    "ROW_DTYPES",
    "STARTS",
    "UPDATE_SOURCES",
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "EmbeddingCacheType_t",
    "UpdateSourceType_t",
    "Words",
    "canonical_database",
    "spellings",
]


class _NumberedEnum(StrEnum):
    """Members in HugeCTR's order: ``int(member)`` is the number that it has there, and ``Enum(number)`` the member."""

    def __int__(self) -> int:
        return list(type(self)).index(self)

    @classmethod
    def _missing_(cls, value: object) -> _NumberedEnum | None:
        members = list(cls)
        return members[value] if type(value) is int and 0 <= value < len(members) else None


class DatabaseType_t(_NumberedEnum):
    """What holds rows below the embedding cache; each member is also the string that a file uses."""

    disabled = "disabled"
    hash_map = "hash_map"
    parallel_hash_map = "parallel_hash_map"
    multi_process_hash_map = "multi_process_hash_map"
    redis_cluster = "redis_cluster"
    rocks_db = "rocks_db"


class DatabaseOverflowPolicy_t(_NumberedEnum):
    """Which rows are evicted from a partition that holds more than ``overflow_margin``."""

    evict_random = "evict_random"
    evict_least_used = "evict_least_used"
    evict_oldest = "evict_oldest"


class UpdateSourceType_t(_NumberedEnum):
    """Where online updates come from."""

    null = "null"
    kafka_message_queue = "kafka_message_queue"


class EmbeddingCacheType_t(_NumberedEnum):
    """How rows are kept on a device. ``stochastic`` never had an implementation: a config refuses it."""

    Dynamic = "dynamic"
    UVM = "uvm"
    Static = "static"
    stochastic = "stochastic"


Words = Mapping[str, tuple[str, ...]]
"""Canonical spelling -> the other spellings that mean the same."""

DATABASES: Words = {
    DatabaseType_t.disabled.value: ("disable", "none"),
    DatabaseType_t.hash_map.value: ("hashmap", "hash", "map"),
    DatabaseType_t.parallel_hash_map.value: ("parallel_hashmap", "parallel_hash", "parallel_map"),
    DatabaseType_t.multi_process_hash_map.value: ("multi_process_hashmap", "multi_process_hash", "multi_process_map"),
    DatabaseType_t.redis_cluster.value: ("redis",),
    DatabaseType_t.rocks_db.value: ("rocksdb", "rocks"),
}
OVERFLOW_POLICIES: Words = {
    DatabaseOverflowPolicy_t.evict_random.value: ("random",),
    DatabaseOverflowPolicy_t.evict_least_used.value: ("least_used",),
    DatabaseOverflowPolicy_t.evict_oldest.value: ("oldest",),
}
UPDATE_SOURCES: Words = {
    UpdateSourceType_t.null.value: ("none",),
    UpdateSourceType_t.kafka_message_queue.value: ("kafka_mq", "kafka"),
}
CACHE_TYPES: Words = {kind.value: () for kind in EmbeddingCacheType_t}
OUTPUT_DTYPES: Words = {"float32": ("fp32",), "float16": ("fp16", "half"), "bfloat16": ("bf16",)}
ROW_DTYPES: Words = {**OUTPUT_DTYPES, "int8": (), "float8_e4m3": ("float8_e4m3fn", "fp8")}
MISS_PATHS: Words = {"auto": (), "direct": (), "staged": ()}
ON_LOSS: Words = {"auto": (), "reload": (), "continue": ()}
STARTS: Words = {"auto": (), "committed": (), "oldest": ()}


def spellings(words: Words) -> set[str]:
    """Every spelling of some words."""
    return {spelling for word, others in words.items() for spelling in (word, *others)}


def canonical_database(spelling: str) -> str | None:
    """The canonical spelling of one of ``DATABASES``; None if it is none of them."""
    return next((word for word, others in DATABASES.items() if spelling in (word, *others)), None)
