"""Docstrings as Markdown: roles become code, literal blocks lose their second colon, ``Raises`` and ``Returns`` become text.

Docstrings here name several exceptions in one line, or refer to another method (``As ``lookup``.``), which a parser of
``type: description`` pairs would drop.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")
_SECTION = re.compile(r"^(Raises|Returns|Yields)( \([^)]*\))?:\s*$")


class DocstringsAsMarkdown(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The text of a docstring, with its ``Raises`` and ``Returns`` as lists and paragraphs."""
    text = _ROLE.sub(r"`\1`", inspect.cleandoc(text))
    text = re.sub(r"::(?=\n\n    )", ":", text)
    text = re.sub(r"^:(?=\n\n    )", "", text, flags=re.MULTILINE)
    lines: list[str] = []
    pending = iter(text.splitlines())
    line = next(pending, None)
    while line is not None:
        section = _SECTION.match(line)
        if section is None:
            lines.extend(_parted(line))
            line = next(pending, None)
            continue
        body: list[str] = []
        line = next(pending, None)
        while line is not None and (not line.strip() or line.startswith("    ")):
            body.append(line)
            line = next(pending, None)
        lines.extend(_rendered(f"{section[1]}{section[2] or ''}", inspect.cleandoc("\n".join(body))))
    return "\n".join(lines)


def _rendered(title: str, body: str) -> list[str]:
    if not title.startswith("Raises"):
        return [f"**{title}:**", "", *body.splitlines(), ""]
    items: list[str] = []
    for line in body.splitlines():
        if line.startswith(" ") and items:
            items[-1] += f" {line.strip()}"
        else:
            items.extend(part.strip() for part in re.split(r"(?<=\S) {3,}", line.strip()) if part)
    return [f"**{title}:**", "", *(f"* {_as_code(item)}" for item in items), ""]


def _as_code(item: str) -> str:
    """The names of exceptions at the beginning of a line, as code."""
    head, colon, rest = item.partition(": ")
    if colon and re.fullmatch(r"[A-Z]\w+(, [A-Z]\w+)*( \([^)]*\))?", head):
        return f"{re.sub(r'[A-Z][A-Za-z]*Error|TierUnavailable', lambda name: f'`{name[0]}`', head)}: {rest}"
    return item


def _parted(line: str) -> list[str]:
    """``a: of this.   b: of that`` in an ``Args`` section, one line each."""
    if re.match(r" {4}\w[\w, ]*: ", line) and re.search(r"\S {3}\w+: ", line):
        return [f"    {part.strip()}" for part in re.split(r" {3}(?=\w+: )", line.strip())]
    return [line]
