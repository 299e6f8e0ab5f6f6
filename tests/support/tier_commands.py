"""Commands on the tiers of a config, in this process: configs, models and the content of ``DiskTier``."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from support.oracles import rows_of
from typer.testing import CliRunner, Result

from hps_numba import write_model
from hps_numba.cli import build

__all__ = ["DIM", "TAG", "TierFolder"]

TAG = "hps_et.m.a"
DIM = 3


class TierFolder:
    """A folder with sparse models, a config, and the files of its tiers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "ps.json"

    def run(self, *words: object) -> Result:
        """Run ``hps-numba``, with code allowed."""
        return CliRunner().invoke(build(), [*map(str, words), "--allow-code"])

    def parsed(self, *words: object, code: int = 0) -> Any:
        """Its JSON."""
        result = self.run(*words, "--json")
        assert result.exit_code == code, (result.exit_code, result.output, result.stderr)
        return json.loads(result.stdout)

    def refused(self, *words: object, code: int = 1) -> str:
        """Its one line of error."""
        result = self.run(*words)
        assert result.exit_code == code, (result.exit_code, result.output, result.stderr)
        assert result.stdout == "" and result.stderr.splitlines()[-1].startswith("error: "), result.output
        return result.stderr.splitlines()[-1]

    def model(self, name: str, keys: Any, dim: int = DIM) -> Path:
        """A sparse model with the rows of ``oracles.rows_of``."""
        keys = np.asarray(keys, np.int64)
        write_model(self.folder / name, dim, [(keys, rows_of(keys, dim))])
        return self.folder / name

    def tier(self, file: str = "tier", **options: Any) -> dict[str, Any]:
        """The section of a ``DiskTier``."""
        return {"type": "support.disk_tier:DiskTier", "file": str(self.folder / file), **options}

    def write(self, *tiers: dict[str, Any], models: tuple[str, ...] = ("m",), **top: Any) -> Path:
        """A config of models with a table ``a``, all in ``a.model``; ``tiers`` come after one in memory."""
        entry = {
            "sparse_files": [str(self.folder / "a.model")],
            "embedding_table_names": ["a"],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [2],
            "default_value_for_each_table": [0.0],
            "deployed_device_list": [],
        }
        sections = {"tiers": [{"type": "hash_map"}, *tiers]} if tiers else {}
        every = [{"model": name, **entry} for name in models]
        self.config.write_text(json.dumps({"supportlonglong": True, "models": every, **sections, **top}))
        return self.config

    def content(self, tag: str = TAG, file: str = "tier") -> dict[int, np.ndarray]:
        """Key -> row of a table of a ``DiskTier``."""
        stores = pickle.loads((self.folder / file).read_bytes())
        return stores[tag].rows if tag in stores else {}

    def tags(self, file: str = "tier") -> list[str]:
        """Tables of a ``DiskTier``."""
        return sorted(pickle.loads((self.folder / file).read_bytes()))
