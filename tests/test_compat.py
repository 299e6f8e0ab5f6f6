"""The module names of HugeCTR HPS: scripts written for it run unchanged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.framework_rig import DIM, rig_of, run_program, tensorflow
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba import compat

_TENSORFLOW = """
import sys
import tensorflow as tf
import hierarchical_parameter_server as hps

hps.Init(global_batch_size=16, ps_config_file=sys.argv[1])
layer = hps.LookupLayer(
    model_name="m", table_id=0, emb_vec_size=8, emb_vec_dtype=tf.float32, ps_config_file=sys.argv[1], global_batch_size=16,
    name="lookup")
print(layer.name, hps.__version__, layer(tf.constant([[1, 2]], tf.int64)).numpy().sum())
"""

_TORCH = """
import sys
import torch
import hps_torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = hps_torch.LookupLayer(ps_config_file=sys.argv[1], model_name="m", table_id=0, emb_vec_size=8)

    def forward(self, keys):
        return self.layer(keys)

keys = torch.tensor([[1, 2]])
print(torch.equal(torch.jit.script(Model())(keys), Model()(keys)), Model()(keys).sum().item())
"""

_NATIVE = """
import sys
from hugectr.inference import HPS, InferenceParams, ParameterServerConfig, VolatileDatabaseParams
import hugectr.inference as inference
assert inference.HPS is HPS
server = HPS(sys.argv[1])
print(__name__, sys.argv[1:], server.lookup([1, 2], "m", 0).sum())
"""


def script(folder: Path, text: str) -> str:
    path = folder / "script.py"
    path.write_text(text)
    return str(path)


def test_a_script_of_the_tensorflow_plugin(tmp_path: Path) -> None:
    tensorflow()
    rig = rig_of(tmp_path)
    printed = run_program("from hps_numba import compat; compat.main()", script(tmp_path, _TENSORFLOW), rig.path).split()
    assert printed[0] == "lookup" and np.isclose(float(printed[2]), rig.rows[1:3].sum(), rtol=1e-5)


def test_a_script_of_the_torch_plugin(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rig = rig_of(tmp_path)
    equal, total = run_program("from hps_numba import compat; compat.main()", script(tmp_path, _TORCH), rig.path).split()
    assert equal == "True" and np.isclose(float(total), rig.rows[1:3].sum(), rtol=1e-5)


def test_a_script_of_the_python_api_needs_no_framework(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    command = [sys.executable, "-m", "hps_numba.compat", script(tmp_path, _NATIVE), rig.path, "--more"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    name, *arguments, total = done.stdout.split()
    assert name == "__main__" and "--more" in "".join(arguments)
    assert np.isclose(float(total), rig.rows[1:3].sum(), rtol=1e-5) and rig.rows.shape[1] == DIM


def test_a_script_that_is_missing_or_fails(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"usage: python -m hps_numba\.compat script\.py"):
        compat.main([])
    failing = script(tmp_path, "import hugectr.training")
    done = subprocess.run(
        [sys.executable, "-m", "hps_numba.compat", failing], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 1 and "No module named 'hugectr.training'" in done.stderr


def test_installing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    before = list(sys.meta_path)
    try:
        compat.install()
        once = os.environ["PYTHONPATH"]
        compat.install()
        assert len(sys.meta_path) == len(before) + 1
        assert os.environ["PYTHONPATH"] == once and once.endswith(":/somewhere")
    finally:
        sys.meta_path[:] = before
