"""Forks beside readers, a writer and first compilations: the child serves and closes, and the parent goes on."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import KEYS, MODEL, Clock, open_server, rows_of, versions_of, write_version
from support.waiting import HANG_SECONDS


def _in_child(server: Any, version: int) -> None:
    keys = np.arange(KEYS)
    versions_of(keys, server.lookup(keys, MODEL, 0), "in the child")
    server.lookup_many([keys[:50], keys[:70]], MODEL)
    server.insert(keys[:90], rows_of(keys[:90], version), MODEL, 1)
    found = versions_of(keys[:90], server.lookup(keys[:90], MODEL, 1), "written by the child")
    assert (found == version).all()
    server.close()


def main(folder: str, seconds: str, seed: str, cached: str) -> None:
    """Prints the number of forks."""
    chance = random.Random(int(seed))
    server = open_server(write_version(Path(folder), 0), cached=cached == "cached")
    stop, problems, forks = threading.Event(), [], 0

    def read() -> None:
        own = random.Random(threading.get_ident())
        try:
            while not stop.is_set():
                keys = np.array(own.choices(range(KEYS), k=own.choice([1, 40, 2000])))
                versions_of(keys, server.lookup(keys, MODEL, 0), "in the parent")
        except BaseException as problem:
            problems.append(problem)

    def write() -> None:
        version = 1
        try:
            while not stop.is_set():
                version = version % 900 + 1
                server.insert(np.arange(0, KEYS, 3), rows_of(np.arange(0, KEYS, 3), version), MODEL, 0)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, daemon=True) for work in (read, read, write)]
    for thread in threads:
        thread.start()
    for _ in Clock(float(seconds), least=3):
        time.sleep(chance.random() * 0.01)
        child = os.fork()
        if child == 0:
            signal.alarm(int(HANG_SECONDS))  # ends a child that hangs
            status = 1
            try:
                _in_child(server, 950)
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, f"a child ended with {status}"
        assert not problems, problems
        forks += 1
    stop.set()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not problems and not any(thread.is_alive() for thread in threads)
    server.close()
    print(forks)


if __name__ == "__main__":
    main(*sys.argv[1:])
