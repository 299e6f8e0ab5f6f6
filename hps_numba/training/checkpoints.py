"""Save what was trained: the rows of tables together with what their optimizers remember, as they are at one moment."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hps_numba.errors import ConfigError
from hps_numba.server.hps import HPS
from hps_numba.training.checkpoint_files import CheckpointReader, SavedTable, open_checkpoint, write_checkpoint
from hps_numba.training.trainer import RowTrainer

__all__ = ["load_trained", "save_trained", "set_rows"]

Read = Callable[[np.ndarray], np.ndarray]


def save_trained(
    path: str | os.PathLike[str], trainers: Sequence[RowTrainer], extra: Callable[[], Mapping[str, bytes]] = dict
) -> int:
    """Write a checkpoint in the place of the one at ``path``; returns how many rows it has.

    Lookups go on meanwhile; steps and other writes to the tables wait, so that rows and states of all of them fit together.

    Args:
        extra: gives more members of the file, while steps wait.

    Raises:
        ModelFileError: it cannot be written; an older one is as it was.   Otherwise as ``HPS.locked_table``.
    """
    with ExitStack() as waiting:
        order = sorted(trainers, key=lambda one: one.spec.tag)  # of all who save, so that none waits for another in a circle
        for trainer in order:
            waiting.enter_context(trainer.holding())
        held = {trainer.spec.tag: waiting.enter_context(_held(trainer)) for trainer in order}
        tables = [_saved(trainer, *held[trainer.spec.tag]) for trainer in trainers]
        write_checkpoint(Path(path), tables, extra())
    return sum(len(table.keys) for table in tables)


def _held(trainer: RowTrainer) -> AbstractContextManager[tuple[np.ndarray, Read]]:
    return trainer.server.locked_table(trainer.spec.model, trainer.spec.name)


def _saved(trainer: RowTrainer, keys: np.ndarray, rows: Read) -> SavedTable:
    about = {**_names(trainer), "steps": trainer.steps}
    states = (trainer.state_keys(), trainer.state_width, trainer.read_states)
    return SavedTable(about, keys, trainer.spec.dim, rows, *states)


def _names(trainer: RowTrainer) -> dict[str, Any]:
    return {"model": trainer.spec.model, "table": trainer.spec.name, "optimizer": trainer.rule.name}


def load_trained(
    path: str | os.PathLike[str], trainers: Sequence[RowTrainer], accept: Callable[[CheckpointReader], Any] = lambda _: None
) -> Any:
    """Bring tables and optimizers to what a checkpoint holds; rows that it lacks leave the tables. Returns what ``accept`` did.

    The whole file is checked before anything changes.

    Args:
        trainers: of the tables in the order in which they were saved.
        accept: looks at the file before anything changes, and may raise.

    Raises:
        ModelFileError: missing or damaged.   ConfigError: of other tables, other optimizers or another width.
        Otherwise as ``HPS.insert``.
    """
    with open_checkpoint(Path(path)) as file:
        _check(file, trainers)
        answer = accept(file)
        for number, trainer in enumerate(trainers):
            with trainer.holding():
                spec = trainer.spec
                set_rows(trainer.server, spec.model, spec.name, file.keys(number), file.rows(number))
                trainer.set_states(file.tables[number]["steps"], file.states(number))
        return answer


def _check(file: CheckpointReader, trainers: Sequence[RowTrainer]) -> None:
    wanted = [_names(trainer) for trainer in trainers]
    found = [{name: about.get(name) for name in ("model", "table", "optimizer")} for about in file.tables]
    if found != wanted:
        raise ConfigError(f"{file.path}: tables {found} came, {wanted} are wanted")
    for number, trainer in enumerate(trainers):
        dim = file.shape(number, "emb_vector")[1]
        if dim != trainer.spec.dim:
            raise ConfigError(f"{file.path}: rows of {dim} elements came, {trainer.spec.tag} has {trainer.spec.dim}")
        trainer.check_states(file.shape(number, "state_key")[0], file.shape(number, "state"))


def set_rows(
    server: HPS, model: str, table: int | str, keys: np.ndarray, parts: Iterable[tuple[np.ndarray, np.ndarray]]
) -> None:
    """Make ``parts``, keys and rows, the whole content of a table; ``keys`` are all of them, int64 ``[n]``.

    Other writes wait; lookups go on, and may see rows of before and after.

    Raises:
        As ``HPS.insert`` and ``HPS.erase``.
    """
    with server.locked_table(model, table) as (present, _):
        stale = np.setdiff1d(present, keys)
        if len(stale):
            server.erase(stale, model, table)
        for some, rows in parts:
            server.insert(some, rows, model, table)
