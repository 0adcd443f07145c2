"""The reading half that client and server share: bytes to events, with the frame deadline.

A peer may be silent between frames for as long as it likes, but a frame that it has begun must be
completed in time: otherwise one byte a second pins a task and a buffer for ever.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import trio

from ttrpc.errors import RemoteProtocolError

if TYPE_CHECKING:
    from ttrpc.connection import Connection
    from ttrpc.events import Event
    from ttrpc.transport import Transport

FRAME_DEADLINE_S: Final = 10.0
"""Long enough for 4 MiB from a guest under emulation, short enough to notice a stalled one."""


class Receiver:
    """Yields the events of a connection, batch by batch."""

    def __init__(
        self, transport: Transport, connection: Connection, *, frame_deadline_s: float
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._frame_deadline_s = frame_deadline_s
        self._frame_deadline = math.inf

    async def receive(self) -> list[Event] | None:
        """Return the next events, possibly none; None when the peer ended the connection.

        Raises ConnectionLost, RemoteProtocolError (also for a frame that takes too long).
        """
        connection = self._connection
        if not connection.is_mid_frame:
            data = await self._transport.receive()
            events = connection.receive_data(data)
        else:
            with trio.move_on_at(self._frame_deadline) as scope:
                data = await self._transport.receive(connection.missing_bytes)
            if scope.cancelled_caught:
                raise RemoteProtocolError(
                    f"a frame was not complete after {self._frame_deadline_s:g} s"
                )
            events = connection.receive_data(data)
            if not events:
                return events if data else None
        # Either a frame was completed or the first bytes of one came: what is incomplete is new.
        if connection.is_mid_frame:
            self._frame_deadline = trio.current_time() + self._frame_deadline_s
        return events if data else None
