"""A process whose scripted model looked up in ``torch.jit.fork`` ends as any other."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from support.framework_rig import rig_of, run_program, start_program
from support.waiting import HANG_SECONDS

pytest.importorskip("torch")

_FORKS = """
import os, sys
import torch
from hps_numba.frontends.torch import HPSEmbeddingBag, LookupLayer, hugectr_operator, jit_forks

class Called(torch.nn.Module):
    config: str
    def __init__(self, config: str):
        super().__init__()
        self.config = config
    def forward(self, keys):
        return torch.ops.hps_torch.hps_embedding_lookup(keys, self.config, "m", 0, 8)

class Model(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, keys: torch.Tensor):
        first, second = torch.jit.fork(self.layer, keys[0]), torch.jit.fork(self.layer, keys[1])
        return torch.cat([torch.jit.wait(first), torch.jit.wait(second)])

layers = {"layer": LookupLayer, "bag": HPSEmbeddingBag}
layer = Called(sys.argv[1]) if sys.argv[2] == "operator" else layers[sys.argv[2]](sys.argv[1], "m", 0, 8)
rows = torch.jit.script(Model(layer))(torch.arange(6).reshape(2, 1, 3)).flatten(0, -2)
print(*rows.shape, os.getpid() in jit_forks._processes, flush=True)
"""
_THEN_FORKS = """
child = os.fork()
if not child:
    jit_forks._finish()
    os._exit(7)  # as multiprocessing does: Torch itself would wait for its threads
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


_RUN = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"


def program(folder: Path, text: str) -> str:
    """TorchScript reads the text of its functions from a file."""
    (folder / "program.py").write_text(text)
    return str(folder / "program.py")


@pytest.mark.parametrize("kind", ["operator", "layer", "bag"])
def test_it_ends_without_an_abort(tmp_path: Path, kind: str) -> None:
    """Without ``jit_forks`` one process in three aborts."""
    rig = rig_of(tmp_path)
    path = program(tmp_path, _FORKS)
    rounds = int(os.environ.get("HPS_NUMBA_TEST_ROUNDS", "1"))
    for _ in range(rounds):
        processes = [start_program(_RUN, path, rig.path, kind) for _ in range(3)]
        for process in processes:
            out, err = process.communicate(timeout=HANG_SECONDS)
            rows = 2 if kind == "bag" else 6
            assert (out, process.returncode) == (f"{rows} 8 True\n", 0), err


def test_a_forked_child_does_not_wait_for_threads_it_does_not_have(tmp_path: Path) -> None:
    printed = run_program(_RUN, program(tmp_path, _FORKS + _THEN_FORKS), rig_of(tmp_path).path, "layer")
    assert printed == "6 8 True\n7\n"


def test_the_main_thread_leaves_nothing_to_wait_for(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from hps_numba.frontends.torch import LookupLayer, jit_forks; "
        "torch.jit.script(LookupLayer(sys.argv[1], 'm', 0, 8))(torch.arange(3)); print(len(jit_forks._processes))"
    )
    assert run_program(code, rig_of(tmp_path).path) == "0\n"


def test_other_threads_are_noted() -> None:
    from hps_numba.frontends.torch import jit_forks

    before = set(jit_forks._processes)
    jit_forks.note_thread()
    assert jit_forks._processes == before
    thread = threading.Thread(target=jit_forks.note_thread)
    thread.start()
    thread.join()
    assert os.getpid() in jit_forks._processes
    jit_forks._processes.clear()
    jit_forks._processes.update(before)
