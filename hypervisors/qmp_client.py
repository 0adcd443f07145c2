"""A QMP client on trio: one reader, commands answered by id, events handed to one callback."""

from __future__ import annotations

import contextlib
import json
import socket
from array import array
from typing import TYPE_CHECKING, Final

import trio

from .errors import CommandRejected, CommandTimeout, ControlLost
from .qmp_protocol import (
    Disconnected,
    ErrorReply,
    Greeting,
    JsonValue,
    Notification,
    QmpConnection,
    QmpProtocolError,
    Reply,
    State,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio import TaskStatus

    from .qmp_protocol import QmpEvent

RECEIVE_BYTES: Final = 65536
# A healthy QEMU answers in under a millisecond; hot-plug of a large memory takes longest.
COMMAND_TIMEOUT_S: Final = 5.0


class _Pending:
    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: Reply | ErrorReply | None = None


class QmpClient:
    """Speaks QMP over a connected non-blocking unix stream socket, which it owns.

    Use: `await negotiate()`, then `run` in a nursery for as long as the VMM lives, then `execute`
    from anywhere. `on_notification` is called by the reader; it must not block.
    """

    def __init__(
        self, sock: socket.socket, on_notification: Callable[[Notification], None]
    ) -> None:
        self._socket = sock
        self._on_notification = on_notification
        self._connection = QmpConnection()
        self._pending: dict[int, _Pending] = {}
        # Held for a whole command: half of one followed by another would be read as garbage.
        self._send_lock = trio.Lock()
        self._early: list[QmpEvent] = []
        self.version: tuple[int, int, int] | None = None
        self.failure: str | None = None

    async def negotiate(self) -> None:
        """Wait for the greeting and enter command mode. The caller sets the deadline.

        Raises:
            ControlLost: the VMM ended first.
        """
        greeting = await self._next_of(Greeting)
        assert isinstance(greeting, Greeting)
        self.version = greeting.version
        _, data = self._connection.send_command("qmp_capabilities")
        await self._send(data, ())
        answer = await self._next_of(Reply)
        assert isinstance(answer, Reply)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read until the connection ends; afterwards every call raises ControlLost. Never raises.

        `failure` tells a protocol violation from an ordinary end.
        """
        task_status.started()
        try:
            for event in self._early:
                self._dispatch(event)
            self._early.clear()
            while self._connection.state is not State.CLOSED:
                for event in await self._receive():
                    self._dispatch(event)
                # A flood of events must not keep the loop from everybody else.
                await trio.lowlevel.checkpoint()
        except QmpProtocolError as error:
            self.failure = str(error)
        finally:
            self.close()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, JsonValue] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> JsonValue:
        """Send a command, with descriptors if given, and return its result.

        Cancellation: safe; the command may have taken effect, its answer is dropped.

        Raises:
            CommandRejected, CommandTimeout, ControlLost.
        """
        with trio.move_on_after(timeout_s) as scope:
            return await self._execute(command, arguments, fds)
        assert scope.cancelled_caught
        raise CommandTimeout(command, timeout_s)

    def close(self) -> None:
        """End the connection; waiting commands raise ControlLost. Idempotent."""
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        for pending in self._pending.values():
            pending.done.set()
        self._pending.clear()

    async def _execute(
        self, command: str, arguments: Mapping[str, JsonValue] | None, fds: Sequence[int]
    ) -> JsonValue:
        number = 0
        try:
            async with self._send_lock:
                if self._socket.fileno() < 0 or self._connection.state is not State.READY:
                    raise ControlLost(command)
                number, data = self._connection.send_command(command, arguments)
                pending = self._pending[number] = _Pending()
                await self._send(data, fds)
            await pending.done.wait()
        except OSError as error:
            raise ControlLost(command) from error
        finally:
            self._pending.pop(number, None)
        match pending.answer:
            case Reply(_, value):
                return value
            case ErrorReply(_, error_class, description):
                raise CommandRejected(command, error_class, description)
        raise ControlLost(command)

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        """Write a whole command. A cancelled half-written one ends the connection."""
        ancillary = []
        if fds:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes()))
        sent = 0
        try:
            while sent < len(data):
                try:
                    sent += self._socket.sendmsg([data[sent:]], ancillary)
                    ancillary = []
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
        except trio.ClosedResourceError as error:
            raise BrokenPipeError("closed") from error
        finally:
            if 0 < sent < len(data):
                self.close()

    async def _receive(self) -> list[QmpEvent]:
        while True:
            try:
                data = self._socket.recv(RECEIVE_BYTES)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    data = b""
                else:
                    continue
            except OSError:
                # Reset, or closed under us: the same to every caller.
                data = b""
            return self._connection.receive_data(data)

    async def _next_of(self, wanted: type[QmpEvent]) -> QmpEvent:
        """Negotiation only: the next event of this class; notifications are kept for `run`."""
        try:
            while True:
                for index, event in enumerate(self._early):
                    if isinstance(event, wanted):
                        return self._early.pop(index)
                    if isinstance(event, ErrorReply | Disconnected):
                        raise ControlLost("qmp_capabilities")
                self._early += await self._receive()
        except (QmpProtocolError, OSError) as error:
            raise ControlLost("qmp_capabilities") from error

    def _dispatch(self, event: QmpEvent) -> None:
        match event:
            case Reply(number, _) | ErrorReply(number, _, _):
                pending = self._pending.get(number)
                if pending is not None:
                    pending.answer = event
                    pending.done.set()
            case Notification():
                self._on_notification(event)
            case Greeting() | Disconnected():
                pass


def quote_json(value: Mapping[str, JsonValue]) -> str:
    """One JSON object as QEMU's command line takes it (-device, -blockdev, -object)."""
    return json.dumps(value, separators=(",", ":"))


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """A stream pair, ours non-blocking, the other for the VMM."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(theirs.close)
        ours.setblocking(False)
        stack.pop_all()
    return ours, theirs
