"""Messages of the Open Inference Protocol as protobuf makes them from a description, and a gRPC server that speaks them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from support.inference_server import DIM, Behaviour
from support.oracles import rows_of

__all__ = ["grpc_server", "message_class"]

#: message -> fields: number, name, type (a scalar of protobuf, or a message) with * if repeated, with = if one of a choice
_TEXT = """
InferParameter: 1 bool_param =bool, 2 int64_param =int64, 3 string_param =string, 4 double_param =double
Parameters: 1 key string, 2 value InferParameter
Tensor: 1 name string, 2 datatype string, 3 shape *int64, 4 parameters *Parameters
Named: 1 name string, 2 version string
ModelMetadataResponse: 1 name string, 2 versions *string, 3 platform string, 4 inputs *Tensor, 5 outputs *Tensor
RepositoryIndexResponse: 1 models *Named
ModelInferRequest: 1 model_name string, 4 parameters *Parameters, 5 inputs *Tensor, 7 raw_input_contents *bytes
ModelInferResponse: 1 model_name string, 4 parameters *Parameters, 5 outputs *Tensor, 6 raw_output_contents *bytes
"""
_MESSAGES = {
    name: [tuple(field.split()) for field in fields.split(",")]
    for name, fields in (line.split(":") for line in _TEXT.strip().splitlines())
}


@cache
def _classes() -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="inference_of_tests.proto", package="tests", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if any(kind.startswith("=") for _, _, kind in fields):
            message.oneof_decl.add(name="choice")
        for number, label, kind in fields:
            plain = kind.lstrip("*=")
            field = message.field.add(name=label, number=int(number), label=3 if kind.startswith("*") else 1)
            if plain in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".tests.{plain}"
            else:
                field.type = getattr(kinds, f"TYPE_{plain.upper()}")
            if kind.startswith("="):
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"tests.{name}")) for name in _MESSAGES}


def message_class(name: str) -> Any:
    """The class of a message."""
    return _classes()[name]


def _infer(behaviour: Behaviour, wire: bytes, context: Any) -> bytes:
    import grpc

    request = message_class("ModelInferRequest").FromString(wire)
    status = behaviour.statuses[len(behaviour.seen) % len(behaviour.statuses)]
    arrays = {
        tensor.name: np.frombuffer(raw, tensor.datatype.lower()).reshape(tensor.shape)
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
    }
    behaviour.seen.append(arrays)
    behaviour.headers.append(dict(context.invocation_metadata()))
    if status != 200:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "refused on purpose")
    response = message_class("ModelInferResponse")(model_name=request.model_name)
    half = any(one.key == "output_dtype" and one.value.string_param == "FP16" for one in request.parameters)
    for name, keys in ({"OUTPUT0": arrays["KEYS"]} if "KEYS" in arrays else arrays).items():
        rows = rows_of(keys, DIM).astype(np.float16 if half else np.float32)
        response.outputs.add(name=name, datatype="FP16" if half else "FP32", shape=rows.shape)
        response.raw_output_contents.append(rows.tobytes() + b"x" * behaviour.extra)
    return response.SerializeToString()


@contextmanager
def grpc_server(behaviour: Behaviour) -> Iterator[str]:
    """The URL of a server, while the block runs."""
    import grpc

    def metadata(wire: bytes, context: Any) -> bytes:
        name = message_class("Named").FromString(wire).name
        if name not in behaviour.models:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {name!r}")
        answer = message_class("ModelMetadataResponse")(name=name, platform="test")
        for one, kind in {"KEYS": "INT64", "NUMKEYS": "INT32", **dict.fromkeys(behaviour.tables, "INT64")}.items():
            answer.inputs.add(name=one, datatype=kind, shape=[-1])
        return answer.SerializeToString()

    def index(wire: bytes, context: Any) -> bytes:
        answer = message_class("RepositoryIndexResponse")()
        for name in behaviour.models:
            answer.models.add(name=name)
        return answer.SerializeToString()

    calls = {"ModelMetadata": metadata, "RepositoryIndex": index, "ModelInfer": lambda wire, to: _infer(behaviour, wire, to)}
    handlers = {name: grpc.unary_unary_rpc_method_handler(call) for name, call in calls.items()}
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
