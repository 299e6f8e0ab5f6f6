"""Readers, writers, erasures and replacements at once: no torn row, no row of another key, no stale row, no mixed version."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import KEYS, MODEL, Clock, open_server, rows_of, versions_of, write_version
from support.waiting import HANG_SECONDS

HALF = KEYS // 2  # writers change keys below it; the rest changes with the whole model alone
WRITERS, READERS = 2, 4


def main(folder: str, seconds: str, seed: str, cached: str) -> None:
    """Prints the number of rows that were checked."""
    path = Path(folder)
    sources = {version: write_version(path, version) for version in (0, 1)}
    replaces = int(seed) % 2 == 1
    server = open_server(sources[0], cached=cached == "cached")
    stop, problems, checked = threading.Event(), [], [0] * READERS
    #: version that every lookup must at least see, by key: set after the write returned; 0 while it is erased or replaced
    least = np.zeros(HALF, np.int64)
    #: changes of each key that take it back to an older version: counted up before they begin, after ``least`` was taken back
    resets = np.zeros(HALF, np.int64)

    def guarded(work: Any, number: int) -> None:
        try:
            chance = random.Random(f"{seed} {work.__name__} {number}")
            while not stop.is_set():
                work(number, chance)
        except BaseException as problem:
            problems.append(problem)
            stop.set()

    def write(number: int, chance: random.Random) -> None:
        mine = np.arange(number, HALF, WRITERS)
        keys = np.sort(np.array(chance.sample(mine.tolist(), chance.randint(1, 60))))
        if chance.random() < 0.1:
            least[keys] = -1
            resets[keys] += 1
            server.erase(keys, MODEL, 0)
            return
        version = int(least[keys].max()) + 2
        if version > 900:
            least[mine] = -1
            resets[mine] += 1
            server.insert(mine, rows_of(mine, 2), MODEL, 0)
            version = 3
        server.insert(keys, rows_of(keys, version), MODEL, 0)
        if not replaces:
            least[keys] = version

    def read(number: int, chance: random.Random) -> None:
        keys = np.array(chance.choices(range(KEYS), k=chance.choice([1, 8, 64, 600])))
        changing = keys < HALF
        resets_before = resets[keys[changing]]
        before = least[keys[changing]]
        form = chance.randrange(3)
        if form == 0:
            rows = server.lookup(keys, MODEL, 0)
        elif form == 1:
            rows, others = server.lookup_many([keys, keys], MODEL)
            of_others = versions_of(keys, others, "table 1")
            assert len(set(of_others.tolist())) == 1, "lookup_many: table 1 has two versions in one answer"
        else:
            rows = server.lookup_pooled(keys, np.arange(len(keys) + 1), MODEL, 0, combiner="sum")
        found = versions_of(keys, rows, "a lookup beside writes")
        still = set(found[~changing].tolist())
        assert len(still) <= 1, f"one answer has rows of versions {still}"
        if form == 1 and still:
            assert still == set(of_others.tolist()), "lookup_many: its tables are of two versions"
        stale = (found[changing] < before) & (resets[keys[changing]] == resets_before) & (before > 0)
        assert not stale.any(), f"{stale.sum()} rows are older than what insert had acknowledged"
        checked[number] += len(keys)

    threads = [threading.Thread(target=guarded, args=(write, n), daemon=True) for n in range(WRITERS)]
    threads += [threading.Thread(target=guarded, args=(read, n), daemon=True) for n in range(READERS)]
    for thread in threads:
        thread.start()
    chance, turn = random.Random(seed), 0
    for _ in Clock(float(seconds), 8, lambda: problems or sum(checked) > 1000):
        if problems:
            break
        if replaces:
            turn = 1 - turn
            server.replace_model(MODEL, sources[turn])
        else:
            server.refresh(MODEL)
            server.stats()
        stop.wait(chance.random() * 0.01)
    stop.set()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if problems:
        raise problems[0]
    server.close()
    print(sum(checked))


if __name__ == "__main__":
    main(*sys.argv[1:])
