"""A lookup as a message: what to look up, the rows, and both as JSON text or as bytes. Knows no framework and no protocol.

A network front end reads a ``Request`` from the body of a call, lets ``respond`` answer it, and writes the ``Response``.

*JSON*: arrays are nested lists; absent fields have their defaults::

    {"model": "m", "tables": [{"table": 0, "keys": [1, 5]}, {"table": "t", "keys": [7, 8], "offsets": [0, 2], "mode": "mean"}]}

*Bytes*: 4 bytes ``HPS1``, the length of a head as uint32, the head, then the arrays, each at a multiple of 8 bytes from the
start; all little-endian. The head is the JSON with ``{"dtype": "<i8", "shape": [2]}`` in place of each array. Reading copies
nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, TypeVar

import numpy as np

from hps_numba.arrays.bags import COMBINERS
from hps_numba.arrays.buffer_pool import aligned_empty
from hps_numba.arrays.host import to_host
from hps_numba.config.messages import show
from hps_numba.errors import ConfigError, VersionError
from hps_numba.server.hps import HPS

__all__ = ["Request", "Response", "TableRequest", "respond"]

_MAGIC, _HEAD = b"HPS1", struct.Struct("<4sI")
_ALIGNMENT = 8
_OUTPUT_TYPES = ("float32", "float16")
_ARRAYS = {"keys": "iu", "offsets": "iu", "weights": "fiu", "rows": "f"}  # field: kinds of dtype
_DTYPES = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8")


@dataclass(frozen=True, eq=False)
class TableRequest:
    """Keys of one table.

    Attributes:
        table: its number in the model, or its name.
        keys: integers of any shape ``S``; with offsets ``[n]``.
        offsets: integers ``[bags + 1]``, ascending from 0 to ``n``: one pooled row for each bag. None: a row for each key.
        weights: numbers ``[n]``, or None: all are 1.   mode: of pooling: ``sum`` (also None), ``mean``, ``sqrtn`` or ``max``.
    """

    table: int | str
    keys: np.ndarray
    offsets: np.ndarray | None = None
    weights: np.ndarray | None = None
    mode: str | None = None

    def check(self, place: str) -> None:
        """
        Raises:
            ConfigError: fields of another type, or that do not go together.
        """
        if isinstance(self.table, bool) or not isinstance(self.table, (int, str)):
            raise ConfigError(f"{place}.table: expected the number or name of a table, got {self.table!r}")
        if self.mode is not None and self.mode not in tuple(COMBINERS):  # it may be a list
            raise ConfigError(f"{place}.mode: expected one of {', '.join(COMBINERS)}, got {self.mode!r}")
        if self.offsets is None and (self.mode is not None or self.weights is not None):
            raise ConfigError(f"{place}.offsets: expected offsets with mode or weights, got none")
        for name in ("keys", "offsets", "weights"):
            array = getattr(self, name)
            if array is None and name != "keys":
                continue
            if not isinstance(array, np.ndarray) or array.dtype.kind not in _ARRAYS[name]:
                expected = "numbers" if name == "weights" else "integers"
                raise ConfigError(f"{place}.{name}: expected {expected}, got {_kind_of(array)}")


def _kind_of(value: Any) -> str:
    return str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__


class _Message:
    """What requests and responses share: both forms, one of which has the arrays in it and one beside it."""

    def _plain(self, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """The message as JSON's types, with ``put(array)`` for each array."""
        raise NotImplementedError

    def to_json(self) -> str:
        """The message as JSON."""
        return json.dumps(self._plain(np.ndarray.tolist))

    def to_bytes(self) -> bytes:
        """The message as bytes."""
        arrays: list[np.ndarray] = []

        def put(array: np.ndarray) -> dict[str, Any]:
            arrays.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")))
            return {"dtype": arrays[-1].dtype.str, "shape": list(array.shape)}

        head = json.dumps(self._plain(put)).encode()
        parts, size = [_HEAD.pack(_MAGIC, len(head)), head], _HEAD.size + len(head)
        for array in arrays:
            padding = -size % _ALIGNMENT
            parts += [bytes(padding), array.tobytes()]
            size += padding + array.nbytes
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Self:
        """The request or response in a message; its arrays are read-only views of it.

        Raises:
            ConfigError: it is not a whole message, or not of this kind.
        """
        head, take = _unpacked(data)
        return cls._of(head, take)

    @classmethod
    def _of(cls, values: Any, array_of: Callable[[Any, str], np.ndarray]) -> Self:
        """The message of JSON's types, with ``array_of(value, place)`` for each array."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Request(_Message):
    """Rows of some tables of one model.

    Attributes:
        model: its name.   tables: the keys of each.   output_dtype: of the rows: ``float32`` or ``float16``.
        version: number of the version of the model that has to answer, or None: any.

    Raises:
        ConfigError: a field is of another type, or fields do not go together; the message names it.
    """

    model: str
    tables: tuple[TableRequest, ...]
    output_dtype: str = "float32"
    version: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str):
            raise ConfigError(f"model: expected a name, got {self.model!r}")
        if self.output_dtype not in _OUTPUT_TYPES:
            raise ConfigError(f"output_dtype: expected one of {', '.join(_OUTPUT_TYPES)}, got {self.output_dtype!r}")
        if self.version is not None and (isinstance(self.version, bool) or not isinstance(self.version, int)):
            raise ConfigError(f"version: expected an integer, got {self.version!r}")
        for number, table in enumerate(self.tables):
            table.check(f"tables[{number}]")

    def _plain(self, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        tables = [
            {
                field.name: put(value) if isinstance(value, np.ndarray) else value
                for field in fields(table)
                if (value := getattr(table, field.name)) is not None
            }
            for table in self.tables
        ]
        plain = {"model": self.model, "tables": tables, "output_dtype": self.output_dtype}
        return plain if self.version is None else {**plain, "version": self.version}

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The request in a text.

        Raises:
            ConfigError: it is not JSON, or not of a request.   KeyDtypeError: keys or offsets are not integers.
        """
        return cls._of(_parsed(text), _array_of_lists)

    @classmethod
    def _of(cls, values: Any, array_of: Callable[[Any, str], np.ndarray]) -> Self:
        given = _checked(values, cls, "request")
        tables = given.get("tables")
        if not isinstance(tables, list):
            raise ConfigError(f"tables: expected a list, got {type(tables).__name__}")
        given["tables"] = tuple(_table_of(table, f"tables[{number}]", array_of) for number, table in enumerate(tables))
        return cls(**given)


