"""Every program in ``examples/`` runs and passes its checks, or says how to install the packages that it needs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
IN_CELLS = [path for path in EXAMPLES if path.read_text().startswith("# %%")]


def needs(example: Path) -> tuple[str, ...]:
    """The additional modules that an example names in ``NEEDS``."""
    for node in ast.parse(example.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NEEDS":
            return tuple(ast.literal_eval(node.value))
    return ()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    quiet = environment(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=quiet, timeout=HANG_SECONDS)


def test_examples_exist() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example: Path) -> None:
    missing = [name for name in needs(example) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{example.name} needs {', '.join(missing)}")
    result = run(str(example))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() and not result.stderr


@pytest.mark.parametrize("example", [path for path in EXAMPLES if needs(path)], ids=lambda path: path.stem)
def test_example_without_its_packages_says_how_to_install_them(example: Path) -> None:
    hidden = f"import sys, runpy; sys.modules |= dict.fromkeys({needs(example)!r}); "
    result = run("-c", f"{hidden} runpy.run_path({str(example)!r}, run_name='__main__')")
    assert result.returncode == 1
    assert "pip install" in result.stderr and all(name in result.stderr for name in needs(example))
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def notebook_of(example: Path) -> dict[str, Any]:
    """The notebook of an example that is written in cells."""
    cells: list[dict[str, Any]] = []
    for number, cell in enumerate(re.split(r"^# %%", example.read_text(), flags=re.MULTILINE)[1:]):
        kind, _, text = cell.partition("\n")
        is_text = "[markdown]" in kind
        lines = text.strip("\n").splitlines(keepends=True)
        if is_text:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        more = {} if is_text else {"execution_count": None, "outputs": []}
        kind = "markdown" if is_text else "code"
        cells.append({"cell_type": kind, "id": f"cell-{number}", "metadata": {}, **more, "source": lines})
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


@pytest.mark.parametrize("example", IN_CELLS, ids=lambda path: path.stem)
def test_notebook_equals_the_cells_of_the_example(example: Path) -> None:
    """``UPDATE_NOTEBOOKS=1 pytest tests/test_examples.py`` regenerates the notebooks."""
    notebook = ROOT / "examples" / "notebooks" / f"{example.stem}.ipynb"
    if os.environ.get("UPDATE_NOTEBOOKS"):
        notebook.parent.mkdir(exist_ok=True)
        notebook.write_text(json.dumps(notebook_of(example), indent=1) + "\n")
    assert json.loads(notebook.read_text()) == notebook_of(example)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_in_the_readme(example: Path) -> None:
    assert f"]({example.name})" in (ROOT / "examples" / "README.md").read_text()
