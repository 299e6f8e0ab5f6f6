"""Signal handlers that call the server in the middle of its own operations: refused or done, and never wrong rows."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import KEYS, MODEL, Clock, open_server, rows_of, some_keys, versions_of, write_version

from hps_numba import HpsError


def main(folder: str, seconds: str, seed: str, cached: str) -> None:
    """Prints the number of calls that handlers made."""
    chance, sources = random.Random(int(seed)), write_version(Path(folder), 0)
    server = open_server(sources, cached=cached == "cached")
    calls = 0
    inside = random.Random(seed + "handler")
    closes = False

    def ring(*_: Any) -> None:
        nonlocal calls
        calls += 1
        keys = some_keys(inside, 50)
        try:
            if closes:
                server.close()
                return
            what = inside.randrange(5)
            if what == 0:
                versions_of(keys, server.lookup(keys, MODEL, 0), "in a handler")
            elif what == 1:
                server.insert(keys, rows_of(keys, 500), MODEL, 0)
            elif what == 2:
                server.erase(keys, MODEL, 0)
            elif what == 3:
                server.stats()
            else:
                server.refresh(MODEL)
        except HpsError:
            pass  # refused

    signal.signal(signal.SIGALRM, ring)
    everything = np.arange(KEYS + KEYS // 10)
    for _ in Clock(float(seconds), enough=lambda: calls):
        keys, version = some_keys(chance), chance.randint(1, 400)
        signal.setitimer(signal.ITIMER_REAL, chance.choice([2e-5, 1e-4, 1e-3]) * (1e-3 + chance.random()))
        what = chance.randrange(5)
        try:
            if what == 0:
                server.insert(keys, rows_of(keys, version), MODEL, 0)
            elif what == 1:
                server.erase(keys, MODEL, 0)
            elif what == 2:
                versions_of(np.tile(everything, 20), server.lookup(np.tile(everything, 20), MODEL, 0), "beside a handler")
            elif what == 3:
                server.replace_model(MODEL, sources)
            else:
                server.refresh(MODEL)
        except HpsError:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        found = versions_of(everything, server.lookup(everything, MODEL, 0), "after a handler")
        stored = versions_of(everything, server.lookup(everything, MODEL, 0, None), "past the cache")
        assert np.array_equal(found, stored)
        if chance.random() < 0.05:  # a handler that closes the server
            closes = True
            signal.setitimer(signal.ITIMER_REAL, 1e-6 + chance.random() * 2e-3)
            try:
                for _ in range(30):
                    server.insert(everything, rows_of(everything, 7), MODEL, 0)
                    server.lookup(everything, MODEL, 0)
            except HpsError:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            closes = False
            server.close()
            server = open_server(sources, cached=cached == "cached")
    server.close()
    print(calls)


if __name__ == "__main__":
    main(*sys.argv[1:])
