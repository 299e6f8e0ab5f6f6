"""T1 to T5: the storage tiers. Each file of ``tier_parts`` measures one of them: its ``run(quick=...)`` prints tables.

A part whose server or package is missing is skipped with a line. If one fails, the others still run, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from report import TABLES, add_options, finish, print_machine

from hps_numba.errors import TierUnavailable

PARTS = Path(__file__).parent / "tier_parts"


def names_of(folder: Path) -> list[str]:
    """The parts in a folder."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))


def run_part(folder: Path, name: str, *, quick: bool) -> dict[str, Any]:
    """Run one part; its tables, and why it was skipped or failed."""
    first, started = len(TABLES), time.perf_counter()
    result: dict[str, Any] = {"name": name, "skipped": None, "failed": None}
    print(f"== {name}", flush=True)
    try:
        importlib.import_module(f"{folder.name}.{name}").run(quick=quick)
    except (TierUnavailable, ModuleNotFoundError, FileNotFoundError) as problem:
        result["skipped"] = f"{type(problem).__name__}: {problem}"
        print(f"skipped: {result['skipped']}\n", flush=True)
    except Exception as problem:
        result["failed"] = f"{type(problem).__name__}: {problem}"
        traceback.print_exc()
        print(f"FAILED: {result['failed']}\n", flush=True)
    return {**result, "seconds": time.perf_counter() - started, "tables": TABLES[first:]}


def main() -> int:
    parser = add_options(argparse.ArgumentParser(description="Rates and latencies of storage tiers."))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these parts only")
    parser.add_argument("--parts", type=Path, default=PARTS, metavar="FOLDER", help="the folder of the parts")
    options = parser.parse_args()
    folder = options.parts.resolve()
    known = names_of(folder)
    if unknown := sorted(set(options.only or ()) - set(known)):
        parser.error(f"--only: expected some of {', '.join(known) or 'no parts, as there are none'}, got {', '.join(unknown)}")
    sys.path.insert(0, str(folder.parent))
    print_machine("Storage tiers", quick=options.quick)
    results = [run_part(folder, name, quick=options.quick) for name in options.only or known]
    if not results:
        print(f"no parts in {folder}")
    finish(options.json, quick=options.quick, parts=results)
    return int(any(part["failed"] for part in results))


if __name__ == "__main__":
    sys.exit(main())
