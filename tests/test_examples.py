"""Every program in ``examples/`` runs and passes its own checks, or says which line installs what it lacks."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, environment

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def needs(example: Path) -> tuple[str, ...]:
    """The modules beyond the package's own that an example names in its ``NEEDS``."""
    for node in ast.parse(example.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "NEEDS":
            return tuple(ast.literal_eval(node.value))
    return ()


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment(), timeout=240)


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


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_in_the_readme(example: Path) -> None:
    assert f"]({example.name})" in (ROOT / "examples" / "README.md").read_text()
