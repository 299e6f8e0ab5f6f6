"""The messages that are made at run time are those of the public protocol, as tritonclient's generated code has them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("google.protobuf")

from hps_numba.frontends.open_inference.grpc_schema import SERVICE, schema


def same_fields(mine: Any, theirs: Any) -> int:
    """How many fields of a message are the same; those of mine have to be."""
    count = 0
    for field in mine.fields:
        other = theirs.fields_by_name[field.name]
        place = f"{mine.full_name}.{field.name}"
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), place
        assert getattr(field.containing_oneof, "name", None) == getattr(other.containing_oneof, "name", None), place
        count += 1
        if field.message_type is not None:
            assert field.message_type.full_name == other.message_type.full_name, place
            assert field.message_type.GetOptions().map_entry == other.message_type.GetOptions().map_entry, place
            count += same_fields(field.message_type, other.message_type)
        if field.enum_type is not None:
            mine_values, their_values = ({v.name: v.number for v in one.enum_type.values} for one in (field, other))
            assert mine_values == their_values, place
    return count


def test_messages_are_those_of_the_protocol() -> None:
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    count = 0
    for name, kind in schema().messages.items():
        theirs = getattr(service, name, None) or getattr(config, name)
        count += same_fields(kind.DESCRIPTOR, theirs.DESCRIPTOR)
    assert count > 150


def test_methods_are_those_of_the_protocol() -> None:
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    theirs = service.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert theirs.full_name == SERVICE
    for method in schema().methods:
        other = theirs.methods_by_name[method.name]
        assert (method.request, method.response) == (other.input_type.name, other.output_type.name)
        assert method.streams == other.client_streaming == other.server_streaming
    assert {method.name for method in schema().methods} == {
        name for name in theirs.methods_by_name if not name.startswith(("Cuda", "Trace", "Log"))
    }


def test_a_message_of_one_is_one_of_the_other() -> None:
    service = pytest.importorskip("tritonclient.grpc.service_pb2")
    mine = schema().ModelInferRequest(model_name="m", id="7", raw_input_contents=[b"ab", b""])
    mine.parameters["mode"].string_param = "max"
    tensor = mine.inputs.add(name="user", datatype="INT64", shape=[2, -1])
    tensor.contents.int64_contents.extend([1, -(2**63)])
    theirs = service.ModelInferRequest.FromString(mine.SerializeToString())
    assert theirs.SerializeToString(deterministic=True) == mine.SerializeToString(deterministic=True)
    assert theirs.inputs[0].contents.int64_contents == [1, -(2**63)] and theirs.parameters["mode"].string_param == "max"
    with pytest.raises(AttributeError):
        _ = schema().NoSuchMessage
