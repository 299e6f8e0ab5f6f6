"""``hps-numba triton-repository``: options, output, and what is refused. The files are tested in tests/frontends/triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.dense_programs import save_scores
from support.factories import Workshop
from typer.testing import CliRunner, Result

from hps_numba.cli import build


@pytest.fixture
def ps(workshop: Workshop) -> Path:
    first = workshop.model((range(9), 4), embedding_table_names=["user"])
    workshop.open_file(first, workshop.model((range(9), 3), name="other")).close()
    return workshop.folder / "ps.json"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(build(), ["triton-repository", *map(str, arguments)])


def test_all_models(ps: Path, tmp_path: Path) -> None:
    result = run(ps, tmp_path / "models")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["wrote", f"{tmp_path}/models/m", "wrote", f"{tmp_path}/models/other"]
    assert (tmp_path / "models" / "other" / "1" / "model.py").is_file()


def test_options(ps: Path, tmp_path: Path) -> None:
    timers = ["--refresh-interval", "0.5", "--refresh-delay", "2", "--freeze-sparse", "--allow-code"]
    result = run(ps, tmp_path / "models", "--model", "m", "--instances", "2", "--key-dimensions", "2", *timers, "--json")
    assert json.loads(result.stdout) == {"repository": f"{tmp_path}/models", "models": ["m"]}
    text = (tmp_path / "models" / "m" / "config.pbtxt").read_text()
    assert 'name: "user" data_type: TYPE_INT64 dims: [ -1, -1 ]' in text and "count: 2" in text
    for name, value in (("refresh_interval", "0.5"), ("refresh_delay", "2"), ("freeze_sparse", "true"), ("allow_code", "true")):
        assert f'key: "{name}" value {{ string_value: "{value}" }}' in text


def test_the_flat_protocol_alone(ps: Path, tmp_path: Path) -> None:
    assert run(ps, tmp_path / "models", "--flat-only").exit_code == 0
    assert "user" not in (tmp_path / "models" / "m" / "config.pbtxt").read_text()


def test_instances_without_shared_rows_are_a_warning(ps: Path, tmp_path: Path) -> None:
    result = run(ps, tmp_path / "models", "--instances", "2")
    assert result.exit_code == 0
    assert "warning: instances: each of the 2 processes has rows of its own" in result.stderr


def test_a_dense_program(ps: Path, tmp_path: Path) -> None:
    program = save_scores(tmp_path / "scores.pt2", user=(4,))
    refused = run(ps, tmp_path / "models", "--dense", program)
    assert refused.exit_code == 2 and "expected MODEL=FILE" in " ".join(refused.stderr.split())
    result = run(ps, tmp_path / "models", "--dense", f"m={program}", "--json")
    assert json.loads(result.stdout)["models"] == ["m", "m_dense", "m_scores", "other"]


def test_what_is_refused(ps: Path, tmp_path: Path) -> None:
    assert run(ps, tmp_path / "models").exit_code == 0
    for arguments, message in (
        (["--model", "x"], "model: expected one of m, other, got 'x'"),
        ([], "expected no such folder, got one; pass --overwrite to replace it"),
        (["--max-batch-size", "4", "--key-dimensions", "2"], "key_dimensions: expected 1 with max_batch_size"),
        (["--dense", "m=absent.pt2"], "absent.pt2: expected a file saved by torch.export.save, got none"),
    ):
        result = run(ps, tmp_path / "models", *arguments)
        assert result.exit_code == 1 and message in result.stderr, result.output
