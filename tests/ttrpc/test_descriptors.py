from __future__ import annotations

import copy

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError, Message

import ttrpc
from agent_proto.pb import agent_pb2, oci_pb2
from shimv2.pb import containerd_task_pb2
from ttrpc import descriptors
from ttrpc.pb import ttrpc_pb2, well_known_pb2


def descriptor_set(package: str, *, with_nested: bool = False) -> bytes:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"test/{package}.proto", package=package, syntax="proto3"
    )
    outer = file.message_type.add(name="Outer")
    outer.enum_type.add(name="Kind").value.add(name="A", number=0)
    outer.enum_type[0].value.add(name="B", number=1)
    if with_nested:
        outer.nested_type.add(name="Inner").field.add(
            name="kind", number=1, type=14, label=1, type_name=f".{package}.Outer.Kind"
        )
        file.enum_type.add(name="Top").value.add(name="TOP", number=0)
    return descriptor_pb2.FileDescriptorSet(file=[file]).SerializeToString()


def test_messages_round_trip():
    sent = ttrpc_pb2.Request(service="s", metadata=[ttrpc_pb2.KeyValue(key="k", value="v")])
    assert ttrpc_pb2.Request.FromString(sent.SerializeToString()) == sent
    assert isinstance(sent, Message)


def test_packages_share_one_class_of_each_well_known_type():
    state = containerd_task_pb2.StateResponse()
    state.exited_at.seconds = -62135596800
    assert type(state.exited_at) is well_known_pb2.Timestamp
    assert descriptors.message_class("google.protobuf.Any") is well_known_pb2.Any


def test_field_names_are_as_given_in_the_proto():
    spec = oci_pb2.Spec(Hostname="h")
    request = agent_pb2.CreateContainerRequest(OCI=spec)
    assert request.OCI.Hostname == "h"
    assert copy.deepcopy(request) == request


def test_nested_types_and_enums_are_reachable():
    descriptors.load(namespace := {"__name__": "n"}, descriptor_set("nested", with_nested=True))
    outer = namespace["Outer"]
    inner = outer.Inner(kind=outer.Kind.Value("B"))
    assert (inner.kind, outer.B, namespace["TOP"]) == (1, 1, 0)


def test_loading_a_file_again_is_harmless_and_gives_the_same_class():
    descriptors.load(first := {"__name__": "a"}, descriptor_set("small"))
    descriptors.load(second := {"__name__": "b"}, descriptor_set("small"))
    assert first["Outer"] is second["Outer"]


@pytest.mark.parametrize("data", [b"", b"\x12\x00", b"\n\x05abc"])
def test_broken_descriptor_sets_are_refused(data):
    with pytest.raises((ValueError, TypeError)):
        descriptors.load({"__name__": "n"}, data)


def test_hostile_bodies_raise_decode_errors_only():
    for body in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a\x01\xff", b"\x1b" * 1000):
        with pytest.raises(DecodeError):
            ttrpc_pb2.Request.FromString(body)


def test_public_names_are_loaded_on_first_use():
    for name in ttrpc.__all__:
        assert getattr(ttrpc, name) is not None
    with pytest.raises(AttributeError):
        ttrpc.Nothing  # noqa: B018
