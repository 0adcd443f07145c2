"""The messages of one stream that have arrived and are not taken yet; for client and server."""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

from ttrpc.errors import Code, StatusError

MAX_WAITING_MESSAGES: Final = 64
"""Source: ttrpc stream.go, the receive buffer of a stream."""
MAX_WAITING_BYTES: Final = 8 << 20
"""Twice the largest message, so that one can arrive while another is worked on."""
FULL_GRACE_S: Final = 1.0
"""ttrpc has no flow control: a stream that is full holds up the connection, so not for long.
Source: ttrpc stream.go, ErrStreamFull."""


class Inbox:
    """A bounded queue with one reader and one writer, which ends or fails once.

    The writer calls `put` and then awaits `room`.
    """

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque()
        self._bytes = 0
        self._changed = trio.Event()
        self._taken = trio.Event()
        self._is_ended = False
        self._error: Exception | None = None

    def put(self, payload: bytes) -> None:
        if not self._is_ended:
            self._messages.append(payload)
            self._bytes += len(payload)
            self._changed.set()

    def end(self) -> None:
        self._is_ended = True
        self._changed.set()
        self._taken.set()

    def fail(self, error: Exception) -> None:
        """End with an error, which the reader gets after the messages before it."""
        if not self._is_ended:
            self._error = error
            self.end()

    async def room(self) -> None:
        """Wait until the queue is not full; fail the stream if that takes too long."""
        if not self._is_full():
            return
        with trio.move_on_after(FULL_GRACE_S):
            while self._is_full():
                self._taken = trio.Event()
                await self._taken.wait()
        if self._is_full():
            self._messages.clear()
            self._bytes = 0
            self.fail(StatusError(Code.RESOURCE_EXHAUSTED, "messages of the stream are not taken"))

    async def receive(self) -> bytes | None:
        """Return the next message, or None at the end. Raises what `fail` was given."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._messages:
            if self._is_ended:
                if self._error is not None:
                    raise self._error
                return None
            self._changed = trio.Event()
            await self._changed.wait()
        payload = self._messages.popleft()
        self._bytes -= len(payload)
        self._taken.set()
        return payload

    def _is_full(self) -> bool:
        return not self._is_ended and (
            len(self._messages) >= MAX_WAITING_MESSAGES or self._bytes > MAX_WAITING_BYTES
        )
