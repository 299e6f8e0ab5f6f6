"""P8: the time for a fresh process to import the package, and from its start to the answer of the first lookup.

``import hps_numba`` is timed within the process. The first lookup is timed from just before the start of the process, so that
the start of the interpreter is included, until the rows of a tiny model are returned. The stages of that time are measured in
separate processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from model import config_of, save_model
from report import add_options, child_environment, finish, print_machine, print_table, verdict

DIM, ROWS = 16, 1000
REPETITIONS, COLD_REPETITIONS = 11, 3
IMPORT_TARGET, FIRST_LOOKUP_TARGET = 0.5, 1.5

BARE = "import time; print(time.monotonic())"
IMPORT = "import time; start = time.monotonic(); import hps_numba; print(time.monotonic() - start)"
FIRST_LOOKUP = """
import sys, time
import hps_numba
server = hps_numba.HPS(sys.argv[1])
rows = server.lookup([int(key) for key in sys.argv[2:]], "m", 0)
done = time.monotonic()
assert rows.shape == (3, 16) and rows.all(), rows
print(done)
server.close()
"""

STAGES = """
import json, sys, time
start = time.monotonic()
seconds = {}
def ends(stage):
    global start
    now = time.monotonic()
    seconds[stage], start = now - start, now
import numpy
ends("import numpy")
import numba
ends("import numba")
import pydantic
ends("import pydantic")
import hps_numba
hps_numba.HPS
ends("import hps_numba, all of it")
hps_numba.read_config(sys.argv[1])
ends("read_config")
server = hps_numba.HPS(sys.argv[1])
ends("HPS(config): numba starts, kernels, model")
rows = server.lookup([int(key) for key in sys.argv[2:]], "m", 0)
ends("first lookup")
server.lookup([int(key) for key in sys.argv[2:]], "m", 0)
ends("second lookup")
assert rows.shape == (3, 16) and rows.all(), rows
print(json.dumps(seconds))
server.close()
"""


def output(program: str, cache: Path, *arguments: str) -> str:
    """The output of a fresh process."""
    environment = child_environment(HPS_NUMBA_CACHE_DIR=str(cache))
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout


def printed(program: str, cache: Path, *arguments: str) -> float:
    """The number printed by a fresh process."""
    return float(output(program, cache, *arguments))


def since_start(program: str, cache: Path, *arguments: str) -> float:
    """Seconds from the start of a process until the time that it prints; the monotonic clock is that of the system."""
    start = time.monotonic()
    return printed(program, cache, *arguments) - start


Seconds = dict[str, list[float]]


def kernels_in(cache: Path) -> int:
    """Number of files that a kernel cache keeps."""
    return sum(path.is_file() for path in cache.rglob("*"))


def measure(folder: Path, *, quick: bool) -> tuple[Seconds, Seconds, dict[str, int]]:
    """Seconds of every run, and of every stage of a warm start; and the number of files that first lookups found kept.

    Cold runs come first: the last of them fills the cache that the warm runs use.
    """
    repetitions, cold_repetitions = (1, 1) if quick else (REPETITIONS, COLD_REPETITIONS)
    keys = save_model(folder / "table.model", ROWS, DIM)
    config = folder / "ps.json"
    config.write_text(json.dumps(config_of(folder / "table.model", DIM)))
    arguments = [str(config), *map(str, keys[:3])]
    if not quick:
        printed(IMPORT, folder / "unused")  # compiles bytecode
    caches = [folder / f"cache{i}" for i in range(cold_repetitions)]
    found = {"first lookup, empty kernel cache": sum(map(kernels_in, caches))}
    cold = [since_start(FIRST_LOOKUP, cache, *arguments) for cache in caches]
    warm = caches[-1]
    found["first lookup, warm kernel cache"] = kernels_in(warm)
    if not quick:
        since_start(FIRST_LOOKUP, warm, *arguments)
    seconds: Seconds = {"python": [], "import hps_numba": [], "first lookup, warm kernel cache": []}
    stages: Seconds = {}
    for _ in range(repetitions):
        seconds["python"].append(since_start(BARE, warm))
        seconds["import hps_numba"].append(printed(IMPORT, warm))
        seconds["first lookup, warm kernel cache"].append(since_start(FIRST_LOOKUP, warm, *arguments))
        for stage, taken in json.loads(output(STAGES, warm, *arguments)).items():
            stages.setdefault(stage, []).append(taken)
    return {**seconds, "first lookup, empty kernel cache": cold}, stages, found


def show_stages(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    cells = [[stage, f"{taken:.4f}", f"{taken / total:.0%}"] for stage, taken in seconds.items()]
    print_table("Stages of a warm start, without the start of the interpreter", ["", "s", "share"], cells)


def main() -> None:
    options = add_options(argparse.ArgumentParser(description="Import and first lookup of a fresh process (P8).")).parse_args()
    print_machine("Start of a process (P8): medians", quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="hps_startup_") as name:
        seconds, stages, found = measure(Path(name), quick=options.quick)
    targets = {"import hps_numba": IMPORT_TARGET, "first lookup, warm kernel cache": FIRST_LOOKUP_TARGET}
    results, cells = [], []
    for what, times in seconds.items():
        middle, target = statistics.median(times), targets.get(what)
        share = f"{middle / target:.2f}" if target else ""
        judged = verdict(middle, at_most=target) if target else ""
        results.append({"name": what, "seconds": middle, "all": times, "target": judged})
        cells.append([what, f"{middle:.3f}", f"{min(times):.3f} .. {max(times):.3f}", str(len(times)), share, judged])
    print_table("Seconds", ["", "s", "range", "runs", "time / target", "target"], cells)
    middles = {stage: statistics.median(times) for stage, times in stages.items()}
    show_stages(middles)
    finish(options.json, quick=options.quick, results=results, stages=middles, kernels_found=found)


if __name__ == "__main__":
    main()
