"""P8: how long a fresh process takes to import the package, and from its start to the first lookup answered.

``import hps_numba`` is timed within the process. The first lookup is timed from just before the process is started, so that
the interpreter's own start counts, to just after the rows of a tiny model came back. Where that time goes is timed in processes
of their own, a stage after the other.
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
REPETITIONS, QUICK_REPETITIONS = 11, 1
COLD_REPETITIONS, QUICK_COLD_REPETITIONS = 3, 1
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
ends("HPS(config): numba wakes, kernels, model")
rows = server.lookup([int(key) for key in sys.argv[2:]], "m", 0)
ends("first lookup")
server.lookup([int(key) for key in sys.argv[2:]], "m", 0)
ends("second lookup")
assert rows.shape == (3, 16) and rows.all(), rows
print(json.dumps(seconds))
server.close()
"""


def output(program: str, cache: Path, *arguments: str) -> str:
    """What a fresh process prints."""
    environment = child_environment(HPS_NUMBA_CACHE_DIR=str(cache))
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout


def printed(program: str, cache: Path, *arguments: str) -> float:
    """The number that a fresh process prints."""
    return float(output(program, cache, *arguments))


def since_start(program: str, cache: Path, *arguments: str) -> float:
    """Seconds from the start of a process to the moment that it prints; the monotonic clock is the system's."""
    start = time.monotonic()
    return printed(program, cache, *arguments) - start


Seconds = dict[str, list[float]]


def measure(place: Path, *, repetitions: int, cold_repetitions: int) -> tuple[Seconds, Seconds]:
    """Seconds of every run, and of every stage of a warm start.

    Cold runs come first: the last of them leaves the cache that the warm runs use.
    """
    keys = save_model(place / "table.model", ROWS, DIM)
    config = place / "ps.json"
    config.write_text(json.dumps(config_of(place / "table.model", DIM)))
    arguments = [str(config), *map(str, keys[:3])]
    printed(IMPORT, place / "unused")  # bytecode
    caches = [place / f"cache{i}" for i in range(cold_repetitions)]
    cold = [since_start(FIRST_LOOKUP, cache, *arguments) for cache in caches]
    warm = caches[-1]
    since_start(FIRST_LOOKUP, warm, *arguments)
    seconds: Seconds = {"python": [], "import hps_numba": [], "first lookup, warm kernel cache": []}
    stages: Seconds = {}
    for _ in range(repetitions):
        seconds["python"].append(since_start(BARE, warm))
        seconds["import hps_numba"].append(printed(IMPORT, warm))
        seconds["first lookup, warm kernel cache"].append(since_start(FIRST_LOOKUP, warm, *arguments))
        for stage, taken in json.loads(output(STAGES, warm, *arguments)).items():
            stages.setdefault(stage, []).append(taken)
    return {**seconds, "first lookup, empty kernel cache": cold}, stages


def show_stages(seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    cells = [[stage, f"{taken:.4f}", f"{taken / total:.0%}"] for stage, taken in seconds.items()]
    print_table("A warm start by stages, the interpreter's own start left out", ["", "s", "share"], cells)


def main() -> None:
    options = add_options(argparse.ArgumentParser(description="Import and first lookup of a fresh process (P8).")).parse_args()
    repetitions = QUICK_REPETITIONS if options.quick else REPETITIONS
    cold_repetitions = QUICK_COLD_REPETITIONS if options.quick else COLD_REPETITIONS
    print_machine("Start of a process (P8): medians", quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="hps_startup_") as name:
        seconds, stages = measure(Path(name), repetitions=repetitions, cold_repetitions=cold_repetitions)
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
    finish(options.json, quick=options.quick, results=results, stages=middles)


if __name__ == "__main__":
    main()
