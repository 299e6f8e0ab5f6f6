"""TensorFlow for tests: the front end with its import's warnings silenced, a model to serve, and programs of their own."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import environment
from support.waiting import HANG_SECONDS

__all__ = ["DIM", "ROWS", "Rig", "export", "finish", "rig_of", "run_program", "start_program", "tensorflow"]

ROWS, DIM = 200, 8


def tensorflow() -> tuple[Any, Any, Any]:
    """``(tf, the Keras of this process, hps)``, or a skip."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        tf = pytest.importorskip("tensorflow")
        import hps_numba.frontends.tensorflow as hps

        keras = importlib.import_module("keras") if hasattr(tf.keras, "KerasTensor") else tf.keras
    return tf, keras, hps


def export(model: Any, path: Path) -> str:
    """A model as a SavedModel for serving, of either Keras; the path."""
    model.export(str(path), **({"verbose": False} if hasattr(sys.modules["tensorflow"].keras, "KerasTensor") else {}))
    return str(path)


class Rig:
    """Two tables, ``t0`` (keys 0 to ROWS - 1, DIM wide) and ``t1`` (the same keys, 3 wide), of random rows."""

    def __init__(self, folder: Path, **entry: Any) -> None:
        random = np.random.default_rng(0)
        self.rows = random.normal(size=(ROWS, DIM)).astype(np.float32)
        self.narrow = random.normal(size=(ROWS, 3)).astype(np.float32)
        for name, rows in (("t0", self.rows), ("t1", self.narrow)):
            (folder / name).mkdir(exist_ok=True)
            np.arange(ROWS, dtype=np.int64).tofile(folder / name / "key")
            rows.tofile(folder / name / "emb_vector")
        model = {
            "model": "m",
            "sparse_files": [str(folder / "t0"), str(folder / "t1")],
            "embedding_table_names": ["t0", "t1"],
            "embedding_vecsize_per_table": [DIM, 3],
            "maxnum_catfeature_query_per_table_per_sample": [4, 4],
            "default_value_for_each_table": [0.25, 0.5],
            "deployed_device_list": [],
            "max_batch_size": 64,
            **entry,
        }
        self.config = {"supportlonglong": True, "models": [model]}
        self.path = str(folder / "ps.json")
        self.write()

    def write(self) -> None:
        """The config, as it is now, to its file."""
        Path(self.path).write_text(json.dumps(self.config))


def rig_of(tmp_path: Path, **entry: Any) -> Rig:
    """A rig in a folder."""
    return Rig(tmp_path, **entry)


def start_program(program: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A process of its own; it ends the test with what it wrote if it fails."""
    settings = environment(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", **more)
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings)


def finish(process: subprocess.Popen[str]) -> str:
    """What a process printed."""
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, f"{out}\n{err[-4000:]}"
    return out


def run_program(program: str, *arguments: str, **more: str) -> str:
    """What a program of its own printed."""
    return finish(start_program(program, *arguments, **more))
