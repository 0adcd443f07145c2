"""The command monitor of acrn-dm: commands and their acknowledgements, and events of its machine.

    -> {"command": "blkrescan", "arguments": "5,/images/a"}      <- {"ack": 0}
                                                                  <- {"vm_event": 1}

One client at a time, for both. Nothing marks a message's end: a command is what one read returned,
and what comes back is one JSON value behind the other. An acknowledgement names no command, so
there is one at a time. A command that acrn-dm does not know is not answered at all.
Source: ACRN's devicemodel/core/cmd_monitor, devicemodel/core/vm_event.c.
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Final

import trio

from .acrn_messages import MAX_MESSAGE_BYTES, MessageStream
from .errors import CommandRejected, CommandTimeout, ControlLost
from .supervision import close_socket

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .bounded_json import JsonValue

COMMAND_TIMEOUT_S: Final = 5.0


class CommandMonitor:
    """A connection to it. `run` must read for commands to be answered.

    `on_event` is called with the number of what happened, when events were registered for.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.on_event: Callable[[int], None] = lambda _: None
        self._socket = sock
        self._stream = MessageStream()
        self._lock = trio.Lock()
        self._waiting: trio.Event | None = None
        self._ack: int | None = None
        # Answers to commands that nobody waits for any more.
        self._owed = 0
        self._lost = ""

    @classmethod
    def connect(cls, path: Path) -> CommandMonitor:
        """Connect to a monitor that listens.

        Raises:
            ControlLost: it doesn't.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            # At once or not at all: a unix socket's backlog is its only queue.
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            raise ControlLost("connect", f"{path} does not answer: {error.strerror}") from error
        return cls(sock)

    async def run(self) -> None:
        """Read to the end of the connection. May be cancelled and begun again."""
        while True:
            try:
                # Never recvmsg: each answer carries a descriptor, which is dropped this way.
                data = self._socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except OSError:
                data = b""
            if not data:
                self._lose("the control connection ended")
                return
            try:
                for message in self._stream.feed(data):
                    self._take(message)
            except ValueError as error:
                self._lose(f"it sent {error}")
                return
            # A flood of events must not keep the loop from everybody else.
            await trio.lowlevel.checkpoint()

    async def command(
        self, name: str, arguments: str = "", *, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> None:
        """Have it do something. Cancellation: safe; the command may have taken effect.

        Raises:
            CommandRejected: it could not.
            CommandTimeout, ControlLost.
        """
        with trio.move_on_after(timeout_s):
            async with self._lock:
                await self._exchange(name, arguments)
            return
        raise CommandTimeout(name, timeout_s)

    def close(self) -> None:
        """End the connection; waiting and later commands raise ControlLost. Idempotent."""
        self._lose("the control connection ended")
        close_socket(self._socket)

    async def _exchange(self, name: str, arguments: str) -> None:
        answered = self._waiting = trio.Event()
        self._ack = None
        self._send(name, arguments)
        try:
            await answered.wait()
        except BaseException:
            self._owed += 1
            raise
        finally:
            self._waiting = None
        self._judge(name, self._ack)

    def _judge(self, name: str, ack: int | None) -> None:
        if ack is None:
            raise ControlLost(name, self._lost)
        if ack != 0:
            raise CommandRejected(name, f"ack {ack}", "its own words are on the console")

    def _send(self, name: str, arguments: str) -> None:
        if self._lost:
            raise ControlLost(name, self._lost)
        request = {"command": name} | ({"arguments": arguments} if arguments else {})
        data = json.dumps(request).encode()
        try:
            # In one piece, or it is read as two commands.
            if self._socket.send(data) == len(data):
                return
        except OSError as error:
            raise ControlLost(name, f"it takes no command: {error.strerror}") from error
        self._lose("half of a command was sent")
        raise ControlLost(name, self._lost)

    def _take(self, message: dict[str, JsonValue]) -> None:
        match message:
            case {"vm_event": int(number)}:
                self.on_event(number)
            case {"ack": int()} if self._owed:
                self._owed -= 1
            case {"ack": int(number)} if self._waiting is not None:
                self._ack = number
                self._waiting.set()

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why
        if self._waiting is not None:
            self._waiting.set()
