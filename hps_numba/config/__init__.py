"""The config of a parameter server: frozen specs, JSON in and out, and every range check.

============== ======================================================================================================
file           what it is about
============== ======================================================================================================
reading        ``read_config``: a file, a dict or objects in, a checked ``ServerConfig`` out
schema         every key with its range, default and meaning; ``json_schema()``
fields         what a single value may be: the annotations that ``schema`` is written with
spellings      the enums and all their spellings
validation     types and ranges of single values, said in our words
checks         what concerns several keys at once; defaults that depend on other keys
params         the original's Python objects, for callers who have no file
objects        those objects in the spelling of the file
spec           ``TableSpec``: one embedding table as the rooms below see it
json_text      JSON with comments
plain          Python values as JSON has them
messages       how a problem is put into words
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
    from hps_numba.config.reading import ConfigSource, read_config
    from hps_numba.config.schema import (
        ModelConfig,
        PersistentDatabaseConfig,
        ServerConfig,
        UpdateSourceConfig,
        VolatileDatabaseConfig,
        json_schema,
    )

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
    "ServerConfig",
    "TableSpec",
    "UpdateSourceConfig",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "VolatileDatabaseConfig",
    "VolatileDatabaseParams",
    "json_schema",
    "read_config",
]

_READING = ("ConfigSource", "read_config")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{'reading' if name in _READING else 'schema'}")
    return globals().setdefault(name, getattr(module, name))
