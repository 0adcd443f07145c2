"""Message classes from serialized descriptors, on protobuf's C extension alone.

Generated modules (`*/pb/*_pb2.py`) hold one serialized `FileDescriptorSet` and hand it to `load`.
All of them share one private descriptor pool, so that they can name one another's messages and
cannot clash with other generated code in the process. Nothing here knows a particular message.

protobuf's own generated code costs about 16 ms and 4 MiB, because it pulls in the text format, the
pure-Python fallback and the helpers of the well-known types. `_WithoutHelpers` keeps the last of
these out; consequently `Timestamp` and `Any` have their fields but no `ToDatetime` or `Pack`, and
neither has other generated code that the same process imports afterwards.
"""

from __future__ import annotations

import sys

from google._upb import _message
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

TYPE_CHECKING = False  # typing itself costs 4 ms (re, functools, contextlib): absent in `start`
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

_POOL: Final = _message.DescriptorPool()
_FILE_TAG: Final = 0x0A  # FileDescriptorSet.file = 1, length-delimited
_HELPERS: Final = "google.protobuf.internal.well_known_types"

# The extension keeps no strong reference to the classes it makes.
_classes: Final[dict[str, type[Message]]] = {}


def load(namespace: dict[str, object], file_descriptor_set: bytes) -> None:
    """Define the messages and enums of the set's last file in `namespace`.

    Files the last one depends on must be in the set before it, or loaded already; loading the same
    file twice is harmless. What the last file imports publicly is defined as well.

    Raises TypeError if a file contradicts one of the same name.
    """
    descriptor = None
    for serialized in _split(file_descriptor_set):
        descriptor = _POOL.AddSerializedFile(serialized)
    if descriptor is None:
        raise ValueError("descriptor set holds no file")
    namespace["DESCRIPTOR"] = descriptor
    with _WithoutHelpers():
        for file in (*descriptor.public_dependencies, descriptor):
            for name, message in file.message_types_by_name.items():
                namespace[name] = _class(message, str(namespace["__name__"]))
            for name, enum in file.enum_types_by_name.items():
                namespace[name] = _wrapper(enum)
                namespace.update((value.name, value.number) for value in enum.values)


def message_class(full_name: str) -> type[Message]:
    """Return the class of a message that some `load` defined, by its name on the wire.

    Raises KeyError if no loaded file has it at its top level.
    """
    return _classes[full_name]


def _wrapper(enum: _message.EnumDescriptor) -> EnumTypeWrapper:
    return EnumTypeWrapper(enum)  # type: ignore[arg-type]  # stubs know protobuf's own class only


def _class(descriptor: _message.Descriptor, module: str) -> type[Message]:
    known = _classes.get(descriptor.full_name)
    if known is not None:
        return known
    attributes = {"DESCRIPTOR": descriptor, "__module__": module}
    made = _message.MessageMeta(descriptor.name, (Message,), attributes)
    _classes[descriptor.full_name] = made  # type: ignore[assignment]  # stubs: not a subclass
    return _classes[descriptor.full_name]


def _split(file_descriptor_set: bytes) -> Iterator[bytes]:
    """Yield the serialized files of a FileDescriptorSet without decoding them."""
    position, end = 0, len(file_descriptor_set)
    while position < end:
        if file_descriptor_set[position] != _FILE_TAG:
            raise ValueError(f"descriptor set has an unexpected field at byte {position}")
        position += 1
        length = shift = 0
        while True:
            byte = file_descriptor_set[position]
            position += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        yield file_descriptor_set[position : position + length]
        position += length


class _WithoutHelpers:
    """While entered, the extension finds an empty set of helpers for well-known types.

    It imports that module once, when it makes its first message class, and keeps what it found. The
    module costs datetime, calendar, re and typing: 4 ms beside trio, 11 ms in a process without it.
    Where the real one is loaded already, it stays in use.
    """

    def __enter__(self) -> None:
        self._planted = _HELPERS not in sys.modules
        if self._planted:
            stand_in = type(sys)(_HELPERS)
            stand_in.WKTBASES = {}  # type: ignore[attr-defined]  # the one name it looks up
            sys.modules[_HELPERS] = stand_in

    def __exit__(self, *_: object) -> None:
        if self._planted:
            del sys.modules[_HELPERS]
