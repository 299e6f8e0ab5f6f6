"""Writes a Triton model repository for the models of a config: a ``config.pbtxt`` and a ``model.py`` of three lines each.

Triton fixes the number of dimensions of an input, which our own front ends leave open. So a choice is made here:

* by default (``max_batch_size: 0``) ``KEYS`` and ``NUMKEYS`` have two, ``[1, n]``, as clients of HugeCTR send them; keys of a
  table have one, ``[n]``, so that bags can be pooled by offsets, or as many as ``key_dimensions`` says.
* with ``max_batch_size`` above 0, for ensembles that batch: every first dimension is that of samples. The wire form of ``KEYS``
  is the same; keys of a table are ``[samples, n]``, and bags cannot be pooled, as offsets are one more than samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hps_numba.config import ServerConfig
from hps_numba.config.messages import show
from hps_numba.config.schema import ModelConfig
from hps_numba.config.spec import TableSpec
from hps_numba.errors import ConfigError, UnknownModelError
from hps_numba.frontends.inference.tables import FLAT, KEYS, NUMKEYS, OFFSETS, WEIGHTS
from hps_numba.frontends.inference.tensors import TensorSpec
from hps_numba.frontends.triton.dense import PROGRAM, DenseProgram
from hps_numba.frontends.triton.pbtxt import Step, model_text
from hps_numba.runtime.replacing import file_judge

__all__ = ["RepositoryOptions", "write_repository"]

log = logging.getLogger(__name__)
_MODEL_PY = '''"""{what}; written by hps-numba triton-repository."""

from hps_numba.frontends.triton.{module} import TritonPythonModel  # noqa: F401
'''
_SHARED = "multi_process_hash_map"
_CONFIG = "config.pbtxt"
_MARK = b"# Written by hps-numba triton-repository.\n"
_judge = file_judge("one that hps-numba wrote", lambda head: head.startswith(_MARK))


@dataclass(frozen=True, kw_only=True)
class RepositoryOptions:
    """What goes into a repository, and how its models are opened.

    Attributes:
        models: of the config; empty: all.
        instances: processes of a model that answer at a time.
        refresh_interval, refresh_delay: seconds, instead of those of the config.
        freeze_sparse: a load leaves rows alone that tiers beyond the process have already.
        allow_code: the config may name Python code.
        max_batch_size: of Triton; 0: no dimension is that of samples.   key_dimensions: of the keys of each table.
        flat_only: the model has KEYS, NUMKEYS and OUTPUT0 alone, and none is optional, as HugeCTR's.
        dense: exported Torch programs by the name of the model whose rows they take; each gives an ensemble.
        overwrite: replace models that the repository has.

    Raises:
        ConfigError: a number is out of range.
    """

    models: tuple[str, ...] = ()
    instances: int = 1
    refresh_interval: float | None = None
    refresh_delay: float | None = None
    freeze_sparse: bool = False
    allow_code: bool = False
    max_batch_size: int = 0
    key_dimensions: int = 1
    flat_only: bool = False
    dense: Mapping[str, Path] = field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (("instances", 1, 1024), ("max_batch_size", 0, 2**31 - 1), ("key_dimensions", 1, 8)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, got {getattr(self, name)}")
        if self.max_batch_size and self.key_dimensions != 1:
            raise ConfigError(
                f"key_dimensions: expected 1 with max_batch_size, as that of samples comes first, got {self.key_dimensions}"
            )
        if self.flat_only and self.dense:
            raise ConfigError("flat_only: expected false with dense, which takes rows by the names of tables, got true")

    def parameters(self, ps: Path, model: str) -> dict[str, str]:
        """``parameters`` of a model, which ``settings.Settings`` reads."""
        given: dict[str, str] = {"ps": str(ps), "model": model}
        for name in ("refresh_interval", "refresh_delay"):
            if getattr(self, name) is not None:
                given[name] = f"{getattr(self, name):g}"
        for name in ("freeze_sparse", "allow_code"):
            if getattr(self, name):
                given[name] = "true"
        return given


def write_repository(config: ServerConfig, folder: Path, options: RepositoryOptions) -> list[str]:
    """Write a model for each model of a config, and an ensemble for each dense program.

    Args:
        config: read from a file, whose path the models get.   folder: the repository; made if missing.

    Returns:
        Names of the Triton models that were written.

    Raises:
        ConfigError: the config is of no file, a model is there already (with ``overwrite``, one that this did not write), a
            dense program does not fit its tables.
        UnknownModelError: the config has no such model.   OSError: the repository cannot be written.
    """
    if config.source is None:
        raise ConfigError("config: expected one that was read from a file, which Triton's processes read again")
    chosen = _chosen(config, options)
    written: dict[str, _Entry] = {}
    for model in chosen:
        entries = _entries(config, model, options)
        taken = [name for name in entries if name in written or (name != model.model and name in map(_name, chosen))]
        if taken:
            raise ConfigError(f"dense: {model.model}: expected no model of the name {taken[0]!r}, which it needs, got one")
        written.update(entries)
    clashes = [name for name in written if (folder / name).exists()]
    if clashes and not options.overwrite:
        raise ConfigError(f"{folder / clashes[0]}: expected no such folder, got one; pass overwrite=True to replace it")
    if options.instances > 1 and config.volatile_db.type != _SHARED:
        log.warning(
            "instances: each of the %d processes has rows of its own, as volatile_db.type is %r; %r shares them",
            options.instances,
            config.volatile_db.type,
            _SHARED,
        )
    for name in clashes:
        _check_ours(folder / name)
    for name, entry in written.items():
        entry.write(folder / name)
    return list(written)


def _check_ours(folder: Path) -> None:
    """Check that a folder of the repository was written by ``write_repository``, and is nobody else's model."""
    why = _judge(folder / _CONFIG) if folder.is_dir() else "is no folder"
    if why is None and not (folder / _CONFIG).exists() and any(folder.iterdir()):
        why = "is missing"
    if why is not None:
        raise ConfigError(f"{folder}: expected a model that hps-numba wrote, but {_CONFIG} {why}; move it away first")


