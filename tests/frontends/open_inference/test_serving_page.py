"""The page on serving: its commands of curl work as they stand, and print what it says."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from support.docs import blocks_of
from support.inference_servers import serving
from support.processes import ROOT, environment
from support.servers import program
from support.waiting import HANG_SECONDS

pytest.importorskip("uvicorn", reason="needs the extra serve")

PAGE = ROOT / "docs" / "serving.md"


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program("curl", "curl")
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(PAGE)
    setup = next(block.text for block in blocks if block.language == "python")
    exec(compile(setup, str(PAGE), "exec"), {})
    pairs = [(block.text, after) for block, after in itertools.pairwise(blocks) if block.language == "bash"]
    assert len(pairs) == 4
    with serving(tmp_path / "ps.json", "--drain-seconds", "0") as server:
        for command, after in pairs:
            assert after.language in ("json", "text")
            text = command.replace("http://127.0.0.1:8000", server.url)
            assert text != command
            done = subprocess.run(
                ["bash", "-ec", text], capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=False
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == after.text.strip()
