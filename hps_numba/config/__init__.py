"""The config of a parameter server: every key with its type, range and default, and reading and checking of JSON.

============== ======================================================================================================
file           content
============== ======================================================================================================
reading        ``read_config``: makes a checked ``ServerConfig`` of a file, a dict or objects
schema         every key with its range, default and meaning; ``json_schema()``
databases      the same for sections that name a plugin: storage tiers and the update source
fields         what a single value may be: the annotations that ``schema`` is written with
enums          the enums and all their spellings
validation     types and ranges of single values, and the messages about them
leniency       values that HugeCTR took in another form: read with a WARNING
cross_checks   checks of several keys at once; defaults that depend on other keys
options        the options that a plugin (a tier, an update source) declares itself
params         HugeCTR's Python objects, for callers without a file
objects        converts those objects to the keys of a file
arguments      arguments of public calls that are not arrays: checked and converted
spec           ``TableSpec``: one embedding table as the other packages see it
json_text      JSON with comments
plain          converts Python values to JSON values
messages       the wording of problems
============== ======================================================================================================

Names whose modules need pydantic are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hps_numba.config.enums import DatabaseOverflowPolicy_t, DatabaseType_t, EmbeddingCacheType_t, UpdateSourceType_t
from hps_numba.config.params import (
    InferenceParams,
    ParameterServerConfig,
    PersistentDatabaseParams,
    UpdateSourceParams,
    VolatileDatabaseParams,
)
from hps_numba.config.spec import TableSpec

if TYPE_CHECKING:
    from hps_numba.config.databases import (
        PersistentDatabaseConfig,
        PluginSection,
        TierConfig,
        UpdateSourceConfig,
        VolatileDatabaseConfig,
    )
    from hps_numba.config.options import checked_options, source_config, tier_config
    from hps_numba.config.reading import ConfigSource, read_config
    from hps_numba.config.schema import ModelConfig, ServerConfig, json_schema

__all__ = [
    "ConfigSource",
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "EmbeddingCacheType_t",
    "InferenceParams",
    "ModelConfig",
    "ParameterServerConfig",
    "PersistentDatabaseConfig",
    "PersistentDatabaseParams",
    "PluginSection",
    "ServerConfig",
    "TableSpec",
    "TierConfig",
    "UpdateSourceConfig",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "VolatileDatabaseConfig",
    "VolatileDatabaseParams",
    "checked_options",
    "json_schema",
    "read_config",
    "source_config",
    "tier_config",
]

_HOMES = {
    "ConfigSource": "reading",
    "ModelConfig": "schema",
    "ServerConfig": "schema",
    "checked_options": "options",
    "json_schema": "schema",
    "read_config": "reading",
    "source_config": "options",
    "tier_config": "options",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'databases')}")
    return globals().setdefault(name, getattr(module, name))
