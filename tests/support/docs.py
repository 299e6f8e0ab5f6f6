"""Code blocks of Markdown pages: ``blocks_of`` a page, and the first ``block_with`` a text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from support.processes import ROOT

__all__ = ["Block", "block_with", "blocks_of", "prose_of"]

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, the line before its first, its text, and why tests do not run it, if they do not."""

    language: str
    line: int
    text: str
    not_run: str | None


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], text[: found.start("text")].count("\n"), found["text"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


def block_with(page: str, text: str) -> str:
    """The first Python block of a page of ``docs/`` that contains a text."""
    return next(block.text for block in blocks_of(ROOT / "docs" / page) if block.language == "python" and text in block.text)


def prose_of(page: Path) -> str:
    """A page without its code blocks, tables and pictures."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", _BLOCK.sub("", page.read_text(encoding="utf-8")))
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))
