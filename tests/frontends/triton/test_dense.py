"""A dense Torch program as a model of Triton, played."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import played_triton
from support.dense_programs import save_scores, scores_of
from support.factories import Workshop
from support.played_triton import PlayedRequest, arguments

from hps_numba.errors import ConfigError
from hps_numba.frontends.triton.dense import PROGRAM, DenseProgram, TritonPythonModel


@pytest.fixture(autouse=True)
def pb(monkeypatch: pytest.MonkeyPatch) -> Any:
    return played_triton.play(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> TritonPythonModel:
    (tmp_path / "2").mkdir()
    save_scores(tmp_path / "2" / PROGRAM, user=(2, 4), dense=(3,))
    made = TritonPythonModel()
    made.initialize(arguments("m_dense", str(tmp_path), "2"))
    return made


def test_what_a_program_takes_and_gives(tmp_path: Path) -> None:
    program = DenseProgram(save_scores(tmp_path / "a.pt2", user=(2, 4), dense=(3,)))
    assert [(spec.name, spec.datatype, spec.shape) for spec in program.inputs] == [
        ("user", "FP32", (-1, 2, 4)),
        ("dense", "FP32", (-1, 3)),
    ]
    assert [(spec.name, spec.datatype, spec.shape) for spec in program.outputs] == [("OUTPUT0", "FP32", (-1, 1))]


@pytest.mark.parametrize("samples", [1, 5])
def test_scores(model: TritonPythonModel, samples: int) -> None:
    generator = np.random.default_rng(1)
    user = generator.integers(0, 9, (samples, 2, 4)).astype(np.float32)
    dense = generator.integers(0, 9, (samples, 3)).astype(np.float32)
    (answer,) = model.execute([PlayedRequest({"dense": dense, "user": user}, ["OUTPUT0"])])
    np.testing.assert_array_equal(answer.outputs["OUTPUT0"], scores_of(user=user, dense=dense), strict=True)


def test_a_wrong_request_is_told(model: TritonPythonModel, pb: Any) -> None:
    wrong = PlayedRequest({"user": np.zeros((1, 3, 4), np.float32), "dense": np.zeros((1, 3), np.float32)}, ["OUTPUT0"])
    (answer,) = model.execute([wrong])
    assert answer.error.code == pb.TritonError.INVALID_ARG
    assert answer.error.message.startswith("model m_dense: ")


def test_what_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.pt2: expected a file saved by torch.export.save, got none$"):
        DenseProgram(tmp_path / "absent.pt2")
    os.mkfifo(tmp_path / "fifo.pt2")
    with pytest.raises(ConfigError, match="got none"):
        DenseProgram(tmp_path / "fifo.pt2")
    (tmp_path / "text.pt2").write_text("text")
    with pytest.raises(ConfigError, match=r"text.pt2: expected a program saved by torch.export.save"):
        DenseProgram(tmp_path / "text.pt2")


def test_a_whole_model_is_not_its_dense_part(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Torch would log pages of tracebacks about an operator that it does not know."""
    import torch

    from hps_numba.frontends import torch as hps
    from hps_numba.server.registry import SERVERS

    config = {"supportlonglong": True, "models": [workshop.model((range(9), 4), max_batch_size=8)]}
    try:
        layer = hps.LookupLayer(config, "m", 0, 4)
        torch.export.save(torch.export.export(layer.eval(), (torch.zeros(2, 3, dtype=torch.int64),)), tmp_path / "whole.pt2")
    finally:
        SERVERS.close()
    capfd.readouterr()
    with pytest.raises(ConfigError, match=r"whole.pt2: expected the dense part alone, .*, got a program that looks up rows$"):
        DenseProgram(tmp_path / "whole.pt2")
    assert "Traceback" not in capfd.readouterr().err


def test_a_program_of_more_than_tensors(tmp_path: Path) -> None:
    import torch

    class Scaled(torch.nn.Module):
        def forward(self, rows: Any, by: int) -> Any:
            return rows * by

    program = torch.export.export(Scaled().eval(), (torch.zeros(2, 3), 4))
    torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match="4: expected a tensor of one of bool, uint8"):
        DenseProgram(tmp_path / "a.pt2")
