"""Servers that are opened, let threads of the host gather what they miss, and are closed or dropped: nothing is left behind.

With a device they are on it, else in host memory.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
from hostile.programs.leaks import _files, _resident
from hostile.programs.world import KEYS, MODEL, Clock, open_server, versions_of, write_version
from support.gathering import small_batches_are_gathered, users_of_threads
from support.internals import served_table
from support.waiting import wait_until

from hps_numba import HPS
from hps_numba.device import driver

WARM_UP = 5


def _free_on_device() -> int:
    from hps_numba.device.memory import free_bytes

    return free_bytes(0) if driver.device_count() else 0


def _lookup(server: HPS, keys: np.ndarray, *, on_device: bool) -> np.ndarray:
    """Rows from the cache, which on a device answers for keys that are there."""
    if not on_device:
        return server.lookup(keys, MODEL, 0)
    import torch

    rows: np.ndarray = server.lookup(torch.from_numpy(keys).cuda(), MODEL, 0).cpu().numpy()
    return rows


def main(folder: str, seconds: str, seed: str) -> None:
    """Prints the number of servers; HPS_NUMBA_SERVERS is how many there are at least."""
    os.environ["HPS_NUMBA_HOST_SHARE"] = "0.7"
    small_batches_are_gathered()
    sources = write_version(Path(folder), 0, tables=1)
    random, opened = np.random.default_rng(int(seed)), 0
    on_device = driver.device_count() > 0

    def one_server() -> None:
        nonlocal opened
        server = open_server(sources, cached=True)
        (cache,) = served_table(server, model=MODEL).caches or ()
        assert cache.mirror_index(), "there is no copy of the index"
        for _ in range(3):
            keys = random.integers(0, KEYS, 500)
            versions_of(keys, _lookup(server, keys, on_device=on_device), "gathered")
        (table,) = server.stats()[MODEL].values()
        assert table.caches[0].helped == 3, table.caches[0]
        opened += 1
        if opened % 2:
            server.close()

    def counts() -> tuple[int, ...]:
        gc.collect()
        return _files(), threading.active_count(), len(users_of_threads()), _resident(), -_free_on_device()

    for _ in range(WARM_UP):
        one_server()
    before = counts()
    for _ in Clock(float(seconds), least=int(os.environ.get("HPS_NUMBA_SERVERS", "30"))):
        one_server()

    def nothing_is_left() -> bool:
        files, threads, users, resident, on_device = (now - then for now, then in zip(counts(), before))
        sys.stderr.write(f"{opened}: {files} files, {threads} threads, {users} users, {resident >> 10} KiB, {on_device} B\n")
        return files <= 0 and threads <= 2 and users <= 0 and resident < 24 << 20 and on_device <= 8 << 20

    wait_until(nothing_is_left)  # threads of servers that were closed may still be ending
    print(opened)


if __name__ == "__main__":
    main(*sys.argv[1:])
