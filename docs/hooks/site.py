"""What MkDocs does to a page besides rendering it: config tables, states of the checklist, defaults, links that leave the site.

Links to files of the repository (``../examples/torch_train.py``) work where the pages are read there. The site has no copy of
those files, so such a link is shown as the path of the file.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)(#[^)]*)?\)")
_KEYS = re.compile(r"<!-- keys of (\w+) -->")
#: a default of a dataclass that a function makes, ``(lambda: [0])()``, as it is highlighted in a signature
_FACTORY = re.compile(r'<span class="p">\(</span><span class="k">lambda</span><span class="p">:</span> (.*?)\)\(\)')
_LONG = 36  # characters of a key that may break into two lines


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs with the text of each page."""
    included = re.fullmatch(r'(?:# .*\n+)?--8<-- "(\w+\.md)"\n', markdown)
    if included:  # a page that lies at the root of the repository, with links from there
        markdown, folder = (ROOT / included[1]).read_text(encoding="utf-8"), ROOT
    else:
        folder = (ROOT / "docs" / page.file.src_uri).parent
    markdown = _LINK.sub(lambda link: _link(link, folder, page.file.src_uri), markdown)
    if page.file.src_uri == "checklist.md":
        markdown = with_states(markdown)
    return _KEYS.sub(lambda marker: key_table(marker[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page: signatures show the value of a default, not the function that makes it."""
    return _FACTORY.sub(r"\1", html)


def with_states(checklist: str) -> str:
    """The checklist with a column that says what works, from ``tests/ACCEPTANCE.md``."""
    acceptance = (ROOT / "tests" / "ACCEPTANCE.md").read_text(encoding="utf-8")
    cells = dict(re.findall(r"^\| ([A-Z]\d\d) \| (.+) \|$", acceptance, re.MULTILINE))
    states = {
        row: "not yet" if cell.startswith("not met") else "in part" if "not met" in cell else "yes"
        for row, cell in cells.items()
    }
    heads = checklist.replace("| # | What you get |\n|---|---|", "| # | What you get | Works |\n|---|---|---|")
    return re.sub(r"^(\| ([A-Z]\d\d) \| .+ \|)$", lambda line: f"{line[1]} {states[line[2]]} |", heads, flags=re.MULTILINE)


def _link(link: re.Match[str], folder: Path, page: str) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    path = Path(os.path.normpath(folder / target))
    docs = ROOT / "docs"
    if path.is_relative_to(docs) and not path.is_dir():
        home = (docs / page).parent
        return f"[{text}]({os.path.relpath(path, home)}{anchor})"
    shown = path.relative_to(ROOT).as_posix()
    return text if shown in text or text.strip("`") == path.name else f"{text} (`{shown}`)"


def key_table(section: str) -> str:
    """The keys of one section of the config, as the library itself checks them."""
    sys.path.insert(0, str(ROOT))
    from hps_numba.config.schema import json_schema

    schema = json_schema()
    properties = (schema if section == "ServerConfig" else schema["$defs"][section])["properties"]
    required = (schema if section == "ServerConfig" else schema["$defs"][section]).get("required", [])
    lines = ["| Key | Value | Default | Meaning |", "|---|---|---|---|"]
    for key, value in properties.items():
        if value.get("deprecated"):
            continue
        default = "**required**" if key in required else _code(value["default"]) if "default" in value else ""
        name = f"`{key}`" if len(key) < _LONG else f'<code class="long">{key.replace("_", "&#95;<wbr>")}</code>'
        lines.append(f"| {name} | {_kind(value)} | {default} | {value.get('description', '')} |")
    return "\n".join(lines)


def _kind(value: dict[str, Any]) -> str:
    """What a value may be, in words."""
    options = value.get("oneOf") or value.get("anyOf")
    if options:
        first = _kind(options[0])
        rest = [_kind(option) for option in options[1:]]
        if value.get("oneOf"):
            return f"{first}, or a list with one per table"
        return " or ".join(dict.fromkeys([first, *rest]))
    if "$ref" in value or value.get("type") == "object":
        return "object"
    if "enum" in value:
        return ", ".join(_code(word) for word in value["enum"])
    if value.get("type") == "array":
        items = value.get("items", {})
        return "list of objects" if "$ref" in items or items.get("type") == "object" else f"list of: {_kind(items)}"
    words = {"boolean": "boolean", "string": "text", "integer": "integer", "number": "number"}
    kind = words.get(value.get("type", ""), "any")
    if "module" in str(value.get("pattern", "")) or ".py" in str(value.get("pattern", "")):
        kind = "name or reference"
    low = value.get("minimum", value.get("exclusiveMinimum"))
    high = value.get("maximum", value.get("exclusiveMaximum"))
    if low is None and high is None:
        return kind
    above = "more than " if "exclusiveMinimum" in value else ""
    return f"{kind}, {above}{_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    """Powers of two as such, so that a bound can be read."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:g}"
    if abs(value) > 1e30:
        return f"{value:.3g}"
    whole = int(value)
    for bits in range(16, 65):
        if whole == 2**bits:
            return f"2^{bits}"
        if whole == 2**bits - 1:
            return f"2^{bits} - 1"
    return f"{whole:,}"


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return _number(value)
    if value == "":
        return '`""`'
    if isinstance(value, (dict, list)):
        import json

        return f"`{json.dumps(value)}`"
    return f"`{value}`"
