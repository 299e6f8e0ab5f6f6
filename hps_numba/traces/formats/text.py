"""Text: integers separated by white space; ``#`` starts a comment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import Blocks, TraceFormat, blocks_of
from hps_numba.traces.formats._numbers import first_invalid, parse_integers

__all__ = ["PLUGIN"]

_LINES = 1 << 22  # bytes of lines read at a time


def _open(path: Path, column: str | None) -> tuple[None, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column: expected none in a text file (format csv has columns), got {column!r}")

    def blocks() -> Iterator[np.ndarray]:
        line = 1
        with path.open("rb") as file:
            while lines := file.readlines(_LINES):
                words = b" ".join(text.partition(b"#")[0] for text in lines).split()
                keys = parse_integers(words)
                if keys is None:
                    number, word = _first_invalid_line(lines)
                    raise TraceError(f"{path}:{line + number}: expected a 64-bit integer, got {word!r}")
                yield from blocks_of(keys)()
                line += len(lines)

    return None, blocks


def _first_invalid_line(lines: list[bytes]) -> tuple[int, str]:
    """Number of the first line with a word that is not an integer, and that word."""
    for number, text in enumerate(lines):
        words = text.partition(b"#")[0].split()
        if (at := first_invalid(words)) is not None:
            return number, words[at][:40].decode(errors="replace")
    raise AssertionError("all words are integers")


PLUGIN = TraceFormat((".txt", ".text", ".trace"), _open)
