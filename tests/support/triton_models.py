"""Models that tests load into a real Triton, of configs in one folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import triton
from support.dense_programs import save_scores
from support.docs import block_with
from support.factories import Workshop
from support.inference_suite import write_suite
from support.shared_memory import MIB, new_name
from support.triton_clients import TritonClient

from hps_numba.config import read_config
from hps_numba.frontends.triton.repository import RepositoryOptions, write_repository

__all__ = ["ROWS", "Served", "serving"]

ROWS = 20_000
LOADED = ("m", "shared", "scored", "scored_scores", "changing", "batched", "shop", "rows", "other")


class Served:
    """A Triton with models of several configs, whose files are in ``folder``.

    Attributes:
        models: the repository.   server: the process.   clients: by protocol.
        suite: config of the models of ``inference_suite``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.models = folder, folder / "models"
        self.workshop = Workshop(folder)
        shared = {"type": "multi_process_hash_map", "shared_memory_name": new_name(), "shared_memory_size": 64 * MIB}
        self.write("m", ["user", "item"])
        self.write("shared", ["user", "item"], RepositoryOptions(instances=3), volatile_db=shared)
        program = save_scores(folder / "scores.pt2", user=(2, 4), item=(8,), dense=(3,))
        self.write("scored", ["user", "item"], RepositoryOptions(dense={"scored": program}))
        self.write("changing", ["user", "item"])
        self.write("batched", ["user", "item"], RepositoryOptions(max_batch_size=16))
        self.follow_the_page()
        suite = {"type": "multi_process_hash_map", "shared_memory_name": new_name(), "shared_memory_size": 64 * MIB}
        (folder / "suite").mkdir()
        self.suite = write_suite(folder / "suite", volatile_db=suite)
        write_repository(read_config(self.suite), self.models, RepositoryOptions(instances=2))
        self.server: triton.TritonServer
        self.clients: dict[str, TritonClient] = {}

    def write(
        self,
        name: str,
        tables: list[str],
        options: RepositoryOptions | None = None,
        *,
        rows: int = ROWS,
        dims: tuple[int, ...] = (4, 8),
        **top: Any,
    ) -> Path:
        """Sparse models, a config, and what Triton loads."""
        entry = self.workshop.model(*((range(rows), dim) for dim in dims), name=name, embedding_table_names=tables)
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"supportlonglong": True, "models": [entry], **top}))
        write_repository(read_config(path), self.models, options or RepositoryOptions())
        return path

    def follow_the_page(self) -> None:
        """What the page makes, in ``folder``: a sparse model and ``ps.json``."""
        with contextlib.chdir(self.folder):
            exec(block_with("triton.md", "generate_model"), {})
        write_repository(read_config(self.folder / "ps.json"), self.models, RepositoryOptions())


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A Triton with all models; it ends with the block."""
    triton.program_folder()
    made = Served(folder)
    options = ["--disable-auto-complete-config", *(f"--load-model={name}" for name in LOADED)]
    with triton.running(made.models, made.folder, *options) as made.server:
        made.clients = {name: TritonClient(name, getattr(made.server, name)) for name in ("http", "grpc")}
        yield made
        for client in made.clients.values():
            client.close()
    assert "Traceback" not in made.server.text()
