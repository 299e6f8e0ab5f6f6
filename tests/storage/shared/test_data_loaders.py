"""Workers of Torch's DataLoader that look up rows in one shared-memory segment."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.factories import Workshop
from support.oracles import rows_of
from support.shared_memory import MIB, new_name, segment_file
from support.waiting import HANG_SECONDS, wait_until

import hps_numba

torch = pytest.importorskip("torch")

DIM, ROWS, WORKERS = 4, 40, 2


@pytest.fixture
def name() -> Iterator[str]:
    given = new_name()
    yield given
    segment_file(given).unlink(missing_ok=True)


def config_of(workshop: Workshop, name: str, **options: Any) -> dict[str, Any]:
    memory = {"type": "multi_process_hash_map", "shared_memory_name": name, "shared_memory_size": 16 * MIB, **options}
    return {
        "supportlonglong": True,
        "models": [workshop.model((range(ROWS), DIM), name="m")],
        "volatile_db": memory,
    }


class Looked(torch.utils.data.Dataset[Any]):
    """Items are a key, its row as the server of this worker has it, and the worker's pid."""

    def __init__(self, config: dict[str, Any], server: hps_numba.HPS | None) -> None:
        self.config, self.server = config, server

    def __len__(self) -> int:
        return ROWS

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "server": None}  # a worker that is spawned opens one of its own

    def __getitem__(self, key: int) -> Any:
        if self.server is None:
            self.server = hps_numba.HPS(self.config)
        return key, torch.from_numpy(self.server.lookup(np.array([key]), "m", 0)[0]), os.getpid()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_read_one_copy_of_the_rows(workshop: Workshop, name: str, start: str) -> None:
    config = config_of(workshop, name)
    with hps_numba.HPS(config) as server:
        inode = segment_file(name).stat().st_ino
        newer = rows_of(range(ROWS), DIM, 1)
        server.insert(np.arange(ROWS), newer, "m", 0)  # the model's files have other rows: they come from the segment
        loader = torch.utils.data.DataLoader(
            Looked(config, server),
            batch_size=5,
            num_workers=WORKERS,
            multiprocessing_context=multiprocessing.get_context(start),
            timeout=HANG_SECONDS,
        )
        for _ in range(2 if start == "fork" else 1):  # the second time with other workers, after the first have left
            keys, rows, workers = (torch.cat(part) for part in zip(*loader, strict=True))
            assert sorted(keys.tolist()) == list(range(ROWS))
            assert np.array_equal(rows.numpy(), newer[keys.numpy()])
            assert len(set(workers.tolist())) == WORKERS and os.getpid() not in workers
        assert segment_file(name).stat().st_ino == inode
        assert np.array_equal(server.lookup(np.arange(ROWS), "m", 0), newer)
    wait_until(lambda: not segment_file(name).exists())
