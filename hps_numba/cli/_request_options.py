"""The options of ``hps-numba generate requests``: HugeCTR's ``request_generator``, or the model of a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from hps_numba.cli._profile_keys import Distribution
    from hps_numba.cli._request_files import InputNames, RequestTable

__all__ = [
    "Alpha",
    "BatchSize",
    "Config",
    "DenseDim",
    "DenseName",
    "Form",
    "HotKeyCoverage",
    "HotKeyPercentage",
    "Int64Key",
    "KeyDistribution",
    "Model",
    "NumBatch",
    "NumUniqueKeys",
    "OutputPath",
    "Powerlaw",
    "RequestCommand",
    "RowoffsetName",
    "SparseDims",
    "SparseName",
    "TableNames",
    "Weights",
    "as_truth",
    "check_key_bits",
    "checked_names",
    "chosen_form",
    "keys_of_request",
    "tables_of_config",
    "tables_of_options",
    "whole_numbers",
]

_TRUTH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_OPTIONAL_VALUES = ("--int64_key", "--int64-key", "--powerlaw")
_MOST, _MOST_KEYS = 1 << 31, 1 << 27

OutputPath = Annotated[Path, typer.Option("--output-path", "--output_path", metavar="FILE", help="The JSON file to write.")]
Form = Annotated[
    str | None,
    typer.Option(
        help="Inputs of a request: hugectr, flat (KEYS, NUMKEYS) or named; by default flat for a config, else hugectr."
    ),
]

# which tables
Config = Annotated[Path | None, typer.Option(help="A ps_config JSON file, whose tables and keys are requested.")]
Model = Annotated[str | None, typer.Option(help="Model of the config; by default, the first.")]
SparseDims = Annotated[
    str | None, typer.Option("--sparse-dims", "--sparse_dims", metavar="N,N", help="Keys of a sample in each table.")
]
NumUniqueKeys = Annotated[
    str | None,
    typer.Option("--num-unique-keys", "--num_unique_keys", metavar="N,N", help="Keys are drawn from 0 to N - 1 in each table."),
]
TableNames = Annotated[
    str | None, typer.Option("--table-names", metavar="A,B", help="named without a config: names of the tables.")
]
DenseDim = Annotated[
    int | None, typer.Option("--dense-dim", "--dense_dim", min=0, max=1 << 20, help="hugectr: dense features of a sample.")
]

# how much
NumBatch = Annotated[int, typer.Option("--num-batch", "--num_batch", min=1, max=1_000_000, help="Number of requests.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "--batch_size", min=1, max=1 << 24, help="Samples of a request.")]

# names of inputs
DenseName = Annotated[str, typer.Option("--dense-name", "--dense_name", help="hugectr: input of dense features.")]
SparseName = Annotated[str, typer.Option("--sparse-name", "--sparse_name", help="hugectr: input of keys.")]
RowoffsetName = Annotated[str, typer.Option("--rowoffset-name", "--rowoffset_name", help="hugectr: input of row offsets.")]

# which keys
Int64Key = Annotated[
    str, typer.Option("--int64-key", "--int64_key", metavar="[BOOL]", help="Keys may be of 64 bits; false: of 32 bits.")
]
Powerlaw = Annotated[
    str, typer.Option("--powerlaw", metavar="[BOOL]", help="Draw keys from a power law; false: from hot keys and others.")
]
KeyDistribution = Annotated[
    str | None, typer.Option("--distribution", help="powerlaw, hotkey, histogram or uniform, instead of --powerlaw.")
]
Alpha = Annotated[float, typer.Option(help="powerlaw: the larger, the more frequent are the first keys.")]
HotKeyPercentage = Annotated[
    float, typer.Option("--hot-key-percentage", "--hot_key_percentage", min=0, max=1, help="hotkey: share of hot keys.")
]
HotKeyCoverage = Annotated[
    float, typer.Option("--hot-key-coverage", "--hot_key_coverage", min=0, max=1, help="hotkey: probability of a hot key.")
]
Weights = Annotated[
    str, typer.Option("--weights", "--histogram", help="histogram: weights of equal ranges of keys, or a file.")
]


class RequestCommand(TyperCommand):
    """A command whose options of truth may be given with or without a value, as HugeCTR's: ``--powerlaw``, ``--powerlaw 0``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``true`` to an option of truth that comes without a value."""
        words: list[str] = []
        for word, after in zip(args, [*args[1:], ""], strict=True):
            words.append(word)
            if word in _OPTIONAL_VALUES and after.lower() not in _TRUTH:
                words.append("true")
        return super().parse_args(ctx, words)


def as_truth(option: str, word: str) -> bool:
    """``true`` or ``false``, also as 1, 0, yes, no, on, off.

    Raises:
        typer.BadParameter: another word.
    """
    if word.lower() not in _TRUTH:
        raise typer.BadParameter(f"expected true or false, got {word!r}", param_hint=option)
    return _TRUTH[word.lower()]


def chosen_form(form: str | None, config: Path | None, dense_dim: int | None, table_names: str | None) -> str:
    """The form of requests; by default, flat for a config.

    Raises:
        typer.BadParameter: an unknown form, or options that it does not have.
    """
    from hps_numba.cli._request_files import FORMS

    form = ("hugectr" if config is None else "flat") if form is None else form.lower()
    if form not in FORMS:
        raise typer.BadParameter(f"expected one of {', '.join(FORMS)}, got {form!r}", param_hint="--form")
    if form == "hugectr" and dense_dim is None:
        raise typer.BadParameter("expected a number (0: no dense input), got none", param_hint="--dense-dim")
    if form != "hugectr" and dense_dim:
        raise typer.BadParameter("is an option for --form hugectr only", param_hint="--dense-dim")
    if table_names is not None and (form != "named" or config is not None):
        raise typer.BadParameter("is an option for --form named without --config", param_hint="--table-names")
    return form


