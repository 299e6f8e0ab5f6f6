"""JSON as people write it: with comments, with a byte order mark, in UTF-8 or UTF-16.

The samples of HugeCTR have ``//`` comments, which its own parser refuses. Comments are replaced by spaces, so line
and column of a syntax error are those of the file. What is not JSON, such as a Python dict, is shown with what to change.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter

from hps_numba.config.messages import failed, show

__all__ = ["parse"]

_LOG = logging.getLogger(__package__)
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*+"|//[^\n]*|/\*.*?\*/', re.DOTALL)
_SHOWN = 100  # characters of a line that an error shows
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def parse(data: bytes, place: str, *, strict: bool = False) -> object:
    """The JSON value in ``data``; ``NaN`` and ``Infinity`` are let through, for the range checks to name the key.

    Args:
        data: content of the file.
        place: name of the file, for messages.
        strict: a key that comes twice in an object is an error; else a WARNING, and the last one counts.

    Raises:
        ConfigError: not text, or not JSON; names file, line and column, shows the line, and says what to change.
    """
    decoded = _decode(data, place)
    text = _without_comments(decoded)
    repeated: list[str] = []
    try:
        value: object = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, place, repeated))
    except json.JSONDecodeError as error:
        raise failed([_described(error, text, place)], excerpt=_excerpt(decoded, error)) from None
    except RecursionError:
        raise failed([f"{place}: nested thousands deep, expected at most 4"]) from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        raise failed([f"{place}: an integer has thousands of digits, expected at most 20"]) from None
    if repeated and strict:
        raise failed(repeated)
    for line in repeated:
        _LOG.warning("%s, the last one counts", line)
    return value


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        reason = f"{error.reason} is not {error.encoding}, expected JSON"
        raise failed([f"{place}, line {line}, column {column}: {reason}"]) from None


def _without_comments(text: str) -> str:
    return _STRING_OR_COMMENT.sub(lambda match: match[0] if match[0][0] == '"' else re.sub(r"[^\n]", " ", match[0]), text)


def _object(pairs: list[tuple[str, object]], place: str, repeated: list[str]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                repeated.append(f"{place}: key {show(key)} comes {times} times in one object")
    return found


# -- what is wrong, and what to change ---------------------------------------------------------------------


def _described(error: json.JSONDecodeError, text: str, place: str) -> str:
    hint = _hint(error, text)
    return f"{place}, line {error.lineno}, column {error.colno}: {error.msg}, expected JSON{hint and f': {hint}'}"


def _hint(error: json.JSONDecodeError, text: str) -> str:
    """What to change; empty if that is not clear."""
    if not text.strip():
        return "the file is empty"
    if error.msg.startswith("Invalid control character"):
        return "a text ends on the line on which it begins"
    if "escape" in error.msg:
        return r"write a backslash as \\"
    rest, before = text[error.pos :].lstrip(), text[: error.pos].rstrip()
    word = re.match(r"[A-Za-z_]\w*", rest)
    if word and word[0] in _PYTHON:
        return f"this is Python, write {_PYTHON[word[0]]} for {word[0]}"
    if (rest[:1] in ("}", "]") and before[-1:] == ",") or re.match(r",\s*[}\]]", rest):
        return "remove the comma before the closing bracket"
    by_character = {
        "'": "write text in double quotes",
        "#": "comments begin with //",
        "(": "write a list in square brackets",
        '"': "a comma may be missing before it" if error.msg.startswith("Expecting ','") else "",
    }
    if rest[:1] in by_character:
        return by_character[rest[:1]]
    return "write text and keys in double quotes" if word else ""


def _excerpt(text: str, error: json.JSONDecodeError) -> tuple[str, ...]:
    """The line of an error, and a caret below the place; none for an empty line."""
    start = error.pos - error.colno + 1
    line = text[start:].partition("\n")[0].rstrip()
    if not line.strip():
        return ()
    first = max(0, error.colno - 1 - _SHOWN // 2)
    shown = "".join(character if character.isprintable() else " " for character in line[first : first + _SHOWN])
    return f"      {shown}", f"      {' ' * (error.colno - 1 - first)}^"