@dataclass(frozen=True, eq=False)
class Response(_Message):
    """The answer to a request.

    Attributes:
        model, version: who answered.
        rows: for each table of the request in turn: ``S + (dim,)`` or ``[bags, dim]``, of ``output_dtype``.
    """

    model: str
    version: int
    rows: tuple[np.ndarray, ...]

    def _plain(self, put: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        return {"model": self.model, "version": self.version, "rows": [put(rows) for rows in self.rows]}

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The response in a text, with rows in float32.

        Raises:
            ConfigError: it is not JSON, or not of a response.
        """
        return cls._of(_parsed(text), _floats_of_lists)

    @classmethod
    def _of(cls, values: Any, array_of: Callable[[Any, str], np.ndarray]) -> Self:
        given = _checked(values, cls, "response")
        rows = given.get("rows")
        if not isinstance(rows, list):
            raise ConfigError(f"rows: expected a list, got {type(rows).__name__}")
        given["rows"] = tuple(array_of(some, f"rows[{number}]") for number, some in enumerate(rows))
        return cls(**given)


def respond(server: HPS, request: Request) -> Response:
    """Answer a request, all tables from one version of the model.

    Raises:
        UnknownModelError: no such model or table.   VersionError: another version is in force.
        Otherwise as ``HPS.lookup`` and ``HPS.lookup_pooled``.
    """
    rows, version = server.direct.read_one_version(request.model, lambda: tuple(_rows_of(server, request)))
    if request.version not in (None, version):
        raise VersionError(f"version: expected {version}, which model {request.model!r} has, got {request.version}")
    return Response(request.model, version, rows)


def _rows_of(server: HPS, request: Request) -> Iterator[np.ndarray]:
    for one in request.tables:
        if one.offsets is None:
            dim = server.direct.table_spec(request.model, one.table).dim
            rows = aligned_empty((*one.keys.shape, dim))
            server.direct.lookup_into(one.keys, request.model, one.table, rows)
        else:
            mode = one.mode or "sum"
            rows = server.lookup_pooled(
                one.keys, one.offsets, request.model, one.table, None, weights=one.weights, combiner=mode
            )
        yield rows.astype(request.output_dtype, copy=False)


# -- reading ---------------------------------------------------------------------

T = TypeVar("T")


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:  # UnicodeDecodeError is a ValueError
        raise ConfigError(f"request: expected JSON, got {problem}") from problem


def _checked(values: Any, kind: type[Any], place: str) -> dict[str, Any]:
    """The fields of a message, known ones only and with none missing."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place}: expected an object, got {type(values).__name__}")
    known = [field.name for field in fields(kind)]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(f"{place}: expected fields of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    missing = [name for name in known[:2] if name not in values]  # the others have defaults, or are checked as lists
    if missing:
        raise ConfigError(f"{place}.{missing[0]}: expected a value, got none")
    return dict(values)


def _table_of(values: Any, place: str, array_of: Callable[[Any, str], np.ndarray]) -> TableRequest:
    given = _checked(values, TableRequest, place)
    for name in _ARRAYS:
        if given.get(name) is not None:
            given[name] = array_of(given[name], f"{place}.{name}")
    return TableRequest(**given)


def _array_of_lists(values: Any, place: str) -> np.ndarray:
    if not isinstance(values, (list, int)) or isinstance(values, bool):
        raise ConfigError(f"{place}: expected a list, got {type(values).__name__}")
    return _floats_of_lists(values, place) if place.endswith(".weights") else to_host(values, place)


def _floats_of_lists(values: Any, place: str) -> np.ndarray:
    try:
        if wrong := _no_number_in(values):  # NumPy reads null as NaN, and text as the number that it holds
            raise TypeError(f"{wrong} among them")
        with np.errstate(over="raise"):
            return np.asarray(values, np.float32)
    except (ValueError, TypeError, OverflowError, FloatingPointError, RecursionError) as problem:
        raise ConfigError(f"{place}: expected lists of numbers, all of one length, got {problem}") from problem


def _no_number_in(values: Any) -> str:
    """The first value in nested lists that is no number, in words; empty if there is none."""
    if not isinstance(values, list):
        return "" if type(values) in (int, float) else show(values)
    if set(map(type, values)) <= {int, float}:
        return ""
    return next(filter(None, map(_no_number_in, values)), "")


def _unpacked(data: bytes | memoryview) -> tuple[Any, Callable[[Any, str], np.ndarray]]:
    """The head of a message, and what reads its arrays one after the other."""
    view = memoryview(data).cast("B")
    if len(view) < _HEAD.size or (head := _HEAD.unpack_from(view))[0] != _MAGIC:
        raise ConfigError(f"message: expected {_MAGIC.decode()} at its start, got {bytes(view[:4])!r}")
    at = _HEAD.size + head[1]
    if at > len(view):
        raise ConfigError(f"message: expected a head of {head[1]} bytes, got {len(view) - _HEAD.size}")

    def take(values: Any, place: str) -> np.ndarray:
        nonlocal at
        dtype, shape = (values.get("dtype"), values.get("shape")) if isinstance(values, dict) else (None, None)
        if dtype not in _DTYPES or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ConfigError(f"{place}: expected dtype and shape of an array, got {values!r}")
        at += -at % _ALIGNMENT
        kind, n = np.dtype(dtype), 1
        for size in shape:
            n *= size
        if n * kind.itemsize > len(view) - at:
            raise ConfigError(f"{place}: expected {n * kind.itemsize} bytes, got {max(len(view) - at, 0)}")
        try:
            array = np.frombuffer(view, kind, n, at if n else 0).reshape(shape)
        except (ValueError, OverflowError) as problem:  # too many dimensions, or one too large beside one of 0
            raise ConfigError(f"{place}: expected a shape that NumPy has, got {shape}: {problem}") from problem
        array.flags.writeable = False
        at += array.nbytes
        return array

    return _parsed(bytes(view[_HEAD.size : at])), take
