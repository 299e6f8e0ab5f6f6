"""Shared by tests: has_cuda_device, COLD, KEEPING, ON_BOTH, Workshop."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import hps_numba

if TYPE_CHECKING:
    pass


#: a volatile_db that is empty at the start, and one that fills itself with what is found behind
COLD = {"type": "hash_map", "initialize_after_startup": False}


KEEPING = {**COLD, "cache_missed_embeddings": True}


#: a device, or None: the CPU twin of the kernels
ON_BOTH = [pytest.param(None, id="cpu"), pytest.param(0, id="gpu", marks=pytest.mark.gpu)]


def has_cuda_device() -> bool:
    """A CUDA device is visible to the system. Looks at device files only: nothing heavy is imported."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or shutil.which("nvidia-smi") is not None


class Workshop:
    """Writes models and configs to a folder and opens servers on them; closes the servers at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[hps_numba.HPS] = []

    def table(self, name: str, keys: Any, dim: int, stamp: int = 0) -> str:
        """A sparse model in the original's directory form (spec 5.1), written without the library; returns its path."""
        from support.oracles import rows_of

        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        keys = np.asarray(keys, np.int64)
        keys.tofile(folder / "key")
        rows_of(keys, dim, stamp).tofile(folder / "emb_vector")
        return str(folder)

    def model(self, *tables: tuple[Any, int], name: str = "m", stamp: int = 0, **entry: Any) -> dict[str, Any]:
        """An entry of ``models``, for tables given as (keys, dim); their files are written."""
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

    def open(self, *models: dict[str, Any], allow_code: Any = False, **top: Any) -> hps_numba.HPS:
        """A server of ``models`` from a dict; ``top`` are keys beside ``models``."""
        server = hps_numba.HPS({"supportlonglong": True, "models": list(models), **top}, allow_code=allow_code)
        self.servers.append(server)
        return server

    def open_file(self, *models: dict[str, Any], **top: Any) -> hps_numba.HPS:
        """The same from a JSON file."""
        path = self.folder / "ps.json"
        path.write_text(json.dumps({"supportlonglong": True, "models": list(models), **top}))
        server = hps_numba.HPS(path)
        self.servers.append(server)
        return server

    def open_cold(
        self, tier: str = "support.fakes:CountedDictTier", *, volatile: Any = COLD, entry: Any = None, **persistent: Any
    ) -> tuple[Any, Any]:
        """A server of one table with keys 0 to 8 and width 3, all rows in the tier behind host memory; and that tier."""
        model = self.model((range(9), 3), **(entry or {}))
        server = self.open(model, volatile_db=volatile, persistent_db={"type": tier, **persistent})
        return server, self.behind_host(server)

    def behind_host(self, server: hps_numba.HPS) -> Any:
        """The first slower tier of a server."""
        return server._slower.tiers[0]

    def let_background_finish(self, server: hps_numba.HPS) -> None:
        """Wait until every job that was handed over has run."""
        pause = threading.Event()  # tests may have stopped the clock of ``time``
        for deployment in server._models.values():
            for _ in range(30_000):
                if not deployment._jobs._waiting:
                    break
                pause.wait(1e-3)
            assert not deployment._jobs._waiting
