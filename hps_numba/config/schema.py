"""The config as frozen models: every key of the file, with its range, default and meaning (databases: ``databases``).

Attributes are named as in the file. Instances are made by :func:`hps_numba.config.read_config`, which also checks what
involves several keys at once and fills in the defaults that depend on others; after that every value is final.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, PrivateAttr

from hps_numba.config import enums as words
from hps_numba.config import fields as f
from hps_numba.config.databases import (
    AnyTier,
    AnyTierConfig,
    PersistentDatabaseConfig,
    Section,
    UpdateSourceConfig,
    VolatileDatabaseConfig,
)
from hps_numba.config.messages import Location
from hps_numba.config.spec import TableSpec, locate

__all__ = ["ModelConfig", "ServerConfig", "json_schema"]

_NO_STOCHASTIC = {"stochastic": "dynamic (stochastic never had an implementation)"}
_CacheType = Annotated[str, f.Spelling(words.CACHE_TYPES, refused=_NO_STOCHASTIC)]
_RowDtype = Annotated[str, f.Spelling(words.ROW_DTYPES)]
_OutputDtype = Annotated[str, f.Spelling(words.OUTPUT_DTYPES)]
_MissPath = Annotated[str, f.Spelling(words.MISS_PATHS)]


class ModelConfig(Section):
    """``models[i]``: a group of embedding tables that is deployed together."""

    unread: ClassVar[tuple[str, ...]] = (
        "dense_file",
        "network_file",
        "non_trainable_params_file",
        "label_dim",
        "slot_num",
        "use_mixed_precision",
        "scaler",
        "use_algorithm_search",
        "use_cuda_graph",
        "device_id",
        "maxnum_des_feature_per_sample",
    )
    model_config = ConfigDict(json_schema_extra=lambda schema: _add_unread(schema))

    model: f.Name
    """Name of the model, unique in the file."""
    sparse_files: f.EachTable[f.SourceName]
    """Path or URI of the sparse model of each table."""
    embedding_vecsize_per_table: f.EachTable[f.Width]
    """Elements in a row of each table."""
    maxnum_catfeature_query_per_table_per_sample: f.EachTable[f.Count]
    """Keys that one sample looks up at most in each table."""
    default_value_for_each_table: f.EachTable[f.Float32]
    """What fills the row of a key that no tier has, for each table; a short list is continued with 0."""
    deployed_device_list: tuple[f.Device, ...] = ()
    """Ordinals of the GPUs that serve the model, in any order; with an empty list the CPU serves it."""
    max_batch_size: f.Count = 64
    """Samples in one lookup; times the keys of a sample, the size of the buffers."""
    embedding_table_names: f.EachTable[f.Name] = Field(default_factory=tuple)
    """Name of each table; by default sparse_embedding0, sparse_embedding1, ..."""
    gpucache: bool = True
    """Keep a cache of rows on each device; ignored by static and uvm."""
    gpucacheper: f.Fraction = 0.2
    """Fraction of the rows of a table that the cache of a device keeps."""
    hit_rate_threshold: Annotated[float, Field(ge=-1, le=100)] = 0.9
    """Hit rate from which a lookup does not wait for slower tiers: 0 or less never waits, more than 1 always waits."""
    embedding_cache_type: _CacheType = "dynamic"
    """How rows are kept on a device."""
    use_static_table: bool = False
    """Old spelling of embedding_cache_type static; wins over it."""
    use_hctr_cache_implementation: bool = True
    """HugeCTR's choice between two dynamic caches; accepted, without effect."""
    num_of_worker_buffer_in_pool: Annotated[int, Field(ge=1, le=4096)] = 1
    """Lookups in flight on a device at a time."""
    num_of_refresher_buffer_in_pool: Annotated[int, Field(ge=0, le=4096)] = 1
    """Refreshes in flight on a device at a time; 0 for no refresh by a timer."""
    cache_refresh_percentage_per_iteration: f.Fraction = 0.0
    """Fraction of a cache that one step of a refresh takes."""
    init_ec: bool = True
    """Fill the cache at start."""
    refresh_delay: f.Seconds = 0.0
    """Seconds from the start to the first refresh."""
    refresh_interval: f.Seconds = 0.0
    """Seconds between two refreshes, 0 for none."""
    thread_pool_size: f.Threads = 16
    """Threads that fetch rows in the background."""
    use_context_stream: bool = True
    """Look up on the caller's CUDA stream instead of one of our own."""
    fuse_embedding_table: bool = True
    """Take part in the fusion of tables; without effect unless it is on for the whole file."""
    enable_pagelock: bool = False
    """static: keep the rows in pinned host memory, where the GPU reads them."""
    fp8_quant: bool = False
    """static: keep rows as float8_e4m3 with one scale a row."""
    cache_policy: f.PerTable[f.PluginName] = "lru"
    """Which rows a full cache evicts: one name, or a list of one per table."""
    cache_size_bytes: f.PerTable[f.Bytes] = 0
    """Bytes of rows that the cache of a device keeps, 0 for by gpucacheper: one number, or a list of one per table."""
    cache_row_dtype: f.PerTable[_RowDtype] = "float32"
    """How a cache stores a row: one name, or a list of one per table."""
    output_dtype: _OutputDtype = "float32"
    """Element type of the rows that a lookup returns."""
    miss_path: _MissPath = "auto"
    """How missing rows reach a GPU: read in place (direct), or so by a copied index (auto); gathered by the host (staged)."""
    time_budget_ms: Annotated[float, Field(ge=0, le=3_600_000)] = 0.0
    """Milliseconds that a lookup waits for slower tiers, 0 for no limit."""

    def tables(self, folder: Path | None = None) -> tuple[TableSpec, ...]:
        """The tables of this model, in the order of the file.

        Args:
            folder: where relative ``sparse_files`` are looked up after the working directory.
        """
        return tuple(self._table(i, folder) for i in range(len(self.sparse_files)))

    def _table(self, i: int, folder: Path | None) -> TableSpec:
        row_dtype = _of_table(self.cache_row_dtype, i)
        if self.fp8_quant and self.embedding_cache_type == "static":
            row_dtype = "float8_e4m3"
        return TableSpec(
            model=self.model,
            name=self.embedding_table_names[i],
            dim=self.embedding_vecsize_per_table[i],
            table_id=i,
            default_value=self.default_value_for_each_table[i],
            source=locate(self.sparse_files[i], folder),
            max_keys=self.max_batch_size * self.maxnum_catfeature_query_per_table_per_sample[i],
            gpucacheper=self.gpucacheper,
            cache_size_bytes=_of_table(self.cache_size_bytes, i),
            cache_policy=_of_table(self.cache_policy, i),
            cache_row_dtype=row_dtype,
        )


