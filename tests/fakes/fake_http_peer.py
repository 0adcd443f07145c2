"""A VMM's HTTP API on a unix socket, which answers as a test's script says.

    async with scripted_api(path) as api:
        api.on("PUT", "/api/v1/vm.boot", 204)
        api.on("GET", "/vm", 200, {"state": "Running"})
        api.default = 204          # whatever has no script of its own
        ...
        api.requests               # Seen: method, target, body, fds (ours to close: the peer does)

A script entry may be a status with a body, or an async function of the request that returns
bytes to send as they are. Parsing is by hand, so that the client's HTTP is not checked by itself.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio


@dataclass
class Seen:
    """One request as it arrived. `fds` are the identities (device, inode) of what came along."""

    method: str
    target: str
    headers: dict[str, str]
    body: Any
    fds: list[tuple[int, int]] = field(default_factory=list)


Script = Callable[[Seen], Awaitable[bytes]]


def answer(status: int, body: object = None) -> bytes:
    """An answer as the VMMs write it: no length with 204."""
    head = f"HTTP/1.1 {status} \r\nServer: fake\r\nConnection: keep-alive\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


class ScriptedApi:
    """What the peer says, and what it has heard."""

    def __init__(self) -> None:
        self.requests: list[Seen] = []
        self.connections = 0
        self.default: int | None = None
        self._scripts: dict[tuple[str, str], list[Script]] = {}

    def on(self, method: str, target: str, status: int | Script, body: object = None) -> None:
        """Add an answer; the last one added for a request is given again and again."""
        script = status if callable(status) else _constant(answer(status, body))
        self._scripts.setdefault((method, target), []).append(script)

    def bodies(self, target: str) -> list[Any]:
        """The bodies of all requests to one target."""
        return [seen.body for seen in self.requests if seen.target == target]

    async def reply(self, seen: Seen) -> bytes:
        self.requests.append(seen)
        scripts = self._scripts.get((seen.method, seen.target), [])
        if not scripts:
            status = 404 if self.default is None else self.default
            return answer(status, ["no script"] if status == 404 else None)
        return await (scripts.pop(0) if len(scripts) > 1 else scripts[0])(seen)

    async def serve(self, listener: trio.socket.SocketType) -> None:
        """Accept and answer until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await listener.accept()
                self.connections += 1
                nursery.start_soon(self._serve_one, sock)

    async def _serve_one(self, sock: trio.socket.SocketType) -> None:
        with sock:
            stream = _Stream(sock)
            try:
                while (seen := await stream.request()) is not None:
                    await trio.SocketStream(sock).send_all(await self.reply(seen))
            except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                return


class _Stream:
    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._socket = sock
        self._buffer = b""
        self._fds: list[tuple[int, int]] = []

    async def request(self) -> Seen | None:
        while b"\r\n\r\n" not in self._buffer:
            if not await self._more():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", "0"))
        while len(self._buffer) < length:
            if not await self._more():
                return None
        content, self._buffer = self._buffer[:length], self._buffer[length:]
        fds, self._fds = self._fds, []
        return Seen(method, target, headers, json.loads(content) if content else None, fds)

    async def _more(self) -> bool:
        data, ancillary, _, _ = await self._socket.recvmsg(65536, socket.CMSG_SPACE(256))
        for _, _, packed in ancillary:
            for at in range(0, len(packed), 4):
                fd = int.from_bytes(packed[at : at + 4], "little")
                status = os.fstat(fd)
                self._fds.append((status.st_dev, status.st_ino))
                os.close(fd)
        self._buffer += data
        return bool(data)


def _constant(data: bytes) -> Script:
    async def reply(_: Seen) -> bytes:
        await trio.lowlevel.checkpoint()
        return data

    return reply


@asynccontextmanager
async def scripted_api(path: Path) -> AsyncIterator[ScriptedApi]:
    """Listen on `path` for as long as the context lasts."""
    api = ScriptedApi()
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen(8)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(api.serve, listener)
            yield api
            nursery.cancel_scope.cancel()
