"""Eight threads look up while one replaces the model 100 times and one upserts: no wrong row, no torn row, no deadlock."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
from support.internals import bytes_in_use, wait_for_release
from support.waiting import join_all, wait_until

import hps_numba

DIM, ROWS, THREADS, VERSIONS = 32, 3000, 8, 100
ROUNDS = 3
COLUMNS = np.arange(1, DIM, dtype=np.float32)


def rows_of(keys, version):
    """Element 0 is the version; the others follow from key and version, which a row of two mixed versions breaks."""
    rows = np.empty((len(keys), DIM), np.float32)
    rows[:, 0] = version
    rows[:, 1:] = np.asarray(keys, np.float32)[:, None] + version * COLUMNS
    return rows


def resident_bytes():
    """Memory of this process that is in RAM; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0


def is_whole(keys, rows):
    version = rows[:, :1]
    return np.array_equal(rows[:, 1:], np.asarray(keys, np.float32)[:, None] + version * COLUMNS)


def test_lookups_during_replacements_and_upserts_see_whole_rows(tmp_path):
    keys = np.arange(ROWS, dtype=np.int64)
    for number in range(2):
        hps_numba.write_model(tmp_path / f"v{number}", DIM, [(keys, rows_of(keys, number))])
    config = {
        "models": [
            {
                "model": "m",
                "sparse_files": [str(tmp_path / "v0")],
                "embedding_vecsize_per_table": [DIM],
                "maxnum_catfeature_query_per_table_per_sample": [10],
                "default_value_for_each_table": [0.0],
            }
        ]
    }
    server = hps_numba.HPS(config)
    in_use = bytes_in_use(server)
    for _ in range(ROUNDS):  # threads that stop at the wrong moment keep old versions: another round finds that memory again
        resident, version = resident_bytes(), server.stats()["m"]["sparse_embedding0"].version
        look_up_beside_changes(server, tmp_path)
        assert server.stats()["m"]["sparse_embedding0"].version == version + VERSIONS
        server.replace_model("m")  # once more, with no other thread
        assert np.array_equal(server.lookup(keys, "m", 0), rows_of(keys, 0))
        wait_for_release(server, in_use)
        grown = resident_bytes() - resident
        if grown < 48 << 20:
            break
    assert grown < 48 << 20, "each round takes more memory"
    server.close()
    wait_for_release(server, 0, headers=1)


def look_up_beside_changes(server, folder):
    """Lookups of eight threads beside upserts, while the model is replaced so many times."""
    stop, problems, lookups = threading.Event(), [], [0] * THREADS
    versions = {float(v) for v in range(2)} | {float(v) for v in range(1000, 2000)}

    def look_up(number):
        rng = np.random.default_rng(number)
        try:
            while not stop.is_set():
                some = rng.integers(0, ROWS, rng.integers(1, 2000))
                rows = server.lookup(some, "m", 0)
                assert is_whole(some, rows), "a torn or wrong row"
                assert set(np.unique(rows[:, 0]).tolist()) <= versions
                lookups[number] += 1
        except BaseException as problem:
            problems.append(problem)

    def upsert():
        rng = np.random.default_rng(99)
        try:
            while not stop.is_set():
                some = np.unique(rng.integers(0, ROWS, 200))
                server.insert(some, rows_of(some, int(rng.integers(1000, 2000))), "m", 0)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=look_up, args=(n,), daemon=True) for n in range(THREADS)]
    threads.append(threading.Thread(target=upsert, daemon=True))
    for thread in threads:
        thread.start()
    wait_until(lambda: min(lookups) > 0 or problems)  # kernels are compiled, and every thread is at work
    for number in range(VERSIONS):
        server.replace_model("m", [folder / f"v{(number + 1) % 2}"])
    stop.set()
    join_all(*threads)
    assert not problems
