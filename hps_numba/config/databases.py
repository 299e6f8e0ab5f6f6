"""The sections of a config that name a plugin: storage tiers and the update source; ``schema`` puts them together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from hps_numba.config import enums as words
from hps_numba.config import fields as f
from hps_numba.config.messages import SECRET_KEYS

__all__ = [
    "AnyTier",
    "AnyTierConfig",
    "PersistentDatabaseConfig",
    "PluginSection",
    "Section",
    "TierConfig",
    "UpdateSourceConfig",
    "VolatileDatabaseConfig",
    "tier_class",
]

_TIERS, _SOURCES = "hps_numba.storage.tiers", "hps_numba.updates"
_NOT_ON_DISK = set(words.DATABASES) - {"disabled", "rocks_db"}
_IN_PERSISTENT = "a database in memory here and rocks_db in persistent_db.type"
_IN_VOLATILE = "rocks_db, disabled or module:NAME for one of your own"
_VolatileType = Annotated[str, f.Spelling(words.DATABASES, reference=True, refused={"rocks_db": _IN_PERSISTENT}, folder=_TIERS)]
_PersistentType = Annotated[
    str, f.Spelling(words.DATABASES, reference=True, refused=dict.fromkeys(_NOT_ON_DISK, _IN_VOLATILE), folder=_TIERS)
]
_OverflowPolicy = Annotated[str, f.Spelling(words.OVERFLOW_POLICIES)]
_TierType = Annotated[str, f.Spelling(words.DATABASES, reference=True, folder=_TIERS)]
_UpdateSource = Annotated[str, f.Spelling(words.UPDATE_SOURCES, reference=True, folder=_SOURCES)]
_Start = Annotated[str, f.Spelling(words.STARTS)]
_OnLoss = Annotated[str, f.Spelling(words.ON_LOSS)]


class Section(BaseModel):
    """An object of the config file. Values are taken as they are: no text for numbers, no numbers for booleans."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="ignore",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        field_title_generator=lambda key, _: key,
    )

    unread: ClassVar[tuple[str, ...]] = ()
    """Keys that HugeCTR's documentation has and no version of it ever read."""


class PluginSection(Section):
    """A section whose ``type`` names a plugin: keys that its class does not have are options of the plugin.

    ``config.options`` checks them when the plugin is opened.
    """

    model_config = ConfigDict(extra="allow")

    types: ClassVar[words.Words] = words.DATABASES
    """HugeCTR's own types."""

    type: str
    """Name of the plugin."""

    _options: Any = PrivateAttr(None)

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return ((key, value) for key, value in super().__repr_args__() if key not in SECRET_KEYS)

    @property
    def options(self) -> Any:
        """An instance of the plugin's ``Options`` once it is opened; None if it declares none."""
        return self._options

    def set_options(self, options: Any) -> None:
        """What :attr:`options` gives from now on; a copy of the section keeps it."""
        self._options = options

    def unknown(self, known: Container[str] | None) -> list[str]:
        """Given keys that are neither of the section's class nor in ``known``; None knows all."""
        return [] if known is None else [key for key in self.model_extra or {} if key not in known]

    @classmethod
    def leaves_keys_to_plugin(cls, kind: object) -> bool:
        """Whether a section of this ``type`` may have keys beyond those of the class: all but HugeCTR's own types may."""
        return isinstance(kind, str) and kind not in words.spellings(cls.types)


class VolatileDatabaseConfig(PluginSection):
    """``volatile_db``: rows in the memory of this host or of a Redis cluster, shared by all models."""

    type: _VolatileType = "disabled"
    """Which volatile database holds rows; a volatile_db without type is disabled."""
    address: f.Hosts = "127.0.0.1:7000"
    """Redis: host:port of one or more nodes, separated by commas."""
    user_name: str = "default"
    """Redis: name of the user."""
    password: str = Field(default="", repr=False)
    """Redis: password of the user."""
    num_partitions: Annotated[int, Field(ge=1, le=65536)] = Field(default_factory=lambda: min(16, os.cpu_count() or 1))
    """Partitions of a table; by default as many as this host has CPU cores, at most 16."""
    allocation_rate: Annotated[int, Field(ge=4, le=2**50)] = 2**28
    """Hash maps: bytes by which a partition grows, at least one row."""
    shared_memory_size: Annotated[int, Field(ge=2**16, le=2**50)] = 2**34
    """Multi-process map: bytes of the shared segment."""
    shared_memory_name: f.SegmentName = "hctr_mp_hash_map_database"
    """Multi-process map: name of the shared segment, the same in all processes."""
    shared_memory_auto_remove: bool = True
    """Multi-process map: remove the segment when the last process leaves it."""
    num_node_connections: Annotated[int, Field(ge=1, le=65536)] = 5
    """Redis: connections to a node, at most num_partitions; by default 5 or that many."""
    max_batch_size: f.Count = 65536
    """Keys in one transaction; Redis takes at most 262143."""
    enable_tls: bool = False
    """Redis: encrypt connections."""
    tls_ca_certificate: str = "cacertbundle.crt"
    """Redis: file or folder of the trusted certificates."""
    tls_client_certificate: str = "client_cert.pem"
    """Redis: file of the client's certificate."""
    tls_client_key: str = "client_key.pem"
    """Redis: file of the client's key."""
    tls_server_name_identification: str = "redis.localhost"
    """Redis: name of the server asked for (SNI)."""
    overflow_margin: Annotated[int, Field(ge=1, le=2**64 - 1)] = 2**64 - 1
    """Rows that a partition holds before rows are evicted."""
    overflow_policy: _OverflowPolicy = "evict_random"
    """Which rows are evicted from a partition that holds more than overflow_margin."""
    overflow_resolution_target: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Fraction of overflow_margin that an eviction leaves; 1 evicts only the excess."""
    initialize_after_startup: bool = True
    """Insert the rows of the sparse models at start."""
    initial_cache_rate: f.Fraction = 1.0
    """Fraction of the rows of each table inserted at start."""
    cache_missed_embeddings: bool = False
    """Also keep rows that were found in a slower tier."""
    update_filters: tuple[f.Regex, ...] = (".+",)
    """Regular expressions of the names of models that take online updates; an empty list takes none."""


class PersistentDatabaseConfig(PluginSection):
    """``persistent_db``: all rows of all models on disk."""

    type: _PersistentType = "disabled"
    """Which persistent database holds rows; a persistent_db without type is disabled."""
    path: f.SourceName = Field(default_factory=lambda: str(Path(tempfile.gettempdir()) / "rocksdb"))
    """Folder of the database, made if missing; by default 'rocksdb' in the folder for temporary files."""
    num_threads: f.Threads = 16
    """Background threads of the database."""
    read_only: bool = False
    """Never write to the database."""
    max_batch_size: f.Count = 65536
    """Keys in one read or write."""
    initialize_after_startup: bool = True
    """Insert the rows of the sparse models at start."""
    update_filters: tuple[f.Regex, ...] = (".+",)
    """Regular expressions of the names of models that take online updates; an empty list takes none."""


class TierConfig(PluginSection):
    """``tiers[i]`` of a type that HugeCTR does not have: what every tier takes. Other keys are options of the tier's own."""

    type: _TierType
    """Which tier: a built-in or installed one, or module:NAME or file.py:NAME for one of your own."""
    max_batch_size: f.Count = 65536
    """Keys in one read or write."""
    read_only: bool = False
    """Never write to the tier."""
    initialize_after_startup: bool = True
    """Insert the rows of the sparse models at start."""
    initial_cache_rate: f.Fraction = 1.0
    """Fraction of the rows of each table inserted at start."""
    update_filters: tuple[f.Regex, ...] = (".+",)
    """Regular expressions of the names of models that take online updates; an empty list takes none."""


