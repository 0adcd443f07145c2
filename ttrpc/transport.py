"""Bytes in and out of one non-blocking stream socket, on trio.

The socket is used directly and trio only waits for it: a small answer costs one `send` and no
switch of tasks. Knows nothing of frames. Used by `client` and `server`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

import trio

from ttrpc.errors import ConnectionLost

if TYPE_CHECKING:
    import socket

RECEIVE_BYTES: Final = 64 * 1024
LONGEST_RECEIVE_BYTES: Final = 1 << 20
WRITE_BACKLOG_BYTES: Final = 1 << 20
"""A writer with more than this unsent makes its producers wait."""


class Transport:
    """Owns the socket, which must be non-blocking.

    Writes keep their order and are never interleaved. `write` never waits: what the socket does not
    take at once is kept for `run_writer`, and `drain` is where a producer waits for its turn.
    """

    def __init__(
        self, sock: socket.socket, *, write_backlog_bytes: int = WRITE_BACKLOG_BYTES
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._limit = write_backlog_bytes
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._has_unsent = trio.Event()
        self._all_sent = trio.Event()
        self._below_limit = trio.Event()
        self._below_limit.set()
        self._failure: Exception | None = None

    @property
    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    @property
    def is_congested(self) -> bool:
        return self._unsent_bytes > self._limit

    async def receive(self, expected_bytes: int = 0) -> bytes:
        """Return what has arrived, waiting if nothing has; `b""` at the end.

        `expected_bytes` is what is known to come: a long message in few pieces.

        Raises ConnectionLost.
        """
        # No more than the common size on speculation: a large buffer costs page faults each time.
        size = min(max(expected_bytes, RECEIVE_BYTES), LONGEST_RECEIVE_BYTES)
        while True:
            try:
                return self._sock.recv(size)
            except BlockingIOError:
                pass
            except InterruptedError:
                continue
            except OSError as error:
                raise ConnectionLost(f"receiving failed: {error}") from error
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except (trio.ClosedResourceError, OSError) as error:
                raise ConnectionLost("the connection was closed by this side") from error

    def write(self, data: bytes) -> None:
        """Send `data` after everything written before. Raises ConnectionLost."""
        if self._failure is not None:
            raise ConnectionLost(f"sending failed: {self._failure}") from self._failure
        sent = 0 if self._unsent else self._send(data)
        if sent < len(data):
            self._unsent.append(memoryview(data)[sent:])
            self._unsent_bytes += len(data) - sent
            if not self._has_unsent.is_set():
                self._has_unsent.set()
                self._all_sent = trio.Event()
            if self.is_congested and self._below_limit.is_set():
                self._below_limit = trio.Event()

    async def drain(self) -> None:
        """Wait until the backlog is below the limit. Raises ConnectionLost."""
        while self.is_congested and self._failure is None:
            await self._below_limit.wait()
        if self._failure is not None:
            raise ConnectionLost(f"sending failed: {self._failure}") from self._failure

    async def flush(self) -> None:
        """Wait until everything is sent, or cannot be."""
        while self._unsent:
            await self._all_sent.wait()

    async def run_writer(self) -> None:
        """Send the backlog, until cancelled or sending fails; never raises."""
        while True:
            await self._has_unsent.wait()
            if self._failure is not None:
                return
            try:
                await trio.lowlevel.wait_writable(self._fd)
            except (trio.ClosedResourceError, OSError) as error:
                self._fail(error)
                return
            self._send_backlog()

    def close(self) -> None:
        """Close the socket and wake whoever waits for it. May be called again."""
        if self._fd < 0:
            return
        self._fail(ConnectionError("the connection was closed by this side"))
        trio.lowlevel.notify_closing(self._fd)
        self._fd = -1
        self._sock.close()

    def _send_backlog(self) -> None:
        while self._unsent:
            try:
                sent = self._send(self._unsent[0])
            except ConnectionLost:
                return
            self._unsent_bytes -= sent
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
                break
            self._unsent.popleft()
        else:
            self._has_unsent = trio.Event()
            self._all_sent.set()
        if not self.is_congested:
            self._below_limit.set()

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._fail(error)
            raise ConnectionLost(f"sending failed: {error}") from error

    def _fail(self, error: Exception) -> None:
        if self._failure is None:
            self._failure = error
        self._unsent.clear()
        self._unsent_bytes = 0
        self._below_limit.set()
        self._all_sent.set()
        self._has_unsent.set()
