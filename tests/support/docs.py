"""Shared by tests: block_with."""

from __future__ import annotations

import re
from pathlib import Path

from support.processes import ROOT


def block_with(page: str, text: str) -> str:
    """The first block of Python of a page that has a text in it."""
    return next(block for _, block in blocks_of(ROOT / "docs" / page) if text in block)


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """(line, text) of the Python blocks of a page."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block[1]) for block in found]