AnyTierConfig = VolatileDatabaseConfig | PersistentDatabaseConfig | TierConfig
_KIND_OF_TIER: dict[type, str] = {VolatileDatabaseConfig: f.IN_MEMORY, PersistentDatabaseConfig: f.ON_DISK, TierConfig: f.OWN}


def tier_class(section: object) -> type[AnyTierConfig]:
    """The class of an entry of ``tiers``: that of HugeCTR's form for its types, else ``TierConfig``."""
    kind = section.get("type") if isinstance(section, dict) else None
    word = words.canonical_database(kind) if isinstance(kind, str) else None
    if word is None:
        return TierConfig
    return PersistentDatabaseConfig if word == "rocks_db" else VolatileDatabaseConfig


def _tag_of_tier(section: object) -> str:
    return _KIND_OF_TIER[type(section) if isinstance(section, PluginSection) else tier_class(section)]


AnyTier = Annotated[
    Annotated[VolatileDatabaseConfig, Tag(f.IN_MEMORY)]
    | Annotated[PersistentDatabaseConfig, Tag(f.ON_DISK)]
    | Annotated[TierConfig, Tag(f.OWN)],
    Discriminator(_tag_of_tier),
    f.AnyOf(),
]


class UpdateSourceConfig(PluginSection):
    """``update_source`` and ``update_sources[i]``: where online updates come from. Other keys are options of the source."""

    types: ClassVar[words.Words] = words.UPDATE_SOURCES

    @classmethod
    def leaves_keys_to_plugin(cls, kind: object) -> bool:
        """As for others, but HugeCTR's Kafka too has options beyond those of HugeCTR."""
        null = words.UpdateSourceType_t.null.value
        return isinstance(kind, str) and kind not in (null, *words.UPDATE_SOURCES[null])

    type: _UpdateSource = "null"
    """Which source of updates; an update_source without type is none."""
    brokers: f.Hosts = "127.0.0.1:9092"
    """host:port of one or more brokers, separated by commas or semicolons."""
    metadata_refresh_interval_ms: Annotated[int, Field(ge=10, le=3_600_000)] = 30_000
    """Milliseconds between two looks for new topics."""
    receive_buffer_size: Annotated[int, Field(ge=1024, le=999_998_976)] = 262_144
    """Bytes of the receive buffer; a message may be 1024 bytes longer."""
    poll_timeout_ms: Annotated[int, Field(ge=1, le=f.INT32_MAX - 1)] = 500
    """Milliseconds to wait for a message."""
    max_batch_size: f.Count = 8192
    """Rows of a table collected before they are delivered."""
    failure_backoff_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 50
    """Milliseconds to wait before a failed delivery is tried again."""
    max_commit_interval: f.Count = 32
    """Messages of a topic after which deliveries are committed."""
    name: Annotated[str, f.Matching("[A-Za-z0-9_.-]{0,120}", "at most 120 of the characters A-Z a-z 0-9 _ . -")] = ""
    """What the source is called in stats and logs; by default its type, and its number if there are several."""
    start: _Start = "auto"
    """Where reading starts: after what was applied (committed), at the oldest update, or auto: committed if rows outlive us."""
    max_backlog_bytes: Annotated[int, Field(ge=2**16, le=2**40)] = 2**26
    """Bytes of updates that may wait to be applied; reading pauses beyond that."""
    on_loss: _OnLoss = "auto"
    """If the bus dropped updates: reload files and replay what it has, continue, or auto: reload unless rows outlive us."""
    refuse_not_finite: bool = False
    """Skip and count updates with NaN or infinity."""
    batch_interval_ms: Annotated[int, Field(ge=0, le=1000)] = 100
    """Milliseconds for which updates are collected to be applied together: lookups lose less by few large batches."""
