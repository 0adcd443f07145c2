"""The messages are upstream's on the wire: no name, number or type may drift."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from agent_proto.pb import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2

# Observed: kata-containers 7c6ba40c54 (4.1.0); made by `digest` below from upstream's own five
# files, loaded into a pool of their own.
UPSTREAM_4_1 = "567ac74e389a35a4babbc982c12d0188d9d1efe147202ddf32d2200229a5711b"

FILES = (agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2)


def facts(file: Any) -> Iterator[str]:
    """Yield one line for each thing of a file that is visible on the wire."""
    for message in file.message_types_by_name.values():
        yield from message_facts(message)
    for enum in file.enum_types_by_name.values():
        yield enum_facts(enum)
    for service in file.services_by_name.values():
        for method in service.methods:
            ends = f"{method.input_type.full_name} -> {method.output_type.full_name}"
            streams = f"{method.client_streaming} {method.server_streaming}"
            yield f"method {method.full_name}: {ends} {streams}"


def message_facts(message: Any) -> Iterator[str]:
    yield f"message {message.full_name}"
    for field in message.fields:
        of = field.message_type or field.enum_type
        kind = f"{field.type} {field.is_repeated} {field.is_packed} {field.has_presence}"
        oneof = field.containing_oneof.name if field.containing_oneof else "-"
        name = of.full_name if of else "-"
        yield f"field {message.full_name}.{field.name} = {field.number}: {kind} {name} {oneof}"
    for enum in message.enum_types:
        yield enum_facts(enum)
    for nested in message.nested_types:
        yield from message_facts(nested)


def enum_facts(enum: Any) -> str:
    return f"enum {enum.full_name}: {[(value.name, value.number) for value in enum.values]}"


def digest(files: list[Any]) -> str:
    lines = sorted(line for file in files for line in facts(file))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_every_name_number_and_type_is_upstreams():
    assert digest([module.DESCRIPTOR for module in FILES]) == UPSTREAM_4_1


def test_bytes_of_a_request_are_as_the_numbers_say():
    request = agent_pb2.CreateContainerRequest(
        container_id="c", exec_id="c", sandbox_pidns=True, stdin_port=9
    )
    request.OCI.Process.Args.append("sh")
    request.storages.add(driver="blk", mount_point="/m")
    assert (
        request.SerializeToString()
        == bytes.fromhex(
            "0a0163"  # 1 container_id
            "120163"  # 2 exec_id
            "2a09" + "0a03626c6b" + "32022f6d"  # 5 storages: 1 driver, 6 mount_point
            "3206" + "1204" + "22027368"  # 6 OCI: 2 Process: 4 Args
            "3801"  # 7 sandbox_pidns
            "4809"  # 9 stdin_port
        )
    )
