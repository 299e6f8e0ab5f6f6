"""hps_numba: a hierarchical parameter server for recommender models, in pure Python.

>>> import hps_numba
>>> with hps_numba.HPS("ps_config.json") as server:                            # doctest: +SKIP
...     rows = server.lookup([1, 5, 5, 7], model_name="demo", table_id=0)

Importing this package imports no framework, touches no GPU and compiles nothing; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hps_numba.errors import (
    ArrayError,
    CapacityError,
    ClosedError,
    ConfigError,
    DeviceError,
    HpsError,
    KeyDtypeError,
    ModelFileError,
    PolicyError,
    ReentryError,
    TierError,
    TierUnavailable,
    TraceError,
    UnknownModelError,
    VersionError,
)

if TYPE_CHECKING:
    from hps_numba import simulate
    from hps_numba.config import (
        DatabaseOverflowPolicy_t,
        DatabaseType_t,
        EmbeddingCacheType_t,
        InferenceParams,
        ModelConfig,
        ParameterServerConfig,
        PersistentDatabaseParams,
        ServerConfig,
        TableSpec,
        UpdateSourceParams,
        UpdateSourceType_t,
        VolatileDatabaseParams,
        read_config,
    )
    from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with
    from hps_numba.kernels.policies._policy import Policy
    from hps_numba.server.hps import HPS
    from hps_numba.server.plan import Plan, TablePlan, make_plan
    from hps_numba.server.stats import CacheStats, TableStats
    from hps_numba.simulate.workloads import generate_model
    from hps_numba.storage.model_files import convert_model, open_model, write_model
    from hps_numba.storage.tiers._tier import Fetched, Tier

__version__ = "0.1.0"

_HOMES = {
    "CacheStats": "server.stats",
    "DatabaseOverflowPolicy_t": "config",
    "DatabaseType_t": "config",
    "EmbeddingCacheType_t": "config",
    "Fetched": "storage.tiers._tier",
    "HPS": "server.hps",
    "InferenceParams": "config",
    "ModelConfig": "config",
    "ParameterServerConfig": "config",
    "PersistentDatabaseParams": "config",
    "Plan": "server.plan",
    "Policy": "kernels.policies._policy",
    "ServerConfig": "config",
    "TablePlan": "server.plan",
    "TableSpec": "config",
    "TableStats": "server.stats",
    "Tier": "storage.tiers._tier",
    "UpdateSourceParams": "config",
    "UpdateSourceType_t": "config",
    "VolatileDatabaseParams": "config",
    "as_policy": "kernels.policies._load",
    "convert_model": "storage.model_files",
    "generate_model": "simulate.workloads",
    "load_policy": "kernels.policies._load",
    "make_plan": "server.plan",
    "open_model": "storage.model_files",
    "policy_with": "kernels.policies._load",
    "read_config": "config",
    "write_model": "storage.model_files",
}

__all__ = [
    "HPS",
    "ArrayError",
    "CacheStats",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "DatabaseOverflowPolicy_t",
    "DatabaseType_t",
    "DeviceError",
    "EmbeddingCacheType_t",
    "Fetched",
    "HpsError",
    "InferenceParams",
    "KeyDtypeError",
    "ModelConfig",
    "ModelFileError",
    "ParameterServerConfig",
    "PersistentDatabaseParams",
    "Plan",
    "Policy",
    "PolicyError",
    "ReentryError",
    "ServerConfig",
    "TablePlan",
    "TableSpec",
    "TableStats",
    "Tier",
    "TierError",
    "TierUnavailable",
    "TraceError",
    "UnknownModelError",
    "UpdateSourceParams",
    "UpdateSourceType_t",
    "VersionError",
    "VolatileDatabaseParams",
    "__version__",
    "as_policy",
    "convert_model",
    "generate_model",
    "load_policy",
    "make_plan",
    "open_model",
    "policy_with",
    "read_config",
    "simulate",
    "write_model",
]


def __getattr__(name: str) -> Any:
    if name == "simulate":
        return importlib.import_module(f"{__name__}.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.{home}"), name))


def __dir__() -> list[str]:
    return sorted(__all__)
