"""``ACCEPTANCE.md`` is complete, and every test that it names exists. Tests are found by reading, not by importing."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE / "ACCEPTANCE.md"
CHECKLIST = HERE.parent / "docs" / "checklist.md"

#: how many rows the checklist (docs/checklist.md) has of each letter
ROWS = {"C": 22, "T": 32, "P": 11, "N": 10, "F": 15, "G": 40, "D": 25, "U": 13, "O": 14}
_NAMED = re.compile(r"tests/([\w/]+\.py)::((?:\w+::)?\w+)")
#: the suites that users subclass too
SUITES = HERE.parent / "hps_numba" / "testing"


def rows(letter: str, numbers: Iterable[int]) -> list[str]:
    return [f"{letter}{number:02}" for number in numbers]


ALL = [row for letter, count in ROWS.items() for row in rows(letter, range(1, count + 1))]
#: rows that this version has to meet
MET = [
    *rows("C", range(1, 23)),
    *rows("F", range(1, 16)),
    *rows("N", [*range(1, 7), 8, 9, 10]),
    *rows("D", range(1, 26)),
    *rows("G", [*range(1, 31), 32, 33, 35, 36, 38, 39, 40]),
    *rows("U", range(1, 14)),
    *rows("O", [1, 2, 3, *range(4, 10), 14]),
]


def cells() -> list[tuple[str, str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"\| ([A-Z]\d\d) \| (.+) \|", line) for line in lines]
    return [(match[1], match[2]) for match in found if match]


@cache
def names_in(file: str) -> frozenset[str]:
    tree = ast.parse((HERE / file).read_text(encoding="utf-8"))
    names = {*functions_of(tree)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            inherited = [suites()[base] for base in map(ast.unparse, node.bases) if base in suites()]
            names |= {f"{node.name}::{name}" for part in (node, *inherited) for name in functions_of(part)}
    return frozenset(names)


def functions_of(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    return (part.name for part in node.body if isinstance(part, ast.FunctionDef) and part.name.startswith("test_"))


@cache
def suites() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SUITES.glob("*.py")]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_row_is_there_once_and_in_order() -> None:
    assert sorted(row for row, _ in cells()) == sorted(ALL)
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(lines) == len(ALL) + 2  # and no line that is not understood
    for letter in ROWS:
        mine = [row for row, _ in cells() if row.startswith(letter)]
        assert mine == sorted(mine)


def test_checklist_has_one_line_of_text_for_each_row() -> None:
    lines = CHECKLIST.read_text(encoding="utf-8").splitlines()
    found = [match for line in lines if (match := re.fullmatch(r"\| ([A-Z]\d\d) \| (\S.*\S) \|", line))]
    assert [match[1] for match in found] == [row for row, _ in cells()]  # the same rows, in the same order
    heads = [line for line in lines if line.startswith("|") and line in ("| # | What you get |", "|---|---|")]
    assert len([line for line in lines if line.startswith("|")]) == len(found) + len(heads)
    texts = [match[2] for match in found]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("row", MET)
def test_rows_of_this_version_name_a_test(row: str) -> None:
    cell = dict(cells())[row]
    assert _NAMED.search(cell)
    assert not cell.startswith("not met")


@pytest.mark.parametrize(("row", "cell"), cells())
def test_every_named_test_exists(row: str, cell: str) -> None:
    named = _NAMED.findall(cell)
    assert cell.count("tests/") == len(named), f"{row}: not written as tests/file.py::test_name"
    for file, test in named:
        assert (HERE / file).is_file(), f"{row}: no file tests/{file}"
        assert test in names_in(file), f"{row}: no test {test} in tests/{file}"
    if not named:
        assert re.fullmatch(r"not met: .{10,}", cell), f"{row}: neither tests nor a reason"
