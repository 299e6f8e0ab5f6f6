"""The interpreter ends while threads look up, pool and write, and nobody has closed the server."""

from __future__ import annotations

import random
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import KEYS, MODEL, Clock, open_server, rows_of, versions_of, write_version

#: what a server has besides, by the name of an attack
TIERS: dict[str, dict[str, Any]] = {
    "host": {},
    "cached": {},
    "shared": {"volatile_db": {"type": "multi_process_hash_map", "shared_memory_size": 64 << 20}},
    "row_log": {"persistent_db": {"type": "row_log"}},
    "rocks_db": {"persistent_db": {"type": "rocks_db", "num_threads": 4}},
}
_FEW = {"type": "hash_map", "num_partitions": 1, "overflow_margin": 100, "initial_cache_rate": 0.05}


def _tiers(name: str, folder: Path) -> dict[str, Any]:
    top = {kind: dict(section) for kind, section in TIERS[name].items()}
    if "persistent_db" in top:  # most keys are asked there
        top["persistent_db"]["path"] = str(folder / "rows")
        top["volatile_db"] = _FEW
    elif "volatile_db" in top:
        top["volatile_db"]["shared_memory_name"] = f"hps_test_{uuid.uuid4().hex}"
        top["volatile_db"]["shared_memory_auto_remove"] = True
    return top


def main(folder: str, seconds: str, seed: str, name: str) -> None:
    """Prints the number of calls that had ended before."""
    path, chance = Path(folder), random.Random(seed)
    server = open_server(write_version(path, 0, tables=1), cached=name == "cached", **_tiers(name, path))
    calls, problems = [0] * 4, []

    def forever(number: int, call: Any) -> None:
        own = np.random.default_rng(number)
        try:
            while True:
                call(own.integers(0, KEYS, 3000))
                calls[number] += 1
        except Exception as problem:  # ClosedError, once the process ends
            problems.append(problem)

    def look_up(keys: np.ndarray) -> None:
        versions_of(keys, server.lookup(keys, MODEL, 0), "beside the end")

    def pool(keys: np.ndarray) -> None:
        server.lookup_pooled(keys, np.arange(0, len(keys) + 1, 10), MODEL, 0)

    def write(keys: np.ndarray) -> None:
        server.insert(keys[:500], rows_of(keys[:500], 1), MODEL, 0)

    for number, call in enumerate((look_up, look_up, pool, write)):
        threading.Thread(target=forever, args=(number, call), daemon=True).start()
    for _ in Clock(float(seconds) / 4, 1, lambda: problems or min(calls) > 2):
        time.sleep(chance.random() * 0.01)
    if problems:
        raise problems[0]
    print(sum(calls), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
