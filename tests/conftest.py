"""Fixtures: small models in the original's form, servers on them, caches, and the skip of tests that need a GPU."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest

import hps_numba

if TYPE_CHECKING:
    from cache_bench import Bench

# kernels are compiled on first use, and machines of CI stall: how long an example takes says nothing
hypothesis.settings.register_profile("steady", deadline=None)
hypothesis.settings.load_profile("steady")

#: a volatile_db that is empty at the start, and one that fills itself with what is found behind
COLD = {"type": "hash_map", "initialize_after_startup": False}
KEEPING = {**COLD, "cache_missed_embeddings": True}
#: a device, or None: the CPU twin of the kernels
ON_BOTH = [pytest.param(None, id="cpu"), pytest.param(0, id="gpu", marks=pytest.mark.gpu)]


def has_cuda_device() -> bool:
    """A CUDA device is visible to the system. Looks at device files only: nothing heavy is imported."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or shutil.which("nvidia-smi") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not has_cuda_device():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment says of colours must not reach the output that tests read."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


class Workshop:
    """Writes models and configs to a folder and opens servers on them; closes the servers at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.servers: list[hps_numba.HPS] = []

    def table(self, name: str, keys: Any, dim: int, stamp: int = 0) -> str:
        """A sparse model in the original's directory form (spec 5.1), written without the library; returns its path."""
        from naive import rows_of

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
        self, tier: str = "naive:CountedDictTier", *, volatile: Any = COLD, entry: Any = None, **persistent: Any
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


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    made = Workshop(tmp_path)
    yield made
    for server in made.servers:
        server.close()


def bench_on(device: int | None) -> Iterator[Bench]:
    from cache_bench import Bench

    made = Bench(device)
    yield made
    made.close()


@pytest.fixture(params=ON_BOTH)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Caches and stores on the CPU twin, and on a device."""
    yield from bench_on(request.param)


@pytest.fixture
def cpu_bench() -> Iterator[Bench]:
    """Caches and stores on the CPU twin alone."""
    yield from bench_on(None)
