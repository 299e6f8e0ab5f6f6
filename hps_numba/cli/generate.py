"""``hps-numba generate``: synthetic models, key streams and requests (checklist O03, O04, O05)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hps_numba.cli import _request_options as options
from hps_numba.cli._models import Overwrite, WriteFormat, counted, describe, size_on_disk
from hps_numba.cli._output import AsJson, human_seconds, print_json
from hps_numba.errors import ModelFileError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PLUGIN"]

PLUGIN = typer.Typer(no_args_is_help=True, help="Generate synthetic models, keys and requests.")

Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal content.")]
_DISTRIBUTIONS = ("power-law", "hot-key", "histogram", "uniform")
_KEYS_AT_ONCE = 1 << 20


@PLUGIN.command("model")
def model(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The name decides the format (.h5: HDF5, else a directory).")],
    rows: Annotated[int, typer.Option(min=0, help="Rows, with keys 0 to ROWS - 1.")],
    dim: Annotated[int, typer.Option(min=1, help="Floats in a row.")],
    seed: Seed = 0,
    format: WriteFormat = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Generate a synthetic sparse model.

    The keys are 0, 1, 2, ...; the values are float32, uniform in [-1, 1).
    """
    from hps_numba.runtime.progress import rows_progress
    from hps_numba.simulate.workloads import generate_model

    started = time.perf_counter()
    with rows_progress(rows) as advance:
        on_progress = counted(advance, "generating")
        generate_model(path, rows, dim, seed=seed, format=format, overwrite=overwrite, on_progress=on_progress)
    seconds = time.perf_counter() - started
    if as_json:
        print_json({"path": path, "rows": rows, "dim": dim, "seed": seed, "bytes": size_on_disk(path), "seconds": seconds})
    else:
        typer.echo(f"{describe(path, rows, dim)}, generated in {human_seconds(seconds)}")


