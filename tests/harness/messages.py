"""Compile proto/containerd.proto into build/ and load its message classes.

The tests speak to containerd and to shims with messages of their own, so that a slip in the
product's .proto files can't hide behind the same slip here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_tools import protoc  # type: ignore[import-untyped]  # ships no stubs

from tests.harness.node import BUILD

_PROTO = Path(__file__).with_name("proto") / "containerd.proto"
_PACKAGE = "kata.test.containerd"


def _load() -> dict[str, Any]:
    output = BUILD / "tests" / "containerd.descriptors"
    output.parent.mkdir(parents=True, exist_ok=True)
    well_known = Path(protoc.__file__).with_name("_proto")
    status = protoc.main(
        [
            "protoc",
            f"-I{_PROTO.parent}",
            f"-I{well_known}",
            "--include_imports",
            f"--descriptor_set_out={output}",
            str(_PROTO),
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc exited with {status}")
    files = descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = [
        message.name
        for file in files.file
        if file.package == _PACKAGE
        for message in file.message_type
    ]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in names
    }


#: Message class by its name in proto/containerd.proto.
MESSAGES: dict[str, Any] = _load()
