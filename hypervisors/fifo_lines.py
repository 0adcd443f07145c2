"""A fifo that a VMM writes lines to: the last of them are kept, each can be looked at."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from .console import ConsoleRing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CHUNK_BYTES: Final = 65536
KEPT_BYTES: Final = 8192
# One turn takes a full fifo; more is left to the next.
CHUNKS_A_TURN: Final = 4
# Of a chunk, the last so many lines are looked at: a VMM that was taken over could send thousands.
LINES_A_CHUNK: Final = 16


class FifoLines:
    """Makes the fifo and reads it: by `run` while its writer lives, by `drain` when it has ended.

    `on_line` gets each complete line of at most `max_line` bytes; longer ones are passed over, and
    so are the first of very many that come at once.
    """

    def __init__(
        self, path: Path, on_line: Callable[[bytes], None] | None = None, *, max_line: int = 0
    ) -> None:
        self._ring = ConsoleRing(KEPT_BYTES)
        self._on_line = on_line
        self._max_line = max_line
        self._partial = bytearray()
        self._is_skipping = False
        self._grown = trio.Event()
        os.mkfifo(path, 0o600)
        # For writing as well: a writer that does not wait for a reader finds one, and that nobody
        # has it open for writing is never the end.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def tail(self, lines: int) -> list[str]:
        """The last lines, printable."""
        return self._ring.tail(lines)

    async def grown(self) -> None:
        """Return when something has come since the last return, or after `wake`. Safe to cancel."""
        await self._grown.wait()
        self._grown = trio.Event()

    def wake(self) -> None:
        """Let `grown` return once although nothing has come."""
        self._grown.set()

    async def run(self) -> None:
        """Read until cancelled, or until `close`."""
        try:
            while self._fd >= 0:
                await trio.lowlevel.wait_readable(self._fd)
                self.drain()
        except trio.ClosedResourceError:
            return

    def drain(self) -> None:
        """Take what is in it now."""
        for _ in range(CHUNKS_A_TURN):
            if self._fd < 0:
                return
            try:
                data = os.read(self._fd, CHUNK_BYTES)
            except BlockingIOError:
                return
            self._take(data)

    def close(self) -> None:
        """Stop reading. Idempotent."""
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _take(self, data: bytes) -> None:
        self._ring.feed(data)
        self._grown.set()
        if self._on_line is None:
            return
        self._partial += data
        *lines, rest = self._partial.split(b"\n")
        if len(lines) > LINES_A_CHUNK:
            lines, self._is_skipping = lines[-LINES_A_CHUNK:], False
        for line in lines:
            if not self._is_skipping and len(line) <= self._max_line:
                self._on_line(bytes(line))
            self._is_skipping = False
        if len(rest) > self._max_line:
            self._is_skipping = True
            rest = bytearray()
        self._partial = rest
