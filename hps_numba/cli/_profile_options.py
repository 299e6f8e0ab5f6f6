"""The options of ``hps-numba profile``, and the equivalent options of HugeCTR's ``hps_profiler``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "MODES",
    "MOST_CALLS",
    "NEEDS_CACHE",
    "AllowCode",
    "Alpha",
    "Config",
    "DatabaseBackend",
    "Device",
    "Dim",
    "DistributionName",
    "EmbeddingCache",
    "Gpucacheper",
    "Histogram",
    "HotKeyCoverage",
    "HotKeyPercentage",
    "Iterations",
    "JsonFile",
    "KeysFile",
    "LookupSession",
    "Mode",
    "Model",
    "NumKeys",
    "RefreshEmbeddingcache",
    "Refreshes",
    "Rows",
    "Seed",
    "Table",
    "TableSize",
    "Threads",
    "WarmupIterations",
    "chosen_modes",
    "chosen_sizes",
]

MODES = ("session", "host", "cache", "refresh")
NEEDS_CACHE = ("cache", "refresh")
MOST_CALLS = 1_000_000_000

# what is measured
Config = Annotated[Path | None, typer.Option(help="A ps_config JSON file; by default, a table is generated.")]
Model = Annotated[str | None, typer.Option(help="Model of the config; by default, the first.")]
Table = Annotated[str | None, typer.Option(help="Name or number of its table; by default, the first.")]
Device = Annotated[int | None, typer.Option(min=0, help="Device number; by default, the first on which the model is deployed.")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="Permit the config to name Python code, which is run.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Rows of the generated table; by default 1,000,000.")]
Dim = Annotated[int | None, typer.Option(min=1, help="Floats in its rows; by default 32.")]
Gpucacheper = Annotated[float | None, typer.Option(min=0, max=1, help="Share of its rows in the GPU cache; by default 0.2.")]

# how it is measured
Mode = Annotated[list[str] | None, typer.Option(help=f"One or several, separated by commas, of {', '.join(MODES)}.")]
NumKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--num-keys", "--num_keys", "--num_key", help="Keys in a call, by default 1000; several sizes separated by commas."
    ),
]
Iterations = Annotated[int, typer.Option(min=1, max=MOST_CALLS, help="Timed calls of each thread.")]
WarmupIterations = Annotated[
    int,
    typer.Option(
        "--warmup-iterations", "--warmup_iterations", min=0, max=MOST_CALLS, help="Calls before them, which are not timed."
    ),
]
Refreshes = Annotated[int, typer.Option(min=1, max=MOST_CALLS, help="Timed calls in mode refresh.")]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="Threads that call at the same time.")]

# which keys
DistributionName = Annotated[str, typer.Option("--distribution", help="powerlaw, hotkey, histogram or uniform.")]
Alpha = Annotated[float, typer.Option(help="powerlaw: the larger, the more frequent are the first keys.")]
HotKeyPercentage = Annotated[
    float, typer.Option("--hot-key-percentage", "--hot_key_percentage", min=0, max=1, help="hotkey: share of hot keys.")
]
HotKeyCoverage = Annotated[
    float, typer.Option("--hot-key-coverage", "--hot_key_coverage", min=0, max=1, help="hotkey: probability of a hot key.")
]
Histogram = Annotated[str, typer.Option(help="histogram: weights of equal ranges of keys, or a file with them.")]
TableSize = Annotated[
    int | None,
    typer.Option("--table-size", "--table_size", min=1, help="Draw keys 0 to N - 1; by default, the keys of the table."),
]
KeysFile = Annotated[Path | None, typer.Option("--keys", help="Replay the keys of an .npy file instead of drawing keys.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the generated values and of the keys.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the report to FILE; - prints the report only.")
]

# modes as hps_profiler names them
LookupSession = Annotated[bool, typer.Option("--lookup_session", hidden=True)]
DatabaseBackend = Annotated[bool, typer.Option("--database_backend", hidden=True)]
EmbeddingCache = Annotated[bool, typer.Option("--embedding_cache", hidden=True)]
RefreshEmbeddingcache = Annotated[float, typer.Option("--refresh_embeddingcache", min=0, max=1, hidden=True)]


def chosen_modes(given: list[str] | None, flags: dict[str, bool]) -> tuple[str, ...]:
    """The modes to measure, each once, in the order of ``MODES``; session if none is given.

    Args:
        given: values of ``--mode``.
        flags: mode -> the option of ``hps_profiler`` for it is given.

    Raises:
        typer.BadParameter: an unknown mode.
    """
    chosen = {word.strip() for text in given or [] for word in text.lower().split(",")}
    if unknown := sorted(chosen - set(MODES)):
        raise typer.BadParameter(f"expected one of {', '.join(MODES)}, got {unknown[0]!r}", param_hint="--mode")
    chosen |= {mode for mode, is_given in flags.items() if is_given}
    return tuple(mode for mode in MODES if mode in chosen) or ("session",)


def chosen_sizes(given: list[str] | None) -> tuple[int, ...]:
    """The numbers of keys in a call, in the given order.

    Raises:
        typer.BadParameter: not whole numbers of 1 or more.
    """
    words = [word.strip() for text in given or ["1000"] for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 20 and int(word)):
            raise typer.BadParameter(f"expected a number of 1 or more, got {word!r}", param_hint="--num-keys")
    return tuple(int(word) for word in words)
