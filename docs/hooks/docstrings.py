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
_NAMED = ("Args:", "Attributes:")


class DocstringsAsMarkdown(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """A class that joins its docstring with that of its base when it is imported is shown with both."""
        if "__doc__" in cls.members and cls.bases and cls.parent is not None and cls.docstring is not None:
            base = cls.parent.members.get(str(cls.bases[0]))
            if base is not None and base.docstring is not None:
                cls.docstring.value += f"\n\n{base.docstring.value.partition(chr(10))[2].strip(chr(10))}"


def as_markdown(text: str) -> str:
    """The text of a docstring, with its ``Raises`` and ``Returns`` as lists and paragraphs; unchanged if it was rewritten."""
    text = _ROLE.sub(r"`\1`", inspect.cleandoc(text))
    text = re.sub(r"^Class attributes:\n((?: {4}.*\n)+)\nAttributes:\n", r"Attributes:\n\1", text, flags=re.MULTILINE)
    text = text.replace("\nClass attributes:\n", "\nAttributes:\n")
    text = re.sub(r"::(?=\n\n    )", ":", text)
    text = re.sub(r"^:(?=\n\n    )", "", text, flags=re.MULTILINE)
    lines: list[str] = []
    pending = iter(text.splitlines())
    line = next(pending, None)
    section_of = ""
    while line is not None:
        section = _SECTION.match(line)
        if section is None:
            if line.strip() and not line.startswith(" "):
                section_of = line if line in _NAMED else ""
            lines.extend(_parted(line, attributes=section_of == "Attributes:") if section_of else [line])
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


def _parted(line: str, *, attributes: bool) -> list[str]:
    """A line of an ``Args`` or ``Attributes`` section: ``a: of this.   b: of that`` is two; one that names nothing continues.

    Of attributes, the parser would take ``a, b: of both`` for ``a`` of type ``b``; with a no-break space it does not.
    """
    if line.startswith("    ") and not line.startswith("     "):
        if re.search(r"\S {3}\w+(, \w+)*: ", line):
            parts = re.split(r" {3}(?=\w+(?:, \w+)*: )", line.strip())
            return [part for one in parts for part in _parted(f"    {one.strip()}", attributes=attributes)]
        if attributes and (names := re.match(r" {4}\w+(, \w+)+: ", line)):
            return [names[0].rstrip().replace(", ", ",\u00a0") + line[names.end() - 1 :]]
        if not re.match(r" {4}[\w*]+(, [\w*]+)*( \([^)]*\))?: ", line):
            return [f"    {line}"]
    return [line]
