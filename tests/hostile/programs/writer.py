"""Writes files of one kind again and again, until it is killed: ``writer.py kind folder``. Every write replaces the last."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile.programs.world import DIM, MODEL, open_server, rows_of

import hps_numba
from hps_numba.training.checkpoints import save_trained
from hps_numba.training.trainer import RowTrainer, Sgd

N = 4000
KINDS = ("directory", "hdf5", "dump", "checkpoint")


def chunks(version: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and rows of a version, in a few pieces."""
    return [(keys, rows_of(keys, version)) for keys in np.array_split(np.arange(N), 4)]


def target_of(kind: str, folder: Path) -> Path:
    return folder / {"directory": "m.model", "hdf5": "m.h5", "dump": "m.bin", "checkpoint": "m.ckpt"}[kind]


def writer_of(kind: str, folder: Path) -> Callable[[int], object]:
    """A function that writes one version."""
    target = target_of(kind, folder)
    if kind in ("directory", "hdf5"):
        return lambda version: hps_numba.write_model(target, DIM, chunks(version), overwrite=True)
    start = folder / "start.model"
    if not start.exists():
        hps_numba.write_model(start, DIM, chunks(0))
    server = open_server([str(start)], cached=False)
    keys = np.arange(N)

    def write(version: int) -> None:
        server.insert(keys, rows_of(keys, version), MODEL, 0)
        if kind == "dump":
            server.dump(target, MODEL, 0)
        else:
            save_trained(target, [RowTrainer(server, MODEL, 0, Sgd(0.1))])

    return write


def version_in(kind: str, folder: Path) -> int:
    """The version of the file that is there; fails unless it is whole."""
    target = target_of(kind, folder)
    if kind in ("directory", "hdf5"):
        with hps_numba.open_model(target, DIM) as reader:
            pieces = [(keys.copy(), rows.copy()) for keys, rows, _ in reader.chunks()]
        keys, rows = (np.concatenate(parts) for parts in zip(*pieces))
    else:
        from hostile.programs.world import versions_of

        from hps_numba.training.checkpoints import load_trained

        server = open_server([str(folder / "start.model")], cached=False)
        if kind == "dump":
            server.load_dump(target, MODEL, 0)
        else:
            load_trained(target, [RowTrainer(server, MODEL, 0, Sgd(0.1))])
        keys = np.arange(N)
        rows = server.lookup(keys, MODEL, 0)
        versions_of(keys, rows, kind)
        server.close()
    versions = set(rows[:, 0].tolist())
    assert len(keys) == N and len(versions) == 1, (len(keys), versions)
    assert np.array_equal(rows, rows_of(keys, int(rows[0, 0])))
    return int(rows[0, 0])


def main(kind: str, folder: str) -> None:
    """Prints a line after each write."""
    write = writer_of(kind, Path(folder))
    for version in range(1, 1000):
        write(version)
        print(version, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
