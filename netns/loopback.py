"""Takes the TCP connections that are made to a namespace's loopback, whatever their port.

What listens on the pod's loopback does so in the virtual machine; in the namespace nobody does. A
socket-lookup program (BPF) gives every connection that arrives over `lo` to one listening socket of
ours; the accepted socket's own address tells the port that was meant. Nothing has to be undone: the
program goes with the descriptor of its link.

Source: linux/bpf.h (commands, types, `struct bpf_sk_lookup`); Documentation/bpf/prog_sk_lookup.rst.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from netns.inside import Outcome, WorkFailed, run_inside

if TYPE_CHECKING:
    from pathlib import Path

_SYS_BPF: Final = 321  # x86-64
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_MAP_TYPE_SOCKMAP: Final = 15
_PROG_TYPE_SK_LOOKUP: Final = 30
_ATTACH_SK_LOOKUP: Final = 36
_ATTR_BYTES: Final = 128
_BACKLOG: Final = 64

# Of struct bpf_sk_lookup.
_PROTOCOL, _INGRESS_IFINDEX = 12, 64
# The first link of every namespace.
_LOOPBACK: Final = 1

# Operations of the machine: load, store and move, comparisons that jump, call, exit.
_LOAD, _STORE, _MOVE, _SET, _ADD = 0x61, 0x62, 0xBF, 0xB7, 0x07
_IF_EQUAL, _IF_NOT_EQUAL, _LOAD_MAP, _CALL, _EXIT = 0x15, 0x55, 0x18, 0x85, 0x95
_MAP_FD: Final = 1  # of _LOAD_MAP: the value is a descriptor
_MAP_LOOKUP, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_PASS: Final = 1
_OUT: Final = "out"  # a jump to the end


class Steering(NamedTuple):
    """Descriptors of the listening socket and of the link that keeps the program attached."""

    listener: int
    link: int


async def steer(namespace: Path | int) -> Steering:
    """Take the connections over the loopback of `namespace` from now on.

    The descriptors are the caller's; it ends when they are closed.

    Raises:
        KernelRefused: this kernel has no such programs, or lets us have none.
        NamespaceGone, HelperLost: as `run_inside`.
    """
    listener, link = (await run_inside(namespace, "take its loopback", _steer)).fds
    return Steering(listener, link)


def _steer() -> Outcome:
    sock = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
    sock.setblocking(False)
    listener = sock.detach()
    sockets = _bpf(_MAP_CREATE, struct.pack("=IIII", _MAP_TYPE_SOCKMAP, 4, 8, 1))
    key = ctypes.create_string_buffer(bytes(4), 4)
    value = ctypes.create_string_buffer(struct.pack("=Q", listener), 8)
    _bpf(_MAP_UPDATE, struct.pack("=IxxxxQQQ", sockets, _address(key), _address(value), 0))
    program = _load(_program(sockets))
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    link = _bpf(_LINK_CREATE, struct.pack("=IIII", program, here, _ATTACH_SK_LOOKUP, 0))
    return Outcome(fds=(listener, link))


def _program(sockets: int) -> bytes:
    """Assemble: for TCP over lo, assign the one socket of the map; pass in any case."""
    code: list[tuple[int, int, int, int | str, int]] = [
        (_MOVE, 6, 1, 0, 0),  # r6: the context
        (_LOAD, 2, 6, _PROTOCOL, 0),
        (_IF_NOT_EQUAL, 2, 0, _OUT, socket.IPPROTO_TCP),
        (_LOAD, 2, 6, _INGRESS_IFINDEX, 0),
        (_IF_NOT_EQUAL, 2, 0, _OUT, _LOOPBACK),
        (_STORE, 10, 0, -4, 0),  # the map's key, on the stack
        (_MOVE, 2, 10, 0, 0),
        (_ADD, 2, 0, 0, -4),
        (_LOAD_MAP, 1, _MAP_FD, 0, sockets),
        (0, 0, 0, 0, 0),  # _LOAD_MAP's second half
        (_CALL, 0, 0, 0, _MAP_LOOKUP),
        (_IF_EQUAL, 0, 0, _OUT, 0),
        (_MOVE, 7, 0, 0, 0),  # r7: the socket, of which we hold a reference
        (_MOVE, 1, 6, 0, 0),
        (_MOVE, 2, 7, 0, 0),
        (_SET, 3, 0, 0, 0),
        (_CALL, 0, 0, 0, _SK_ASSIGN),
        (_MOVE, 1, 7, 0, 0),
        (_CALL, 0, 0, 0, _SK_RELEASE),
        (_SET, 0, 0, 0, _PASS),
        (_EXIT, 0, 0, 0, 0),
    ]
    end = len(code) - 2
    assembled = bytearray()
    for index, (operation, target, source, offset, value) in enumerate(code):
        jump = end - index - 1 if isinstance(offset, str) else offset
        assembled += struct.pack("=BBhi", operation, target | source << 4, jump, value)
    return bytes(assembled)


def _load(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attributes = struct.pack(
        "=IIQQIIQII16sII",
        _PROG_TYPE_SK_LOOKUP, len(program) // 8, _address(code), _address(licence),
        0, 0, 0, 0, 0, b"pod_loopback", 0, _ATTACH_SK_LOOKUP,
    )  # fmt: skip
    return _bpf(_PROG_LOAD, attributes)


def _bpf(command: int, attributes: bytes) -> int:
    buffer = ctypes.create_string_buffer(attributes, _ATTR_BYTES)
    result: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_BPF, command, buffer, _ATTR_BYTES)
    if result < 0:
        raise WorkFailed(f"bpf command {command}", ctypes.get_errno())
    return result


def _address(buffer: ctypes.Array[ctypes.c_char]) -> int:
    return ctypes.addressof(buffer)
