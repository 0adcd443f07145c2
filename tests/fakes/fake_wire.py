"""The socket side of the fake agent: hybrid vsock handshake, and frames spoilt on purpose.

Between the real ttrpc server and the client under test stands a relay that knows frame borders, so
that a test can have any answer cut, doubled, slowed down or replaced.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable
from enum import Enum
from pathlib import Path

import trio

# Source: ttrpc PROTOCOL.md "Message Frame": length, stream id, type, flags; big-endian.
HEADER = struct.Struct(">IIBB")


class Spoil(Enum):
    """What happens to each frame on its way to the client."""

    NOTHING = "nothing"
    TRUNCATE = "half of it, then end of stream"
    GARBAGE = "as many other bytes instead"
    HANG_HALFWAY = "half of it, then silence"
    SLOW = "a byte a second"
    OTHER_STREAM = "for a stream that nobody opened"
    EVEN_STREAM = "for a stream that only a server could open"
    TWICE = "two times"
    HUGE = "a header that announces 4 GiB"
    UNKNOWN_TYPE = "of a type that does not exist"


class FakeWire:
    """Listens on a unix socket as a hybrid vsock device and relays to `serve`.

    Everything may be changed while it runs; a new value holds from the next frame or handshake on.
    """

    def __init__(self, uds_path: Path, port: int = 1024) -> None:
        self.uds_path = uds_path
        self.port = port
        self.spoil = Spoil.NOTHING
        self.refuses = 0
        self.handshake: Callable[[bytes], bytes | None] = self._agree
        self.connections = 0
        self._scopes: set[trio.CancelScope] = set()

    def _agree(self, line: bytes) -> bytes | None:
        # A device hangs up when nobody listens on the guest's port.
        if line != b"CONNECT %d\n" % self.port:
            return b""
        if self.refuses:
            self.refuses -= 1
            return b""
        return b"OK 1073741824\n"

    def drop(self) -> None:
        """Cut all connections, as the death of the VM does."""
        for scope in self._scopes:
            scope.cancel()

    async def listen(
        self,
        serve: Callable[[socket.socket], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections until cancelled; `serve` gets the server's end of each."""
        with bound(self.uds_path) as listener:
            try:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    while True:
                        sock, _ = await listener.accept()
                        self.connections += 1
                        nursery.start_soon(self._connection, sock, serve)
            finally:
                self.uds_path.unlink(missing_ok=True)

    async def _connection(
        self, sock: trio.socket.SocketType, serve: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        with sock, trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                if await self._shake_hands(sock):
                    await self._relay(sock, serve)
            except OSError:
                pass  # the client is gone
            finally:
                self._scopes.discard(scope)

    async def _shake_hands(self, sock: trio.socket.SocketType) -> bool:
        line = b""
        while not line.endswith(b"\n"):
            byte = await sock.recv(1)
            if not byte:
                return False
            line += byte
        answer = self.handshake(line)
        if answer is None:
            await trio.sleep_forever()
            raise AssertionError
        if answer:
            await sock.send(answer)
        return answer.startswith(b"OK ") and answer.endswith(b"\n")

    async def _relay(
        self, sock: trio.socket.SocketType, serve: Callable[[socket.socket], Awaitable[None]]
    ) -> None:
        far, near = socket.socketpair()
        far.setblocking(False)
        middle = trio.socket.from_stdlib_socket(near)
        with far, middle:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, sock, middle)
                nursery.start_soon(self._copy_frames, middle, sock, nursery.cancel_scope)
                await serve(far)
                far.close()

    async def _copy_frames(
        self,
        source: trio.socket.SocketType,
        target: trio.socket.SocketType,
        scope: trio.CancelScope,
    ) -> None:
        while header := await _exactly(source, HEADER.size):
            length = HEADER.unpack(header)[0]
            body = await _exactly(source, length) if length else b""
            if not await self._pass_on(header, body, target):
                break
        scope.cancel()

    async def _pass_on(self, header: bytes, body: bytes, target: trio.socket.SocketType) -> bool:
        length, stream, kind, flags = HEADER.unpack(header)
        frame = header + body
        match self.spoil:
            case Spoil.TRUNCATE:
                await _send(target, frame[: len(frame) // 2])
                return False
            case Spoil.HANG_HALFWAY:
                await _send(target, frame[: len(frame) // 2])
                return True
            case Spoil.SLOW:
                for byte in frame:
                    await trio.sleep(1)
                    await _send(target, bytes([byte]))
                return True
            case Spoil.GARBAGE:
                frame = b"\xff" * len(frame)
            case Spoil.OTHER_STREAM:
                frame = HEADER.pack(length, stream + 1000, kind, flags) + body
            case Spoil.EVEN_STREAM:
                frame = HEADER.pack(length, stream + 1, kind, flags) + body
            case Spoil.TWICE:
                frame *= 2
            case Spoil.HUGE:
                frame = HEADER.pack(0xFFFF_FFFF, stream, kind, flags) + body
            case Spoil.UNKNOWN_TYPE:
                frame = HEADER.pack(length, stream, 0x7F, flags) + body
        await _send(target, frame)
        return True


def bound(path: Path) -> trio.socket.SocketType:
    """Return a unix socket that listens at `path`.

    trio's own bind goes through a thread, which a clock that jumps doesn't wait for.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    sock.listen(16)
    return trio.socket.from_stdlib_socket(sock)


async def _copy(source: trio.socket.SocketType, target: trio.socket.SocketType) -> None:
    while data := await source.recv(65536):
        await _send(target, data)
    target.shutdown(socket.SHUT_WR)


async def _send(target: trio.socket.SocketType, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[await target.send(view) :]


async def _exactly(source: trio.socket.SocketType, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await source.recv(size - len(data))
        if not more:
            return b""
        data += more
    return data
