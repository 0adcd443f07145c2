"""Carries connections to the pod's loopback on the host into the virtual machine.

containerd forwards a pod's port by connecting to localhost in the pod's network namespace, where
nobody listens: the servers are in the machine. Each connection that arrives there goes on by vsock
to the agent, which connects to the same port of the machine's loopback (guest/agent/src/forward.rs,
where the few bytes before the connection's own are described).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from agent_proto.errors import AgentError

if TYPE_CHECKING:
    from netns.loopback import Steering

#: Our agent's vsock port for such connections, told to it on the kernel's command line.
FORWARD_PORT: Final = 1031
_MAX_CONNECTIONS: Final = 64  # as the agent's
_ANSWER_S: Final = 5.0
_CHUNK_BYTES: Final = 16 << 10
_CONNECTED: Final = b"\0"
# Close with a reset, which is the nearest to "connection refused" that is left to an accepted one.
_RESET: Final = struct.pack("=ii", 1, 0)

Dial = Callable[[], Awaitable[socket.socket]]


class PortForward:
    """Takes connections until cancelled; `steering` is closed then. Raises nothing of its own."""

    def __init__(self, steering: Steering, dial: Dial) -> None:
        self._listener = socket.socket(fileno=steering.listener)
        self._link = steering.link
        self._dial = dial
        self._room = trio.CapacityLimiter(_MAX_CONNECTIONS)

    async def run(self) -> None:
        """Accept and pass on. More connections than the agent takes wait to be accepted."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await self._room.acquire_on_behalf_of(token := object())
                    nursery.start_soon(self._carry, await self._accept(), token)
        finally:
            self._listener.close()
            os.close(self._link)

    async def _accept(self) -> socket.socket:
        while True:
            await trio.lowlevel.wait_readable(self._listener)
            # Gone before it was accepted, or no descriptor left for it: the next one may do.
            with contextlib.suppress(OSError):
                client = self._listener.accept()[0]
                client.setblocking(False)
                return client

    async def _carry(self, client: socket.socket, token: object) -> None:
        try:
            with client:
                guest = await self._connect(client)
                if guest is None:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    return
                with guest:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_copy, client, guest, nursery.cancel_scope)
                        nursery.start_soon(_copy, guest, client, nursery.cancel_scope)
        finally:
            self._room.release_on_behalf_of(token)

    async def _connect(self, client: socket.socket) -> socket.socket | None:
        """Reach the port that `client` meant; None if nobody listens on it in the machine."""
        try:
            guest = await self._dial()
        except AgentError:
            return None
        try:
            with trio.move_on_after(_ANSWER_S):
                await _send(guest, struct.pack(">H", client.getsockname()[1]))
                if await _receive(guest, 1) == _CONNECTED:
                    return guest
        except OSError:
            pass
        except BaseException:
            guest.close()
            raise
        guest.close()
        return None


async def _copy(source: socket.socket, target: socket.socket, both: trio.CancelScope) -> None:
    """Pass bytes on until their end, and the end, too; a broken connection ends both directions."""
    try:
        while data := await _receive(source, _CHUNK_BYTES):
            await _send(target, data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        both.cancel()


async def _receive(sock: socket.socket, count: int) -> bytes:
    while True:
        try:
            return sock.recv(count)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def _send(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)
