"""What a single value may be: the annotations that the config models are written with.

Each annotation states its limit once; the check, the JSON schema and the message of an error all come from there.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Discriminator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, Tag
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from hps_numba.config.enums import Words
from hps_numba.config.messages import show
from hps_numba.plugins import is_reference, names

__all__ = [
    "EACH",
    "INT32_MAX",
    "ONE",
    "REFUSED",
    "UNION_TAGS",
    "AnyOf",
    "Bytes",
    "Count",
    "Device",
    "EachTable",
    "Float32",
    "Fraction",
    "Hosts",
    "Matching",
    "Name",
    "PerTable",
    "PluginName",
    "Regex",
    "Seconds",
    "SegmentName",
    "SourceName",
    "Spelling",
    "Threads",
    "Width",
]

INT32_MAX = 2**31 - 1
_FLOAT32_MAX = 3.4028234663852886e38
_REFERENCE = r"(?:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*|[^:]+\.py):[A-Za-z_]\w*"

REFUSED = "refused"
"""Type of the errors raised here; their context holds ``expected`` and ``hint``, the parts of a message."""


def refuse(expected: str, hint: str = "") -> PydanticCustomError:
    """An error whose message will read ``<path>: expected <expected>, got <value><hint>``."""
    return PydanticCustomError(REFUSED, "{expected}", {"expected": expected, "hint": hint})


# --- numbers -----------------------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
Width = Annotated[int, Field(ge=1, le=65536)]
Device = Annotated[int, Field(ge=0, le=1023)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Bytes = Annotated[int, Field(ge=0, le=2**50)]
Float32 = Annotated[float, Field(ge=-_FLOAT32_MAX, le=_FLOAT32_MAX)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=365 * 24 * 3600)]

# --- lists -------------------------------------------------------------------------------------------------------------

ONE, EACH = "<one>", "<each>"  # how a PerTable value was given
IN_MEMORY, ON_DISK, OWN = "<in memory>", "<on disk>", "<own>"  # what kind of tier an entry of ``tiers`` is
UNION_TAGS = {ONE: 0, EACH: 1, IN_MEMORY: 0, ON_DISK: 1, OWN: 2}
"""Parts of a location that stand for no key: which form of a value was given, and its number among the forms."""
_T = TypeVar("_T")
EachTable = Annotated[tuple[_T, ...], Field(min_length=1)]
"""A list with one value a table."""
PerTable = Annotated[
    Annotated[_T, Tag(ONE)] | Annotated[EachTable[_T], Tag(EACH)],
    Discriminator(lambda value: EACH if isinstance(value, tuple) else ONE),
]
"""One value for all tables of a model, or a list with one value a table."""


class AnyOf:
    """A value of one of several forms that may overlap: the JSON schema must not say that only one of them fits."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        node = dict(handler(schema))
        return {"anyOf": node.pop("oneOf"), **node}


# --- words -------------------------------------------------------------------------------------------------------------


class Spelling:
    """A word of a list, read as its canonical spelling.

    Args:
        words: canonical spelling -> aliases.
        reference: also accept ``package.module:NAME`` and ``path/to/file.py:NAME``, a user's own plugin.
        refused: a canonical spelling that is known but not accepted here -> what is expected instead.
        folder: package whose plugins are accepted too: a new one needs no edit here.
    """

    def __init__(
        self, words: Words, *, reference: bool = False, refused: Mapping[str, str] | None = None, folder: str | None = None
    ) -> None:
        self._refused = dict(refused or {})
        self._folder = folder
        self._reference = reference
        self._canonical = {spelling: word for word, aliases in words.items() for spelling in (word, *aliases)}
        self._accepted = [spelling for spelling, word in self._canonical.items() if word not in self._refused]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._read, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        files = [name for name in names(self._folder) if name not in self._canonical] if self._folder else []
        word = {"type": "string", "enum": [*self._accepted, *files]}
        return {"anyOf": [word, {"type": "string", "pattern": f"^{_REFERENCE}$"}]} if self._reference else word

    def _read(self, text: str) -> str:
        word = self._canonical.get(text)
        if word is None:
            return text if self._folder and text in names(self._folder) else self._read_reference(text)
        if word in self._refused:
            raise refuse(self._refused[word])
        return word

    def _read_reference(self, text: str) -> str:
        if self._reference and is_reference(text):
            if re.fullmatch(_REFERENCE, text):
                return text
            raise refuse("package.module:NAME or path/to/file.py:NAME")
        known = [*self._accepted, *(names(self._folder) if self._folder else ())]
        near = difflib.get_close_matches(text[:100], known, n=1)
        own = " or module:NAME for one of your own" if self._reference else ""
        raise refuse(f"one of {', '.join(self._accepted)}{own}", f"; did you mean {near[0]!r}?" if near else "")


class Matching:
    """Text that matches ``pattern`` as a whole, described in an error by ``expected``."""

    def __init__(self, pattern: str, expected: str) -> None:
        self._pattern = pattern
        self._expected = expected

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "pattern": f"^{self._pattern}$"}

    def _check(self, text: str) -> str:
        if re.fullmatch(self._pattern, text):
            return text
        raise refuse(self._expected)


def _check_regex(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of patterns that a later version may read differently
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise refuse("a regular expression", f": {error}") from None
    return text


def _check_hosts(text: str) -> str:
    for entry in re.split("[,;]", re.sub(r"[,;]\s*$", "", text)):  # HugeCTR reads up to a separator
        match = re.fullmatch(r"\s*(?:\w+://)?(?:\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?\s*", entry)
        if match is None:
            raise refuse("a list of host:port", f": {show(entry)} is not one")
        if match[1] and not 1 <= int(match[1]) <= 65535:
            raise refuse("ports in 1..65535", f": {match[1]} is not one")
    return text


Name = Annotated[str, Matching("[A-Za-z0-9_-]{1,120}", "1 to 120 of the characters A-Z a-z 0-9 _ -")]
PluginName = Annotated[
    str,
    Matching(rf"(?:[A-Za-z_]\w*|{_REFERENCE})", "a built-in name, package.module:NAME or path/to/file.py:NAME"),
]
SegmentName = Annotated[str, Matching(r"[^/\x00]{1,250}", "1 to 250 characters without '/'")]
SourceName = Annotated[str, Matching(r"[^\x00]{1,4096}", "a path or URI of 1 to 4096 characters")]
Regex = Annotated[str, Field(max_length=4096), AfterValidator(_check_regex)]
Hosts = Annotated[str, Field(max_length=4096), AfterValidator(_check_hosts)]