def _name(model: ModelConfig) -> str:
    return model.model


def _chosen(config: ServerConfig, options: RepositoryOptions) -> list[ModelConfig]:
    known = {model.model: model for model in config.models}
    for name in (*options.models, *options.dense):
        if name not in known:
            raise UnknownModelError(f"model: expected one of {', '.join(known)}, got {show(name)}")
    return [known[name] for name in options.models or known]


@dataclass(frozen=True)
class _Entry:
    """One model of the repository: its config, the text of its ``model.py``, a program to copy."""

    config: str
    model_py: str = ""
    program: Path | None = None

    def write(self, folder: Path) -> None:
        version = folder / "1"
        version.mkdir(parents=True, exist_ok=True)
        if self.program is not None:
            _place(version / PROGRAM, self.program.read_bytes())
        if self.model_py:
            _place(version / "model.py", self.model_py.encode())
        elif (version / "model.py").exists():
            (version / "model.py").unlink()
        _place(folder / _CONFIG, _MARK + self.config.encode())


def _place(path: Path, content: bytes) -> None:
    """Write a file in one step, as a Triton that polls may read it at any moment."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)


def _entries(config: ServerConfig, model: ModelConfig, options: RepositoryOptions) -> dict[str, _Entry]:
    """The table set of a model and, with a dense program, that and the ensemble of both."""
    assert config.source is not None
    tables = model.tables(config.folder)
    reserved = [spec.name for spec in tables if spec.name in (KEYS, NUMKEYS, FLAT)]
    if reserved:
        raise ConfigError(f"{model.model}: table {reserved[0]!r}: expected another name, as a tensor of the protocol has it")
    program = DenseProgram(options.dense[model.model]) if model.model in options.dense else None
    fits = _fits(program, tables, options) if program is not None else {}
    inputs, outputs = _tensors(tables, options, fits)
    text = model_text(
        model.model,
        inputs,
        outputs,
        max_batch_size=options.max_batch_size,
        instances=options.instances,
        parameters=options.parameters(config.source, model.model),
    )
    entries = {model.model: _Entry(text, _MODEL_PY.format(what=f"Tables of {model.model}", module="model"))}
    if program is not None:
        entries |= _ensemble(model.model, program, options, fits, inputs)
    return entries


def _tensors(
    tables: Iterable[TableSpec], options: RepositoryOptions, fits: Mapping[str, _Fit]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    flat = (-1,) if options.max_batch_size else (-1, -1)
    optional = not options.flat_only
    inputs = [TensorSpec(KEYS, "INT64", flat, optional), TensorSpec(NUMKEYS, "INT32", flat, optional)]
    outputs = [TensorSpec(FLAT, "FP32", flat)]
    for spec in () if options.flat_only else tables:
        fit = fits.get(spec.name)
        keys = (-1,) * options.key_dimensions if fit is None else fit.keys
        inputs.append(TensorSpec(spec.name, "INT64", keys, True))
        if len(keys) == 1 and not options.max_batch_size:
            inputs.append(TensorSpec(spec.name + OFFSETS, "INT64", (-1,), True))
            inputs.append(TensorSpec(spec.name + WEIGHTS, "FP32", (-1,), True))
        outputs.append(TensorSpec(spec.name, "FP32", (*keys, spec.dim)))
    return inputs, outputs


# -- ensembles ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """An argument of a dense program that takes the rows of a table.

    Attributes:
        argument: its name.   keys: dimensions of the keys of these rows, as ``config.pbtxt`` has them.
    """

    argument: str
    keys: tuple[int, ...]


def _fits(program: DenseProgram, tables: Sequence[TableSpec], options: RepositoryOptions) -> dict[str, _Fit]:
    """By the name of a table, the argument of the same name; a ``-`` in a name of a table is a ``_`` in that of an argument."""
    arguments = {spec.name: spec for spec in program.inputs}
    fits = {}
    for table in tables:
        argument = arguments.get(table.name.replace("-", "_"))
        if argument is None:
            continue
        if argument.datatype != "FP32" or len(argument.shape) < 2 or argument.shape[-1] not in (-1, table.dim):
            raise ConfigError(
                f"dense: argument {argument.name}: expected FP32 rows [..., {table.dim}] of table {table.name}, "
                f"got {argument.datatype} {list(argument.shape)}"
            )
        fits[table.name] = _Fit(argument.name, _without_samples(argument, options).shape[:-1])
    if not fits:
        names = ", ".join(arguments)
        raise ConfigError(f"dense: expected an argument with the name of a table ({_names(tables)}), got {names}")
    return fits


def _names(tables: Iterable[TableSpec]) -> str:
    return ", ".join(table.name for table in tables)


def _without_samples(spec: TensorSpec, options: RepositoryOptions) -> TensorSpec:
    """A tensor as ``config.pbtxt`` has it: with ``max_batch_size``, the dimension of samples goes without saying."""
    if not options.max_batch_size:
        return spec
    if spec.shape[:1] != (-1,):
        raise ConfigError(f"dense: {spec.name}: expected any size of the first dimension, got shape {list(spec.shape)}")
    return replace(spec, shape=spec.shape[1:])


def _ensemble(
    model: str, program: DenseProgram, options: RepositoryOptions, fits: Mapping[str, _Fit], keys: Iterable[TensorSpec]
) -> dict[str, _Entry]:
    """``<model>_dense``, the program, and ``<model>_scores``, which takes keys and further arguments and gives its results."""
    dense_name, scores_name = f"{model}_dense", f"{model}_scores"
    inputs = [_without_samples(spec, options) for spec in program.inputs]
    outputs = [_without_samples(spec, options) for spec in program.outputs]
    rows = {fit.argument: f"{table}.rows" for table, fit in fits.items()}
    of_tables = [
        replace(spec, optional=spec.name not in fits)
        for spec in keys
        if spec.name.removesuffix(OFFSETS).removesuffix(WEIGHTS) in fits
    ]
    others = [spec for spec in inputs if spec.name not in rows]
    clash = [spec.name for spec in others if spec.name in {tensor.name for tensor in of_tables}]
    if clash:
        raise ConfigError(f"dense: argument {clash[0]}: expected another name, as an input of the ensemble has it")
    tables = Step(model, {spec.name: spec.name for spec in of_tables}, {table: f"{table}.rows" for table in fits})
    dense = Step(
        dense_name,
        {spec.name: rows.get(spec.name, spec.name) for spec in inputs},
        {spec.name: spec.name for spec in outputs},
    )
    size = options.max_batch_size
    return {
        dense_name: _Entry(
            model_text(dense_name, inputs, outputs, max_batch_size=size, instances=options.instances),
            _MODEL_PY.format(what=f"The dense part of {model}", module="dense"),
            options.dense[model],
        ),
        scores_name: _Entry(
            model_text(scores_name, [*of_tables, *others], outputs, max_batch_size=size, steps=(tables, dense))
        ),
    }
