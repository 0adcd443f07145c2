"""The handshake of hybrid vsock: a unix socket that stands for all vsock ports of one guest.

Pure: no sockets here. The host sends `CONNECT <port>\\n`; the device answers `OK <number>\\n`, and
from the next byte on the socket is the stream to that port. A device that can't connect closes.
Source: Firecracker docs/vsock.md "Host-initiated connections"; Cloud Hypervisor and
vhost-device-vsock speak the same.

    AWAITING ──line is right──> CONNECTED
        └──anything else──────> REFUSED      (HandshakeRefused is raised)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from agent_proto.errors import HandshakeRefused

# "OK 4294967295\n" has 14 bytes. The device is on the guest's side of the fence: a line longer
# than this is no answer, however it may go on.
MAX_REPLY_BYTES: Final = 64

_MAX_PORT: Final = 0xFFFF_FFFF
_START: Final = b"OK "
_REPLY: Final = re.compile(rb"OK ([0-9]{1,10})\n")


class HandshakeState(Enum):
    AWAITING = "awaiting"
    CONNECTED = "connected"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Connected:
    """The stream is open. `host_port` is the device's number for our end; `rest` belongs to it."""

    host_port: int
    rest: bytes


class Handshake:
    """The host's half of one handshake for the guest's `port`."""

    def __init__(self, port: int) -> None:
        if not 0 <= port <= _MAX_PORT:
            raise ValueError(f"vsock port {port} is not a 32-bit number")
        self.port = port
        self.state = HandshakeState.AWAITING
        self._line = b""

    def request(self) -> bytes:
        """Return the bytes that ask for the port."""
        return b"CONNECT %d\n" % self.port

    def receive_data(self, data: bytes) -> list[Connected]:
        """Take bytes of the answer; `b""` says that the device closed.

        Returns one event when the answer is complete, else none.

        Raises:
            HandshakeRefused: the answer can no longer become the right one.
            RuntimeError: the handshake is over already.
        """
        if self.state is not HandshakeState.AWAITING:
            raise RuntimeError(f"handshake is over: {self.state.value}")
        if not data:
            raise self._refuse("it closed the connection")
        room = MAX_REPLY_BYTES - len(self._line)
        end = data.find(b"\n", 0, room) + 1
        self._line += data[: end or room]
        if not _START.startswith(self._line[: len(_START)]):
            raise self._refuse("its answer is not OK")
        if not end:
            if len(self._line) == MAX_REPLY_BYTES:
                raise self._refuse(f"no end of line within {MAX_REPLY_BYTES} bytes")
            return []
        match = _REPLY.fullmatch(self._line)
        if match is None or int(match[1]) > _MAX_PORT:
            raise self._refuse("its answer is not OK")
        self.state = HandshakeState.CONNECTED
        return [Connected(int(match[1]), data[end:])]

    def _refuse(self, reason: str) -> HandshakeRefused:
        self.state = HandshakeState.REFUSED
        return HandshakeRefused(self.port, reason, self._line)
