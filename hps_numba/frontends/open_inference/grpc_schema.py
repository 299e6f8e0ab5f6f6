"""The messages of the protocol's gRPC side, made at run time from ``open_inference.proto``.

Problem: code that ``protoc`` generates demands a runtime at least as new as its generator, and registers its messages in one
pool for the whole process, in which ``tritonclient`` has messages of the same names. Choice: the file is read here, into a
pool of our own, with any runtime. Turned down: generated code (two of them cannot live in one process), and ``grpcio-tools``
at run time (40 MB for one file).

What is read is what that file uses of proto3: messages, enums, ``repeated``, ``map``, ``oneof`` and one service.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

__all__ = ["SERVICE", "Method", "Schema", "schema"]

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
_PLACE = "hps_numba.frontends.open_inference"
_FILE = "open_inference.proto"
#: descriptor.proto's numbers of the scalar types, and of messages and enums
_SCALARS = {"double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
_MESSAGE, _ENUM = 11, 14
_OPTIONAL, _REPEATED = 1, 3
_TOKENS = re.compile(r"//[^\n]*|\"[^\"]*\"|[\w.]+|[{}()<>=;,]")


@dataclass(frozen=True)
class Method:
    """A method of the service.

    Attributes:
        name: of it.   request, response: names of their messages.   streams: whether both sides are streams.
    """

    name: str
    request: str
    response: str
    streams: bool


@dataclass(frozen=True)
class Schema:
    """Attributes: messages: their classes by name.   methods: of the service."""

    messages: Mapping[str, Any]
    methods: tuple[Method, ...]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.messages[name]
        except KeyError:
            raise AttributeError(name) from None


@cache
def schema() -> Schema:
    """Messages and methods; made once a process.

    Raises:
        ImportError: protobuf is not installed.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]

    file = descriptor_pb2.FileDescriptorProto(name=f"hps_numba/{_FILE}", package=PACKAGE, syntax="proto3")
    methods = _Reader(files(_PLACE).joinpath(_FILE).read_text("utf-8")).read(file)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindFileByName(file.name).message_types_by_name
    return Schema({name: message_factory.GetMessageClass(kind) for name, kind in found.items()}, tuple(methods))


class _Reader:
    """Reads a file into its descriptor."""

    def __init__(self, text: str) -> None:
        self._tokens = [token for token in _TOKENS.findall(text) if not token.startswith("//")]
        self._enums = set(re.findall(r"^enum (\w+)", text, re.MULTILINE))
        self._at = 0

    def read(self, file: Any) -> list[Method]:
        """Fill the descriptor; returns the methods, as servers name these themselves."""
        methods: list[Method] = []
        while self._at < len(self._tokens):
            word = self._next()
            if word == "message":
                self._message(file.message_type.add(), f".{PACKAGE}")
            elif word == "enum":
                self._enum(file.enum_type.add())
            elif word == "service":
                methods += self._service()
            else:  # syntax, package
                self._until(";")
        return methods

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _until(self, end: str) -> list[str]:
        start = self._at
        self._at = self._tokens.index(end, start) + 1
        return self._tokens[start : self._at - 1]

    def _message(self, message: Any, scope: str) -> None:
        message.name = self._next()
        scope = f"{scope}.{message.name}"
        self._next()  # {
        union: int | None = None  # the number of the oneof that fields are in
        while True:
            word = self._next()
            if word == "message":
                self._message(message.nested_type.add(), scope)
            elif word == "oneof":
                union = len(message.oneof_decl)
                message.oneof_decl.add(name=self._next())
                self._next()
            elif word != "}":
                self._at -= 1
                self._field(message, scope, self._until(";"), union)
            elif union is not None:
                union = None
            else:
                return

    def _field(self, message: Any, scope: str, words: list[str], union: int | None) -> None:
        *kind, name, _, number = words
        field = message.field.add(name=name, number=int(number), label=_REPEATED if len(kind) > 1 else _OPTIONAL)
        if kind[0] == "map":  # map < key , value >
            entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
            entry.options.map_entry = True
            for part, type_, at in (("key", kind[2], 1), ("value", kind[4], 2)):
                self._type(entry.field.add(name=part, number=at, label=_OPTIONAL), type_, message, scope)
            field.type, field.type_name = _MESSAGE, f"{scope}.{entry.name}"
            return
        self._type(field, kind[-1], message, scope)
        if union is not None:
            field.oneof_index = union

    def _type(self, field: Any, name: str, message: Any, scope: str) -> None:
        if name in _SCALARS:
            field.type = _SCALARS[name]
            return
        nested = any(one.name == name for one in message.nested_type)
        field.type = _ENUM if name in self._enums else _MESSAGE
        field.type_name = f"{scope}.{name}" if nested else f".{PACKAGE}.{name}"

    def _enum(self, enum: Any) -> None:
        enum.name = self._next()
        self._next()
        while self._next() != "}":
            self._at -= 1
            name, _, number = self._until(";")
            enum.value.add(name=name, number=int(number))

    def _service(self) -> Iterator[Method]:
        for _ in ("name", "{"):
            self._next()
        while self._next() != "}":
            words = [word for word in self._until(";") if word not in "()"]
            name, *sides = (word for word in words if word not in ("stream", "returns"))
            yield Method(name, sides[0], sides[1], "stream" in words)
