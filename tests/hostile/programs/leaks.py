"""Many tiny calls, servers and errors: no file, thread or memory is left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
from hostile.programs.world import MODEL, Clock, open_server, rows_of, write_version
from support.waiting import wait_until

from hps_numba import HpsError


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def main(folder: str, seconds: str, seed: str, cached: str) -> None:
    """Prints the number of calls."""
    sources = write_version(Path(folder), 0)
    server = open_server(sources, cached=cached == "cached")
    keys, calls = np.arange(5), 0

    def one_round() -> None:
        nonlocal calls
        for _ in range(100):
            server.lookup(keys, MODEL, 0)
            server.lookup_many([keys, keys], MODEL)
            server.lookup_pooled(keys, [0, 2, 5], MODEL, 1)
            server.insert(keys, rows_of(keys, 3), MODEL, 0)
            for wrong in (lambda: server.lookup(keys, "other", 0), lambda: server.lookup([1.5], MODEL, 0)):
                try:
                    wrong()
                except HpsError:
                    calls += 1
            calls += 5
        server.replace_model(MODEL, sources)
        with open_server(sources, cached=cached == "cached") as other:
            other.lookup(keys, MODEL, 0)

    for _ in range(5):
        one_round()
    gc.collect()
    before = (_files(), threading.active_count(), _resident())
    for _ in Clock(float(seconds), least=5):
        one_round()

    def nothing_is_left() -> bool:
        """Each round opens a server: what one leaves shows five times. A pool may still have grown by a thread or two."""
        gc.collect()
        grown = _files() - before[0], threading.active_count() - before[1], _resident() - before[2]
        sys.stderr.write(f"grown: {grown[0]} files, {grown[1]} threads, {grown[2] >> 10} KiB\n")
        return grown[0] <= 0 and grown[1] <= 2 and grown[2] < 24 << 20

    wait_until(nothing_is_left)  # threads of servers that were closed may still be ending
    server.close()
    print(calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