def checked_names(names: InputNames) -> InputNames:
    """``names``, which have to be different names.

    Raises:
        typer.BadParameter: they are not.
    """
    given = {"--dense-name": names.dense, "--sparse-name": names.keys, "--rowoffset-name": names.offsets}
    for option, name in given.items():
        if not name.strip() or not name.isprintable():
            raise typer.BadParameter(f"expected the name of an input, got {name!r}", param_hint=option)
        if list(given.values()).count(name) > 1:
            raise typer.BadParameter(f"expected a different name for each input, got {name!r} twice", param_hint=option)
    return names


def keys_of_request(tables: Sequence[RequestTable], samples: int) -> int:
    """Keys in a request of so many samples.

    Raises:
        typer.BadParameter: more than fit into a request.
    """
    keys = samples * sum(table.keys_of_sample for table in tables)
    if keys > _MOST_KEYS:
        raise typer.BadParameter(f"expected at most {_MOST_KEYS:,} keys in a request, got {keys:,}", param_hint="--batch-size")
    return keys


def check_key_bits(tables: Sequence[RequestTable], *, wide: bool) -> None:
    """Raise ``BadParameter`` if keys of 32 bits are wanted, and a table has others."""
    for table in tables:
        keys = table.keys.keys
        low, high = (0, table.keys.size - 1) if keys is None or not len(keys) else (int(keys.min()), int(keys.max()))
        if not wide and not (low >= -(1 << 31) and high < 1 << 31):
            what = f"expected keys of 32 bits in {table.name}, got {high if high >= 1 << 31 else low}"
            raise typer.BadParameter(what, param_hint="--int64-key")


def whole_numbers(option: str, text: str, *, least: int = 1, most: int = _MOST) -> tuple[int, ...]:
    """``2,26`` as numbers.

    Raises:
        typer.BadParameter: not whole numbers of ``least`` to ``most``.
    """
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if not (word.isascii() and word.isdigit() and len(word) < 20 and least <= int(word) <= most):
            raise typer.BadParameter(f"expected numbers of {least} to {most}, such as 2,26, got {text!r}", param_hint=option)
    return tuple(int(word) for word in words)


def tables_of_options(
    sparse_dims: str | None, num_unique_keys: str | None, names: str | None, drawn: Distribution, seed: int
) -> list[RequestTable]:
    """The tables that ``--sparse_dims`` and ``--num_unique_keys`` describe, with keys 0 .. n - 1.

    Raises:
        typer.BadParameter: one is missing, or they are not numbers of equally many tables.
    """
    from hps_numba.cli._profile_keys import DrawnKeys
    from hps_numba.cli._request_files import RequestTable

    for option, text in (("--sparse-dims", sparse_dims), ("--num-unique-keys", num_unique_keys)):
        if text is None:
            raise typer.BadParameter("expected a number for each table, or --config, got none", param_hint=option)
    dims = whole_numbers("--sparse-dims", sparse_dims or "")
    sizes = whole_numbers("--num-unique-keys", num_unique_keys or "", most=1 << 53)
    called = [f"table{number}" for number in range(len(dims))] if names is None else names.split(",")
    _check_count("--num-unique-keys", len(sizes), len(dims))
    _check_count("--table-names", len(called), len(dims))
    if len(set(called)) < len(called) or not all(called):
        raise typer.BadParameter(f"expected a different name for each table, got {names!r}", param_hint="--table-names")
    return [RequestTable(name, dim, DrawnKeys(drawn, n, seed)) for name, dim, n in zip(called, dims, sizes, strict=True)]


def tables_of_config(
    path: Path, model: str | None, sparse_dims: str | None, num_unique_keys: str | None, drawn: Distribution, seed: int
) -> list[RequestTable]:
    """The tables of a model of a config, with the keys of their sparse models, or 0 .. n - 1 with ``--num_unique_keys``.

    Raises:
        typer.BadParameter: numbers that are not for as many tables.
        ConfigError, UnknownModelError, ModelFileError: config, model or sparse models.
    """
    from hps_numba.cli._profile_keys import DrawnKeys
    from hps_numba.cli._profile_target import keys_of_model, model_of
    from hps_numba.cli._request_files import RequestTable
    from hps_numba.config import read_config

    config = read_config(path)
    chosen = model_of(config, model)
    specs = chosen.tables(config.folder)
    dims: Sequence[int] = chosen.maxnum_catfeature_query_per_table_per_sample
    if sparse_dims is not None:
        dims = whole_numbers("--sparse-dims", sparse_dims)
        _check_count("--sparse-dims", len(dims), len(specs))
    if num_unique_keys is None:
        populations: Sequence[Any] = [keys_of_model(spec) for spec in specs]
    else:
        populations = whole_numbers("--num-unique-keys", num_unique_keys, most=1 << 53)
        _check_count("--num-unique-keys", len(populations), len(specs))
    parts = zip(specs, dims, populations, strict=True)
    return [RequestTable(spec.name, dim, DrawnKeys(drawn, population, seed)) for spec, dim, population in parts]


def _check_count(option: str, got: int, tables: int) -> None:
    if got != tables:
        raise typer.BadParameter(f"expected one for each of the {tables} tables, got {got}", param_hint=option)
