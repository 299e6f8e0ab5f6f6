"""Lists that several threads change without a lock are copied by ``list``, and otherwise read at one index.

On CPython 3.11 a slice and ``tuple`` crash otherwise, if garbage is collected between looking at the list and copying it, and
another thread makes the list shorter meanwhile. Nothing but a crash shows it, so the source is looked at.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import hps_numba

PACKAGE = Path(hps_numba.__file__).parent
#: modules whose lists threads change at any time
WITHOUT_LOCKS = (
    "cache/staging.py",
    "cache/workspace_pool.py",
    "runtime/background.py",
    "runtime/blocks.py",
    "runtime/shielded.py",
    "runtime/timer.py",
    "server/recordings.py",
    "server/replays.py",
    "server/shared_fetches.py",
    "storage/host/epochs.py",
)


def is_shared(node: ast.expr) -> bool:
    """An attribute of an object of the module, or what a method of that gives."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    return isinstance(node, ast.Attribute) and (ast.unparse(node.value) == "self" or node.attr == "claimants")


def copies_of(source: str) -> list[str]:
    """Copies of such attributes by a slice or ``tuple``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        sliced = isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and is_shared(node.value)
        called = isinstance(node, ast.Call) and len(node.args) == 1 and is_shared(node.args[0])
        as_tuple = called and isinstance(node.func, ast.Name) and node.func.id == "tuple"  # type: ignore[attr-defined]
        if sliced or as_tuple:
            found.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("module", WITHOUT_LOCKS)
def test_lists_that_threads_change_are_copied_by_list(module: str) -> None:
    assert not copies_of((PACKAGE / module).read_text())


def test_such_copies_are_found() -> None:
    assert copies_of("first = self._waiting[:1]") and copies_of("for x in tuple(self._all): pass")
    assert copies_of("tuple(self._due.items())") and not copies_of("for x in list(self._all): self._all[0]")
