"""Pages in ``docs/``: every block of Python is run, in order, in one folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.docs import blocks_of
from support.processes import ROOT
from support.services import without_devices

from hps_numba import plugins

PAGES = sorted((ROOT / "docs").glob("*.md"))
STEPS = [page for page in PAGES if page.stem != "performance"]  # which has figures only


@pytest.mark.parametrize("page", STEPS, ids=lambda page: page.stem)
def test_every_step_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that begins with the comment of a file name is that file, as a reader would write it; others are run."""
    without_devices(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = blocks_of(page)
    assert blocks
    scope: dict[str, object] = {"__name__": "reader"}
    files = []
    for line, text in blocks:
        named = re.match(r"# (\w+\.py)\n", text)
        if named:
            Path(named[1]).write_text(text)
            files.append(Path(named[1]).stem)
        else:
            exec(compile("\n" * line + text, str(page), "exec"), scope)  # errors name the line of the page
    for file in files:
        sys.modules.pop(file, None)


def test_the_page_of_policies_lists_them_all() -> None:
    text = (ROOT / "docs" / "policies.md").read_text()
    assert {*re.findall(r"^\| `(\w+)`", text, re.MULTILINE)} - {"cache_policy"} == {
        *plugins.names("hps_numba.kernels.policies")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
    assert f"(docs/{page.name})" in (ROOT / "README.md").read_text()