class ServerConfig(Section):
    """The whole file: what one parameter server serves and from where.

    Two configs are equal if they say the same, wherever they were read from.
    """

    supportlonglong: bool = True
    """Keys are int64; if false, uint32."""
    fuse_embedding_table: bool = False
    """Look up tables of equal width together."""
    require_gpu: bool = False
    """Fail at start, instead of serving from the CPU, if there is no GPU."""
    cache_on_cpu: bool = False
    """On a machine without a GPU still run the embedding cache, in host memory."""
    models: Annotated[tuple[ModelConfig, ...], Field(min_length=1)]
    """The models to deploy."""
    volatile_db: VolatileDatabaseConfig = Field(
        default_factory=lambda: VolatileDatabaseConfig(type="parallel_hash_map"),
        json_schema_extra={"default": {"type": "parallel_hash_map"}},
    )
    """Rows in memory; if absent, a parallel_hash_map with its defaults."""
    persistent_db: PersistentDatabaseConfig = Field(
        default_factory=PersistentDatabaseConfig, json_schema_extra={"default": {"type": "disabled"}}
    )
    """Rows on disk; if absent, none."""
    tiers: Annotated[tuple[AnyTier, ...], Field(min_length=1)] = ()
    """Storage tiers, fastest first, instead of volatile_db and persistent_db; each with a type and its options."""
    update_source: UpdateSourceConfig = Field(
        default_factory=UpdateSourceConfig, json_schema_extra={"default": {"type": "null"}}
    )
    """Online updates; if absent, none."""
    update_sources: Annotated[tuple[UpdateSourceConfig, ...], Field(min_length=1)] = ()
    """Several sources of online updates, instead of update_source."""

    _source: Path | None = PrivateAttr(None)
    _strict: bool = PrivateAttr(False)
    _identity: str | None = PrivateAttr(None)

    @property
    def source(self) -> Path | None:
        """The absolute path of the file this was read from, or None."""
        return self._source

    @property
    def folder(self) -> Path | None:
        """The folder of :attr:`source`, where relative ``sparse_files`` are looked up after the working directory."""
        return self._source.parent if self._source else None

    @property
    def strict(self) -> bool:
        """Unknown keys are errors: whether :func:`read_config` was told so."""
        return self._strict

    @property
    def identity(self) -> str:
        """What tells two servers apart: the resolved path of the file, or the canonical JSON of a config without one."""
        return self._identity or self._canonical()

    def tables(self) -> tuple[TableSpec, ...]:
        """The tables of all models, in the order of the file."""
        return tuple(table for model in self.models for table in model.tables(self.folder))

    def tier_sections(self) -> tuple[tuple[Location, AnyTierConfig], ...]:
        """Location and section of each storage tier that is not disabled, fastest first."""
        every: list[tuple[Location, AnyTierConfig]] = [(("tiers", i), section) for i, section in enumerate(self.tiers)]
        if not every:
            every = [(("volatile_db",), self.volatile_db), (("persistent_db",), self.persistent_db)]
        return tuple((place, section) for place, section in every if section.type != "disabled")

    def source_sections(self) -> tuple[tuple[Location, UpdateSourceConfig], ...]:
        """Location and section of each source of online updates, with its name."""
        every: list[tuple[Location, UpdateSourceConfig]] = [(("update_source",), self.update_source)]
        if self.update_sources:
            every = [(("update_sources", i), section) for i, section in enumerate(self.update_sources)]
        return tuple((place, section) for place, section in every if section.type != "null")

    def to_dict(self) -> dict[str, Any]:
        """Every key in its JSON spelling; ``read_config`` of it gives an equal config."""
        form = self.model_dump(mode="json")
        for key in ("volatile_db", "persistent_db") if self.tiers else ("tiers",):
            del form[key]
        del form["update_source" if self.update_sources else "update_sources"]
        return form

    def to_json(self, *, indent: int | None = 2) -> str:
        """:meth:`to_dict` as the text of a config file."""
        return json.dumps(self.to_dict(), indent=indent)

    def _canonical(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ServerConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self._canonical())


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config file: every key with type, range, default and meaning."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **ServerConfig.model_json_schema(), "title": "hps_numba parameter server"}


def _of_table(value: Any, i: int) -> Any:
    return value[i] if isinstance(value, tuple) else value


def _add_unread(schema: dict[str, Any]) -> None:
    meaning = "Documented by HugeCTR, which never read it; accepted, without effect."
    for key in ModelConfig.unread:
        schema["properties"][key] = {"title": key, "description": meaning, "deprecated": True}
