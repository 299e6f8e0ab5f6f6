"""The page on clients: its blocks work as they stand against a server that is started as it says.

Blocks that need the server are marked ``py``, which ``test_docs`` leaves to this file.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.docs import blocks_of
from support.inference_servers import Serving, serving
from support.processes import ROOT, environment
from support.servers import program
from support.waiting import HANG_SECONDS

from hps_numba import HPS

pytest.importorskip("uvicorn", reason="needs the extra serve")
pytest.importorskip("tritonclient.grpc")

BLOCKS = blocks_of(ROOT / "docs" / "clients.md")


@pytest.fixture
def page_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """A server on the config of the page."""
    monkeypatch.chdir(tmp_path)
    setup = next(block.text for block in BLOCKS if block.language == "python")
    exec(compile(setup, "clients.md", "exec"), {})
    with serving(tmp_path / "ps.json", "--grpc-port", "0", "--shared-memory", "shop_") as server:
        yield server


def test_the_blocks_of_the_page(page_server: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    urls = page_server.urls
    scope: dict[str, Any] = {}
    for block in BLOCKS:
        if block.language == "py":
            text = block.text.replace("http://127.0.0.1:8000", page_server.url).replace("127.0.0.1:8001", urls["grpc"])
            text = text.replace("timeout=5.0", f"timeout={HANG_SECONDS}")
            exec(compile("\n" * block.line + text, "clients.md", "exec"), scope)
    assert "'shops' is not served" in capsys.readouterr().out
    with HPS(tmp_path / "ps.json") as reference:
        np.testing.assert_array_equal(scope["rows"], reference.lookup([3, 1, 4], "shop", "users"), strict=True)
        pooled = reference.lookup_pooled([10, 11, 12, 13], [0, 3, 4], "shop", "items", combiner="mean")
    np.testing.assert_array_equal(scope["bags"]["items"], pooled.astype(np.float16), strict=True)


def test_curl(page_server: Serving, tmp_path: Path) -> None:
    program("curl", "curl")
    command = next(block.text for block in BLOCKS if block.language == "bash")
    text = command.replace("http://127.0.0.1:8000", page_server.url)
    done = subprocess.run(["bash", "-ec", text], capture_output=True, check=True, env=environment(), timeout=HANG_SECONDS)
    (output,) = json.loads(done.stdout)["outputs"]
    with HPS(tmp_path / "ps.json") as reference:
        expected = reference.lookup([3, 1], "shop", "users")
    np.testing.assert_array_equal(np.array(output["data"], np.float32).reshape(output["shape"]), expected, strict=True)
