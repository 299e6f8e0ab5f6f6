"""JSON as people write it: with comments, with a byte order mark, in UTF-8 or UTF-16.

The samples of HugeCTR have ``//`` comments, which its own parser refuses. Comments are replaced by spaces, so line
and column of a syntax error are those of the file.
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


def parse(data: bytes, place: str) -> object:
    """The JSON value in ``data``; ``NaN`` and ``Infinity`` are let through, for the range checks to name the key.

    Args:
        data: content of the file.
        place: name of the file, for messages.

    Raises:
        ConfigError: not text, or not JSON; names file, line and column.
    """
    text = _without_comments(_decode(data, place))
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, place))
    except json.JSONDecodeError as error:
        raise failed([f"{place}, line {error.lineno}, column {error.colno}: {error.msg}, expected JSON"]) from None
    except RecursionError:
        raise failed([f"{place}: nested thousands deep, expected at most 4"]) from None
    except ValueError:  # Python refuses to read an integer of thousands of digits
        raise failed([f"{place}: an integer has thousands of digits, expected at most 20"]) from None


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


def _object(pairs: list[tuple[str, object]], place: str) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, times in Counter(key for key, _ in pairs).items():
            if times > 1:
                _LOG.warning("%s: key %s comes %d times in one object, the last one counts", place, show(key), times)
    return found
