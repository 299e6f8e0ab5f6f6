"""Reads files whose bytes are changed, cut, or grown: each is answered or refused with a typed error, in this process."""

from __future__ import annotations

import os
import random
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hostile.programs.world import DIM, MODEL, Clock, open_server, rows_of

import hps_numba
from hps_numba import HpsError, simulate
from hps_numba.traces.formats.oracle_general import RECORD
from hps_numba.training.checkpoints import load_trained, save_trained
from hps_numba.training.trainer import Adagrad, RowTrainer

N = 300
KINDS = {
    "models": ("directory", "hdf5", "npz", "npy", "safetensors", "parquet"),
    "others": ("dump", "checkpoint", "trace.npy", "trace.csv", "trace.oracle"),
}


def _read_model(path: Path) -> None:
    with hps_numba.open_model(path, DIM) as reader:
        for _ in reader.chunks():
            pass


def samples(folder: Path) -> dict[str, tuple[Path, Any]]:
    """``{kind: (file to damage, function that reads its model)}``."""
    keys, rows = np.arange(N), rows_of(np.arange(N), 1)
    made: dict[str, tuple[Path, Any]] = {}
    hps_numba.write_model(folder / "d.model", DIM, [(keys, rows)])
    made["directory"] = (folder / "d.model" / "key", lambda: _read_model(folder / "d.model"))
    hps_numba.write_model(folder / "m.h5", DIM, [(keys, rows)])
    made["hdf5"] = (folder / "m.h5", lambda: _read_model(folder / "m.h5"))
    np.savez(folder / "m.npz", key=keys, emb_vector=rows)
    made["npz"] = (folder / "m.npz", lambda: _read_model(folder / "m.npz"))
    np.save(folder / "m.npy", rows)
    made["npy"] = (folder / "m.npy", lambda: _read_model(folder / "m.npy"))
    try:
        from safetensors.numpy import save_file
    except ImportError:
        pass
    else:
        save_file({"key": keys, "emb_vector": rows}, folder / "m.safetensors")
        made["safetensors"] = (folder / "m.safetensors", lambda: _read_model(folder / "m.safetensors"))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        pass
    else:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), DIM)
        pq.write_table(pa.table({"key": pa.array(keys), "emb_vector": vectors}), folder / "m.parquet")
        made["parquet"] = (folder / "m.parquet", lambda: _read_model(folder / "m.parquet"))
    server = open_server([str(folder / "d.model")], cached=False)
    trainers = [RowTrainer(server, MODEL, 0, Adagrad(0.1))]
    trainers[0].step(keys[:50], rows[:50])
    server.dump(folder / "m.bin", MODEL, 0)
    save_trained(folder / "m.ckpt", trainers)
    made["dump"] = (folder / "m.bin", lambda: server.load_dump(folder / "m.bin", MODEL, 0))
    made["checkpoint"] = (folder / "m.ckpt", lambda: load_trained(folder / "m.ckpt", trainers))
    np.save(folder / "t.npy", keys)
    (folder / "t.csv").write_text("key\n" + "\n".join(map(str, keys.tolist())))
    np.zeros(N, RECORD).tofile(folder / "t.oracleGeneral")
    for kind, name in (("trace.npy", "t.npy"), ("trace.csv", "t.csv"), ("trace.oracle", "t.oracleGeneral")):
        made[kind] = (folder / name, lambda path=folder / name: simulate.open_trace(path).keys())
    return made


def damage(content: bytes, chance: random.Random) -> bytes:
    """A changed copy: bits, bytes, runs, cuts, insertions; the first kilobyte, where headers are, more often than the rest."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(min(len(data), 1024) if chance.random() < 0.6 else len(data)) if data else 0
        what = chance.randrange(6)
        if what == 0 and data:
            data[at] ^= 1 << chance.randrange(8)
        elif what == 1 and data:
            data[at] = chance.choice([0, 0xFF, 0x7F, 0x80, chance.randrange(256)])
        elif what == 2:
            data[at : at + chance.randint(1, 16)] = bytes(chance.randrange(256) for _ in range(chance.randint(0, 16)))
        elif what == 3:
            del data[at:]
        elif what == 4:
            data[at : at + 8] = chance.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, 10**9]).to_bytes(
                8, chance.choice(["little", "big"])
            )
        else:
            data += bytes(chance.randrange(1, 4096))
    return bytes(data)


def attack(file: Path, read: Callable[[], object], clock: Clock, chance: random.Random) -> int:
    """Reads damaged copies until the clock ends, and one was refused; returns how many."""
    content, count, refused = file.read_bytes(), 0, 0
    clock.enough = lambda: refused
    for _ in clock:
        file.write_bytes(damage(content, chance))
        shutil.copyfile(file, file.with_name("last"))
        try:
            read()
        except HpsError as problem:
            assert str(problem), "an error without a message"
            refused += 1
        count += 1
    file.write_bytes(content)
    return count


def main(folder: str, seconds: str, seed: str, kinds: str) -> None:
    """Prints how many damaged files were read; keeps the one that it reads in ``last``, for when the process dies of it."""
    warnings.simplefilter("ignore")
    made, count = samples(Path(folder)), 0
    for kind in KINDS[kinds]:
        if kind in made:
            sys.stderr.write(f"{kind}\n")
            count += attack(*made[kind], Clock(float(seconds)), random.Random(f"{seed} {kind}"))
    print(count)
    sys.stdout.flush()
    os._exit(0)  # files were damaged: nothing is to be closed


if __name__ == "__main__":
    main(*sys.argv[1:])
