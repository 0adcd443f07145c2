"""Netlink's framing: requests, messages, attributes. Pure; integers are the host's own order.

Just what reading a namespace takes: it is a hundred times faster than loading a library that knows
all of netlink (docs/decisions/0007). Changes with more structure go through pyroute2 in `apply`.

Source: netlink(7), rtnetlink(7), linux/netlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

NLM_F_REQUEST: Final = 0x1
NLM_F_ACK: Final = 0x4
NLM_F_DUMP_INTR: Final = 0x10
NLM_F_DUMP: Final = 0x300

NLMSG_ERROR: Final = 2
NLMSG_DONE: Final = 3

_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER


class Message(NamedTuple):
    """One netlink message without its header."""

    type: int
    flags: int
    body: bytes


def request(kind: int, body: bytes, *, flags: int = NLM_F_ACK) -> bytes:
    """Frame one request."""
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, kind, NLM_F_REQUEST | flags, 1, 0) + body


def messages(data: bytes) -> Iterator[Message]:
    """Give the messages of what one or several reads returned; a torn end is dropped."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield Message(kind, flags, data[offset + _HEADER.size : offset + length])
        offset += (length + 3) & ~3


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Give the attributes from `offset` on by their number."""
    found: dict[int, bytes] = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size or offset + length > len(data):
            break
        found[kind & _TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def number(value: bytes | None) -> int:
    """Give an integer attribute; 0 for one that is absent."""
    return int.from_bytes(value or b"", "little" if struct.pack("=H", 1)[0] else "big")


def text(value: bytes | None) -> str:
    """Give a string attribute; empty for one that is absent."""
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def refusal(message: Message) -> int:
    """Give the errno of an acknowledgement; 0 is success."""
    (code,) = struct.unpack_from("=i", message.body)
    return -int(code)
