"""Ctrl-C at random moments of every operation: then rows are old or new, cache and store agree, and everything goes on."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import DIM, KEYS, MODEL, Clock, open_server, rows_of, some_keys, versions_of, write_version

_armed = False


def _ring(*_: Any) -> None:
    global _armed
    if _armed:
        _armed = False
        raise KeyboardInterrupt


def _interrupted(operation: Any, delay: float) -> bool:
    global _armed
    try:
        try:
            _armed = True
            signal.setitimer(signal.ITIMER_REAL, delay)
            operation()
        finally:
            _armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    return False


def main(folder: str, seconds: str, seed: str, cached: str) -> None:
    """Prints the number of interrupts."""
    chance, path = random.Random(int(seed)), Path(folder)
    sources = {version: write_version(path, version) for version in (0, 1)}
    server = open_server(sources[0], cached=cached == "cached")
    allowed = [[{0} for _ in range(KEYS + KEYS // 10)] for _ in range(2)]  # versions that a row may have; -1: none
    for table in allowed:
        table[KEYS:] = [{-1} for _ in table[KEYS:]]
    signal.signal(signal.SIGALRM, _ring)
    count, versions = 0, 10

    def check() -> None:
        everything = np.arange(KEYS + KEYS // 10)
        answers = server.lookup_many([everything, everything], MODEL)
        for table, rows in enumerate(answers):
            found = versions_of(everything, rows, "after an interrupt")
            again = versions_of(everything, server.lookup(everything, MODEL, table), "looked up again")
            stored = versions_of(everything, server.lookup(everything, MODEL, table, None), "past the cache")
            assert np.array_equal(found, again) and np.array_equal(found, stored), "cache and store differ"
            for key, version in enumerate(found.tolist()):
                assert version in allowed[table][key], (table, key, version, allowed[table][key])
                allowed[table][key] = {version}

    for _ in Clock(float(seconds), enough=lambda: count):
        table, keys = chance.randrange(2), some_keys(chance)
        versions = versions + 1 if versions < 990 else 10
        new = rows_of(keys, versions)
        out = np.empty((len(keys), DIM), np.float32)
        kind = chance.choice(["lookup", "many", "pooled", "insert", "update", "erase", "refresh", "replace", "stats", "policy"])
        whole = 0 if kind != "replace" else chance.randrange(2)
        operations = {
            "lookup": lambda: server.lookup(keys, MODEL, table, out=out),
            "many": lambda: server.lookup_many([keys, keys], MODEL),
            "pooled": lambda: server.lookup_pooled(keys, [0, len(keys)], MODEL, table),
            "insert": lambda: server.insert(keys, new, MODEL, table),
            "update": lambda: server.update(keys, new, MODEL, table),
            "erase": lambda: server.erase(keys, MODEL, table),
            "refresh": lambda: server.refresh(MODEL),
            "replace": lambda: server.replace_model(MODEL, sources[whole]),
            "stats": lambda: (server.stats(), server.plan()),
            "policy": lambda: server.set_policy(chance.choice(["lru", "lfu"]), MODEL) if cached == "cached" else server.stats(),
        }
        stopped = _interrupted(operations[kind], chance.choice([2e-5, 1e-4, 5e-4, 3e-3, 2e-2]) * chance.random())
        count += stopped
        if kind == "replace":
            before = None if not stopped else [list(states) for states in allowed]
            fresh = [{whole}] * KEYS + [{-1}] * (KEYS // 10)
            everything = np.arange(KEYS + KEYS // 10)
            shown = [
                versions_of(everything, rows, "after a replacement") for rows in server.lookup_many([everything] * 2, MODEL)
            ]
            if not stopped or all((rows[:KEYS] == whole).all() and (rows[KEYS:] == -1).all() for rows in shown):
                allowed = [[set(states) for states in fresh] for _ in range(2)]
            else:
                assert before is not None
                allowed = [list(states) for states in before]  # none of the tables was replaced
        elif kind in ("insert", "update", "erase"):
            for key in keys.tolist():
                states = allowed[table][key]
                present = states - {-1}
                after = {-1} if kind == "erase" else {versions} if kind == "insert" or present else set()
                if kind == "update" and -1 in states:
                    after = after | {-1}
                allowed[table][key] = states | after if stopped else after
        check()
    server.close()
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
