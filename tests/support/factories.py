"""Small sparse models and configs, written to a folder without the library, and servers on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.internals import slower_tier, wait_for_background

import hps_numba

#: a ``volatile_db`` that is empty at the start, and one that lookups fill from slower tiers
COLD = {"type": "hash_map", "initialize_after_startup": False}
KEEPING = {**COLD, "cache_missed_embeddings": True}
#: parameters: CUDA device 0, or None for the CPU backend
ON_BOTH = [pytest.param(None, id="cpu"), pytest.param(0, id="gpu", marks=pytest.mark.gpu)]


def has_cuda_device() -> bool:
    """Whether the system has a CUDA device, by its device files: nothing heavy is imported."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or shutil.which("nvidia-smi") is not None


class Workshop:
    """Writes models and configs to a folder and opens servers on them.

    Attributes:
        servers: to be closed at the end of the test.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[hps_numba.HPS] = []

    def table(self, name: str, keys: Any, dim: int, stamp: int = 0) -> str:
        """A sparse model in the directory form of HugeCTR, with the rows of ``oracles.rows_of``; returns its path."""
        from support.oracles import rows_of

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        keys = np.asarray(keys, np.int64)
        keys.tofile(folder / "key")
        rows_of(keys, dim, stamp).tofile(folder / "emb_vector")
        return str(folder)

    def model(self, *tables: tuple[Any, int], name: str = "m", stamp: int = 0, **entry: Any) -> dict[str, Any]:
        """An entry of ``models``, for tables given as (keys, dim), whose files are written."""
        return {
            "model": name,
            "sparse_files": [self.table(f"{name}_{i}.model", keys, dim, stamp) for i, (keys, dim) in enumerate(tables)],
            "embedding_vecsize_per_table": [dim for _, dim in tables],
            "maxnum_catfeature_query_per_table_per_sample": [2] * len(tables),
            "default_value_for_each_table": [-7.5 - i for i in range(len(tables))],
            "deployed_device_list": [],
            "max_batch_size": 4,
            **entry,
        }

    def open(self, *models: dict[str, Any], allow_code: bool | None = None, **top: Any) -> hps_numba.HPS:
        """A server of ``models`` from a dict; ``top`` are keys beside ``models``.

        Code is allowed by default if a tier is a class of the tests, ``module:NAME``.
        """
        if allow_code is None:
            sections = [top.get("volatile_db", {}), top.get("persistent_db", {}), *top.get("tiers", ())]
            allow_code = any(":" in section.get("type", "") and ".py:" not in section["type"] for section in sections)
        server = hps_numba.HPS({"supportlonglong": True, "models": list(models), **top}, allow_code=allow_code)
        self.servers.append(server)
        return server

    def open_file(self, *models: dict[str, Any], **top: Any) -> hps_numba.HPS:
        """A server of ``models`` from a JSON file."""
        path = self.folder / "ps.json"
        path.write_text(json.dumps({"supportlonglong": True, "models": list(models), **top}))
        server = hps_numba.HPS(path, allow_code=True)
        self.servers.append(server)
        return server

    def open_cold(
        self, tier: str = "support.fakes:CountedDictTier", *, volatile: Any = COLD, entry: Any = None, **persistent: Any
    ) -> tuple[Any, Any]:
        """A server of one table with keys 0 to 8 and width 3, all rows in a slower tier; and that tier."""
        model = self.model((range(9), 3), **(entry or {}))
        server = self.open(model, volatile_db=volatile, persistent_db={"type": tier, **persistent})
        return server, slower_tier(server)

    def behind_host(self, server: hps_numba.HPS) -> Any:
        """``internals.slower_tier``."""
        return slower_tier(server)

    def let_background_finish(self, server: hps_numba.HPS) -> None:
        """``internals.wait_for_background``."""
        wait_for_background(server)
