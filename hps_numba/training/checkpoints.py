"""Checkpoints of trained tables: their rows together with the optimizer states, as of one moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from hps_numba.errors import ConfigError
from hps_numba.storage.urls import place_of
from hps_numba.training.checkpoint_files import CheckpointReader, Read, SavedTable, open_checkpoint, write_checkpoint
from hps_numba.training.replacement import TableContent, replace_tables
from hps_numba.training.trainer import RowTrainer

__all__ = ["load_trained", "save_trained"]


def save_trained(
    path: str | os.PathLike[str], trainers: Sequence[RowTrainer], extra: Callable[[], Mapping[str, bytes]] = dict
) -> int:
    """Write a checkpoint, replacing the file at ``path``; returns how many rows it has.

    Lookups go on meanwhile; steps and other writes to the tables wait, so that rows and states of all of them are consistent.

    Args:
        extra: returns more members of the file; called while steps wait.

    Raises:
        ModelFileError: it cannot be written, or there is something else than a checkpoint; what is there is left as it was.
        Otherwise as ``HPS.locked_table``.
    """
    target = place_of(path)
    with ExitStack() as locks:
        ordered = _in_order(trainers)
        for trainer in ordered:
            locks.enter_context(trainer.paused())
        locked = {trainer.spec.tag: locks.enter_context(_locked_table(trainer)) for trainer in ordered}
        tables = [_saved(trainer, *locked[trainer.spec.tag]) for trainer in trainers]
        write_checkpoint(target, tables, extra())
    return sum(len(table.keys) for table in tables)


def _locked_table(trainer: RowTrainer) -> AbstractContextManager[tuple[np.ndarray, Read]]:
    return trainer.server.locked_table(trainer.spec.model, trainer.spec.name)


def _saved(trainer: RowTrainer, keys: np.ndarray, rows: Read) -> SavedTable:
    about = {**_identity(trainer), "steps": trainer.steps}
    states = (trainer.state_keys(), trainer.state_width, trainer.read_states)
    return SavedTable(about, keys, trainer.spec.dim, rows, *states)


def _identity(trainer: RowTrainer) -> dict[str, Any]:
    """What has to agree between a checkpoint and the trainer that loads it."""
    return {"model": trainer.spec.model, "table": trainer.spec.name, "optimizer": trainer.rule.name}


def load_trained(
    path: str | os.PathLike[str],
    trainers: Sequence[RowTrainer],
    accept: Callable[[CheckpointReader], Any] = lambda _: None,
    then: Callable[[Any], None] = lambda _: None,
) -> Any:
    """Bring tables and optimizers to the state of a checkpoint; rows that it lacks are erased. Returns what ``accept`` did.

    The whole file is checked before anything changes; if a tier fails or an interrupt comes later, the old rows are written
    back and the optimizers keep their states.

    Args:
        trainers: of the tables, in the order in which they were saved.
        accept: inspects the file before anything changes, and may raise.
        then: takes what ``accept`` returned, once all rows are written; if it raises, they are taken back.

    Raises:
        ModelFileError: the file is missing or damaged.   ConfigError: it has other tables, optimizers or widths.
        Otherwise as ``replace_tables``.
    """
    with open_checkpoint(place_of(path)) as file, ExitStack() as held:
        _check(file, trainers)
        answer = accept(file)
        for trainer in _in_order(trainers):
            held.enter_context(trainer.paused())
        made = [trainer.made_states(file.states(number)) for number, trainer in enumerate(trainers)]

        def finish() -> None:
            then(answer)
            for trainer, about, states in zip(trainers, file.tables, made, strict=True):
                trainer.take_states(about["steps"], states)

        replace_tables([_content(file, number, trainer) for number, trainer in enumerate(trainers)], finish)
        return answer


def _content(file: CheckpointReader, number: int, trainer: RowTrainer) -> TableContent:
    return TableContent(trainer.server, trainer.spec.model, trainer.spec.name, file.keys(number), file.rows(number))


def _in_order(trainers: Sequence[RowTrainer]) -> list[RowTrainer]:
    """The same in every thread, so that none deadlock."""
    return sorted(trainers, key=lambda trainer: trainer.spec.tag)


def _check(file: CheckpointReader, trainers: Sequence[RowTrainer]) -> None:
    expected = [_identity(trainer) for trainer in trainers]
    found = [{name: about.get(name) for name in ("model", "table", "optimizer")} for about in file.tables]
    if found != expected:
        raise ConfigError(f"{file.path}: expected tables {expected}, got {found}")
    for number, trainer in enumerate(trainers):
        dim = file.shape(number, "emb_vector")[1]
        if dim != trainer.spec.dim:
            raise ConfigError(f"{file.path}: expected rows of {trainer.spec.dim} elements for {trainer.spec.tag}, got {dim}")
        try:
            trainer.check_states(file.shape(number, "state_key")[0], file.shape(number, "state"))
        except ConfigError as problem:
            raise ConfigError(f"{file.path}: {problem}") from None
        _check_keys(file, number, trainer)


def _check_keys(file: CheckpointReader, number: int, trainer: RowTrainer) -> None:
    """A key that the server cannot hold would be found only after other rows were replaced."""
    if trainer.server.direct.key_bits == 64:
        return
    keys = file.keys(number)
    wrong = keys[(keys < 0) | (keys >= 1 << 32)]
    if len(wrong):
        expected = f"keys of {trainer.spec.tag} in 0..{(1 << 32) - 1}, as supportlonglong is false"
        raise ConfigError(f"{file.path}: expected {expected}, got {wrong[0]}")