@PLUGIN.command("keys")
def keys(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The .npy file to write: int64, one dimension.")],
    count: Annotated[int, typer.Option(min=0, help="Number of keys.")],
    table_size: Annotated[int, typer.Option(min=1, help="Keys are drawn from 0 to TABLE_SIZE - 1.")],
    distribution: Annotated[str, typer.Option(help=f"One of {', '.join(_DISTRIBUTIONS)}.")] = "power-law",
    alpha: Annotated[float, typer.Option(help="power-law: the larger, the more frequent are small keys.")] = 1.2,
    hot_percentage: Annotated[float, typer.Option(min=0, max=1, help="hot-key: share of keys that are hot.")] = 0.2,
    hot_coverage: Annotated[float, typer.Option(min=0, max=1, help="hot-key: probability of a hot key.")] = 0.8,
    weights: Annotated[str, typer.Option(help="histogram: weights of equal ranges of keys.")] = "0.4,0.3,0.2,0.1",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Draw a stream of keys and write it to an .npy file.

    The distributions are those of HugeCTR's profiler.
    """
    name = distribution.lower().replace("_", "-")
    name = {"powerlaw": "power-law", "hotkey": "hot-key"}.get(name, name)
    arguments: dict[str, dict[str, Any]] = {
        "power-law": {"alpha": alpha},
        "hot-key": {"percentage": hot_percentage, "coverage": hot_coverage},
        "histogram": {"weights": _numbers(weights)},
        "uniform": {},
    }
    if name not in arguments:
        what = f"expected one of {', '.join(_DISTRIBUTIONS)}, got {distribution!r}"
        raise typer.BadParameter(what, param_hint="--distribution")
    _write_keys(path, count, _drawn(name, table_size, count, arguments[name], seed), overwrite)
    if as_json:
        facts = {"path": path, "count": count, "table_size": table_size, "distribution": name, **arguments[name], "seed": seed}
        print_json(facts)
    else:
        typer.echo(f"{path}: {count:,} keys of 0 .. {table_size - 1:,}, {name}")


@PLUGIN.command("requests", cls=options.RequestCommand)
def requests(
    output_path: options.OutputPath,
    form: options.Form = None,
    config: options.Config = None,
    model: options.Model = None,
    dense_dim: options.DenseDim = None,
    sparse_dims: options.SparseDims = None,
    num_unique_keys: options.NumUniqueKeys = None,
    table_names: options.TableNames = None,
    num_batch: options.NumBatch = 10,
    batch_size: options.BatchSize = 64,
    int64_key: options.Int64Key = "true",
    powerlaw: options.Powerlaw = "false",
    distribution: options.KeyDistribution = None,
    alpha: options.Alpha = 1.2,
    hot_key_percentage: options.HotKeyPercentage = 0.2,
    hot_key_coverage: options.HotKeyCoverage = 0.8,
    weights: options.Weights = "0.4,0.3,0.2,0.1",
    dense_name: options.DenseName = "DES",
    sparse_name: options.SparseName = "CATCOLUMN",
    rowoffset_name: options.RowoffsetName = "ROWINDEX",
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write inference requests in the JSON form of Triton's Perf Analyzer.

    With --config, for the tables of a model that is served; without, as HugeCTR's request_generator, for tables with so many
    keys of a sample (--sparse-dims) out of so many (--num-unique-keys).
    """
    from hps_numba.cli._profile_keys import chosen_distribution
    from hps_numba.cli._request_files import DenseInput, InputNames, requests_of, write_requests

    form = options.chosen_form(form, config, dense_dim, table_names)
    name = distribution or ("powerlaw" if options.as_truth("--powerlaw", powerlaw) else "hotkey")
    drawn = chosen_distribution(name, alpha=alpha, percentage=hot_key_percentage, coverage=hot_key_coverage, weights=weights)
    if config is None:
        if model is not None:
            raise typer.BadParameter("is an option for --config only", param_hint="--model")
        tables = options.tables_of_options(sparse_dims, num_unique_keys, table_names, drawn, seed)
    else:
        tables = options.tables_of_config(config, model, sparse_dims, num_unique_keys, drawn, seed)
    options.check_key_bits(tables, wide=options.as_truth("--int64-key", int64_key))
    dense = DenseInput(dense_dim, seed) if dense_dim else None
    names = options.checked_names(InputNames(dense_name, sparse_name, rowoffset_name))
    keys = options.keys_of_request(tables, batch_size)
    made = requests_of(form, tables, samples=batch_size, count=num_batch, dense=dense, names=names)
    size = write_requests(output_path, made, overwrite=overwrite)
    if as_json:
        shapes = {table.name: {"keys_of_sample": table.keys_of_sample, **table.keys.facts()} for table in tables}
        facts = {"path": output_path, "form": form, "requests": num_batch, "samples": batch_size, "keys": keys}
        print_json({**facts, "bytes": size, "seed": seed, "tables": shapes})
    else:
        typer.echo(f"{output_path}: {num_batch:,} requests of {batch_size:,} samples and {keys:,} keys, {form}, {drawn.name}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 0.4,0.3,0.2,0.1, got {text!r}", param_hint="--weights") from None


def _drawn(name: str, n: int, count: int, options: dict[str, Any], seed: int) -> Iterator[np.ndarray]:
    import numpy as np

    from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS

    draw, rng = KEY_DISTRIBUTIONS[name.replace("-", "")], np.random.default_rng(seed)
    try:
        for start in range(0, max(count, 1), _KEYS_AT_ONCE):
            yield draw(n, min(_KEYS_AT_ONCE, count - start), rng=rng, **options)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None


def _write_keys(path: Path, count: int, chunks: Iterator[np.ndarray], overwrite: bool) -> None:
    """Write an .npy file of ``count`` int64 keys, which appears only when it is complete."""
    import numpy as np

    from hps_numba.runtime.paths import check_room
    from hps_numba.runtime.replacing import file_judge, replacing

    if path.is_dir():
        raise ModelFileError(f"{path}: expected the name of an .npy file, got a directory")
    check_room(path, 8 * count)
    judge = file_judge("an .npy file", lambda head: head.startswith(b"\x93NUMPY"))
    with replacing(path, overwrite=overwrite, judge=judge) as new, new.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        for chunk in chunks:
            file.write(chunk.astype("<i8", copy=False).data)
