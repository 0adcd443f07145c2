"""Both ends of a connection for tests, and frames written by hand."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from struct import Struct
from typing import TYPE_CHECKING

import trio

from ttrpc.client import Client
from ttrpc.frames import REQUEST, Frame, FrameDecoder
from ttrpc.pb import ttrpc_pb2 as pb
from ttrpc.server import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ttrpc.handlers import Services

HEADER = Struct(">IIBB")


def frame(stream_id: int, kind: int, flags: int = 0, data: bytes = b"") -> bytes:
    return HEADER.pack(len(data), stream_id, kind, flags) + data


def request(stream_id: int, method: str, payload: bytes = b"", *, flags: int = 0, **more) -> bytes:
    message = pb.Request(service="test", method=method, payload=payload, **more)
    return frame(stream_id, REQUEST, flags, message.SerializeToString())


def response_of(received: Frame) -> pb.Response:
    return pb.Response.FromString(received.data)


class RawPeer:
    """A peer that sends whatever bytes a test wants and reads frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._decoder = FrameDecoder(1 << 30)
        self._frames: list[Frame] = []

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[await self.socket.send(view) :]

    async def frame(self) -> Frame | None:
        """Return the next frame; None when the other side closed the connection."""
        while not self._frames:
            try:
                data = await self.socket.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            self._frames.extend(self._decoder.receive_data(data))
        return self._frames.pop(0)

    async def response(self) -> pb.Response:
        received = await self.frame()
        assert received is not None, "the connection was closed"
        return response_of(received)

    def close(self) -> None:
        self.socket.close()


@asynccontextmanager
async def serving(services: Services | None = None, **options) -> AsyncIterator[RawPeer]:
    """Serve one connection and give its raw other end."""
    ours, theirs = socket.socketpair()
    server = Server(services or {"test": {}}, **options)
    peer = RawPeer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, ours)
        try:
            yield peer
        finally:
            peer.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def calling(**options) -> AsyncIterator[tuple[Client, RawPeer]]:
    """Run a client and give it with the raw other end."""
    ours, theirs = socket.socketpair()
    client, peer = Client(ours, **options), RawPeer(theirs)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            yield client, peer
        finally:
            client.close()
            peer.close()


@asynccontextmanager
async def connected(services: Services, **options) -> AsyncIterator[Client]:
    """Run a server and a client on one connection."""
    ours, theirs = socket.socketpair()
    server, client = Server(services, **options), Client(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_connection, ours)
        await nursery.start(client.run)
        try:
            yield client
        finally:
            client.close()
            nursery.cancel_scope.cancel()
