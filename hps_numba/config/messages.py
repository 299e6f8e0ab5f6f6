"""How a config problem is put into words: the dotted path, what was expected, the value given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hps_numba.errors import ConfigError

__all__ = ["SECRET_KEYS", "Location", "dotted", "failed", "problem", "show", "unexpected"]

Location = Sequence[str | int]
"""Keys and indices from the root of the config down to a value: ``("models", 1, "gpucacheper")``."""

SECRET_KEYS = frozenset({"password"})
"""Keys whose values no message shows."""

_TEXT = 60  # characters of a value that a message shows
_ENTRIES = 4  # entries of a list or object that a message shows
_LISTED = 10  # problems that one message lists
_HIDDEN = "(hidden)"


def problem(location: Location, value: object, text: str) -> str:
    """One line about one value: ``models[1].gpucacheper: 1.4 is not in 0..1``."""
    return f"{dotted(location)}: {_shown(location, value)} {text}"


def unexpected(location: Location, value: object, expected: str, hint: str = "") -> str:
    """One line about one value: ``persistent_db.read_only: expected true or false, got 'no'``; ``hint`` follows the value."""
    return f"{dotted(location)}: expected {expected}, got {_shown(location, value)}{hint}"


def _shown(location: Location, value: object) -> str:
    return _HIDDEN if location and location[-1] in SECRET_KEYS else show(value)


def failed(problems: Iterable[str], *, place: str = "", excerpt: Iterable[str] = ()) -> ConfigError:
    """The error that carries ``problems``: the first on the first line, the others listed below it.

    All of them are kept in the attribute ``problems`` of the error, a tuple of strings.

    Args:
        problems: at least one line of :func:`problem`.
        place: the file they were found in, as text.
        excerpt: lines of the file, shown below the first problem.
    """
    first, *others = problems = tuple(problems)
    lines = [f"{first} (in {place})" if place else first, *excerpt]
    if others:
        lines.append(f"and {len(others)} more:")
        lines += [f"  {line}" for line in others[:_LISTED]]
    if len(others) > _LISTED:
        lines.append(f"  ... {len(others) - _LISTED} not shown")
    error = ConfigError("\n".join(lines))
    vars(error)["problems"] = problems
    return error


def dotted(location: Location) -> str:
    """``("models", 1, "gpucacheper")`` as ``models[1].gpucacheper``; the root is called ``config``."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part.isidentifier() and len(part) <= _TEXT:
            text += f".{part}" if text else part
        else:
            text += f"[{show(part)}]"
    return text or "config"


def show(value: object, *, depth: int = 2) -> str:
    """``value`` in the spelling of JSON, on one line and shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(value) if len(value) <= _TEXT else f"{value[:_TEXT]!r}... ({len(value)} characters)"
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[repr(value)]
    if isinstance(value, (list, tuple)):
        return _bracketed("[]", (show(entry, depth=depth - 1) for entry in value[:_ENTRIES]), len(value), depth)
    if isinstance(value, dict):
        first = {key: value[key] for key in list(value)[:_ENTRIES]}
        pairs = (f"{show(k)}: {_HIDDEN if k in SECRET_KEYS else show(v, depth=depth - 1)}" for k, v in first.items())
        return _bracketed("{}", pairs, len(value), depth)
    return f"a value of type {type(value).__name__}"


def _bracketed(brackets: str, entries: Iterable[str], size: int, depth: int) -> str:
    shown = ["..."] if depth == 0 and size else [*entries, *(["..."] if size > _ENTRIES else [])]
    return f"{brackets[0]}{', '.join(shown)}{brackets[1]}"
