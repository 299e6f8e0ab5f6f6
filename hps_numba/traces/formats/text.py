"""Text: integers between white space; what follows a ``#`` in a line does not count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hps_numba.errors import TraceError
from hps_numba.traces.formats._format import BLOCK, Blocks, TraceFormat
from hps_numba.traces.formats._numbers import first_wrong, integers

__all__ = ["PLUGIN"]

_LINES = 1 << 22  # bytes of lines read at a time


def _open(path: Path, column: str | None) -> tuple[None, Blocks]:
    if column is not None:
        raise TraceError(f"{path}: column {column!r} of a text file, wanted none; format csv has columns")

    def blocks() -> Iterator[np.ndarray]:
        line = 1
        with path.open("rb") as file:
            while lines := file.readlines(_LINES):
                words = b" ".join(text.partition(b"#")[0] for text in lines).split()
                keys = integers(words)
                if keys is None:
                    number, word = _where(lines)
                    raise TraceError(f"{path}:{line + number}: {word!r}, wanted an integer of 64 bits")
                for start in range(0, len(keys), BLOCK):
                    yield keys[start : start + BLOCK]
                line += len(lines)

    return None, blocks


def _where(lines: list[bytes]) -> tuple[int, str]:
    """Number of the first line with a word that is no integer, and that word."""
    for number, text in enumerate(lines):
        words = text.partition(b"#")[0].split()
        if (at := first_wrong(words)) is not None:
            return number, words[at][:40].decode(errors="replace")
    raise AssertionError("all words are integers")


PLUGIN = TraceFormat((".txt", ".text", ".trace"), _open)
