"""Calls over one connection, on trio.

`Client` owns the socket. One task runs `Client.run`, which reads; any number of tasks call. Nothing
here reconnects: when the connection ends, every call gets `ConnectionLost`, and so do later ones.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import trio

from ttrpc import frames
from ttrpc.connection import Connection, Oversize, Role
from ttrpc.errors import (
    CallTimeout,
    ConnectionLost,
    LocalProtocolError,
    RemoteProtocolError,
    RemoteStatus,
    TtrpcError,
)
from ttrpc.events import Broken, Data, Event, Metadata, Request, Response
from ttrpc.receiver import FRAME_DEADLINE_S, Receiver
from ttrpc.streams import Inbox
from ttrpc.transport import Transport

if TYPE_CHECKING:
    import socket

MAX_PENDING: Final = 4096
"""Calls that wait at a time. A `Wait` pends as long as its process lives, so this must be large."""

_MAX_TIMEOUT_NANO: Final = 2**63 - 1


class Call(NamedTuple):
    """A unary call to be made; its fields are those of `Client.call`."""

    service: str
    method: str
    payload: bytes
    timeout_s: float | None = None
    metadata: Metadata = ()


class PendingCall:
    """A unary call whose request is sent, made by `Client.begin`."""

    __slots__ = ("_answer", "_answered", "_call", "_client", "_give_up_at", "_stream_id")

    def __init__(self, client: Client, stream_id: int, call: Call) -> None:
        self._client = client
        self._stream_id = stream_id
        self._call = call
        self._give_up_at = math.inf
        if call.timeout_s is not None:
            self._give_up_at = trio.current_time() + max(call.timeout_s, 0)
        self._answered = trio.Event()
        self._answer: Response | TtrpcError | None = None

    async def answer(self) -> bytes:
        """Wait for the answer's payload, once; raises as `Client.call`. Safe to cancel."""
        try:
            with trio.move_on_at(self._give_up_at):
                await self._client._transport.drain()
                await self._answered.wait()
        finally:
            self.forget()
        answer = self._answer
        if answer is None:
            assert self._call.timeout_s is not None
            raise CallTimeout(self._call.service, self._call.method, self._call.timeout_s)
        if isinstance(answer, TtrpcError):
            raise answer
        if answer.status is not None:
            raise RemoteStatus(*answer.status)
        return answer.payload

    def forget(self) -> None:
        """Ignore the answer if there still comes one. Idempotent."""
        self._client._calls.pop(self._stream_id, None)
        self._client._connection.forget(self._stream_id)

    def _finish(self, answer: Response | TtrpcError) -> None:
        self._answer = answer
        self._answered.set()


class ClientStream:
    """A streaming call, made by `Client.open_stream`; use it as an async context manager.

    Leaving the context before the end gives the call up: the peer is told that no more data comes,
    and what it still sends is ignored.
    """

    def __init__(self, client: Client, stream_id: int) -> None:
        self._client = client
        self._stream_id = stream_id
        self._inbox = Inbox()
        self._send_closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._client._abandon(self._stream_id)

    async def send(self, payload: bytes) -> None:
        """Send one message; waits while too much is unsent.

        Raises LocalProtocolError if this side is closed or the call is over, ConnectionLost.
        """
        await self._client._send(Data(self._stream_id, payload))

    async def close_send(self) -> None:
        """Tell the server that no more messages come. May be called again."""
        if not self._send_closed and self._client._is_active(self._stream_id):
            self._send_closed = True
            await self._client._send(Data(self._stream_id, None, is_end=True))

    async def receive(self) -> bytes | None:
        """Return the next message, or None when the call ended well.

        The single answer of a call that streams only towards the server is a message, too.

        Raises RemoteStatus, RemoteProtocolError, ConnectionLost.
        """
        return await self._inbox.receive()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        payload = await self._inbox.receive()
        if payload is None:
            raise StopAsyncIteration
        return payload

    def _handle(self, event: Event) -> None:
        match event:
            case Response(_, payload, None):
                # A server that streamed nothing ends with an empty response or a closing frame.
                self._inbox.put(payload)
                self._inbox.end()
            case Response(_, _, status) if status is not None:
                self._inbox.fail(RemoteStatus(*status))
            case Data(_, payload, is_end):
                if payload is not None:
                    self._inbox.put(payload)
                if is_end:
                    self._inbox.end()
            case Broken(_, reason):
                self._inbox.fail(RemoteProtocolError(reason))


class Client:
    """The calling side of a connection over a connected stream socket.

    `oversize` says what an answer over the limit does: by default it ends the connection, because a
    guest that announces 4 GiB is not to be waited for.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        max_message_bytes: int = frames.MAX_MESSAGE_BYTES,
        oversize: Oversize = Oversize.CLOSE,
        frame_deadline_s: float = FRAME_DEADLINE_S,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self._transport = Transport(sock)
        self._connection = Connection(
            Role.CLIENT, max_message_bytes=max_message_bytes, oversize=oversize
        )
        self._receiver = Receiver(
            self._transport, self._connection, frame_deadline_s=frame_deadline_s
        )
        self._max_pending = max_pending
        self._calls: dict[int, PendingCall] = {}
        self._streams: dict[int, ClientStream] = {}
        self._lost: ConnectionLost | None = None

    @property
    def ignored_frames(self) -> int:
        """How many frames came that nobody waited for: late, repeated or unasked answers."""
        return self._connection.ignored

    @property
    def is_open(self) -> bool:
        """False once the connection has ended, for whatever reason."""
        return self._lost is None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read answers until the connection ends; then close the socket and fail every call.

        Returns, rather than raises, however the connection ended. Cancelling it closes the client.
        """
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._transport.run_writer)
                task_status.started()
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._lose(ConnectionLost("the client was closed"))
            self._transport.close()

    async def call(
        self,
        service: str,
        method: str,
        payload: bytes,
        *,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> bytes:
        """Make a unary call and return the payload of its answer.

        `timeout_s` is told to the server and enforced here as well. Safe to cancel: the answer is
        ignored then, but the server is not told and may finish the call.

        Raises RemoteStatus, CallTimeout, ConnectionLost, RemoteProtocolError (this answer cannot be
        understood), LocalProtocolError (too large, or too many calls wait).
        """
        (pending,) = self.begin(Call(service, method, payload, timeout_s, metadata))
        return await pending.answer()

    def begin(self, *calls: Call) -> tuple[PendingCall, ...]:
        """Send the requests of several calls, in this order and in one piece; return at once.

        Each is to be awaited by `answer` or dropped by `forget`. Whether the server also takes them
        one after the other is its own affair.

        Raises ConnectionLost, LocalProtocolError as `call`; then nothing is sent.
        """
        pending: list[PendingCall] = []
        data = bytearray()
        try:
            for call in calls:
                stream_id, frame = self._request(*call, flags=0)
                self._calls[stream_id] = PendingCall(self, stream_id, call)
                pending.append(self._calls[stream_id])
                data += frame
            self._transport.write(bytes(data))
        except BaseException:
            for one in pending:
                one.forget()
            raise
        return tuple(pending)

    async def open_stream(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        client_streams: bool = True,
        timeout_s: float | None = None,
        metadata: Metadata = (),
    ) -> ClientStream:
        """Begin a streaming call. `client_streams` says whether this side will send messages.

        `timeout_s` bounds the whole call and is enforced by the server only.

        Raises ConnectionLost, LocalProtocolError.
        """
        flags = frames.REMOTE_OPEN if client_streams else frames.REMOTE_CLOSED
        stream_id, frame = self._request(service, method, payload, timeout_s, metadata, flags=flags)
        self._transport.write(frame)
        stream = ClientStream(self, stream_id)
        self._streams[stream_id] = stream
        await self._transport.drain()
        return stream

    def close(self) -> None:
        """End the connection; pending calls get ConnectionLost. May be called again."""
        self._lose(ConnectionLost("the client was closed"))
        self._transport.close()

    def _request(
        self,
        service: str,
        method: str,
        payload: bytes,
        timeout_s: float | None,
        metadata: Metadata,
        *,
        flags: int,
    ) -> tuple[int, bytes]:
        """Make the frame of a request; return it with its stream's number."""
        if self._lost is not None:
            raise ConnectionLost(str(self._lost)) from self._lost
        if len(self._calls) + len(self._streams) >= self._max_pending:
            raise LocalProtocolError(f"{self._max_pending} calls are waiting already")
        stream_id = self._connection.next_stream_id()
        request = Request(
            stream_id, service, method, payload, _nanoseconds(timeout_s), metadata, flags
        )
        return stream_id, self._connection.send(request)

    async def _send(self, event: Data) -> None:
        if self._lost is not None:
            raise ConnectionLost(str(self._lost)) from self._lost
        self._transport.write(self._connection.send(event))
        await self._transport.drain()

    def _is_active(self, stream_id: int) -> bool:
        return self._lost is None and stream_id in self._connection.streams

    def _abandon(self, stream_id: int) -> None:
        if self._streams.pop(stream_id, None) is None or self._lost is not None:
            return
        # It may be over already, or this side may have said so before.
        with contextlib.suppress(LocalProtocolError, ConnectionLost):
            self._transport.write(self._connection.send(Data(stream_id, None, is_end=True)))
        self._connection.forget(stream_id)

    async def _read(self) -> None:
        """Hand out events until the connection ends; `_lose` gets the reason."""
        try:
            while (events := await self._receiver.receive()) is not None:
                for event in events:
                    await self._dispatch(event)
        except ConnectionLost as error:
            self._lose(error)
        except RemoteProtocolError as error:
            lost = ConnectionLost(f"closed because of the peer: {error}")
            lost.__cause__ = error
            self._lose(lost)
        else:
            self._lose(ConnectionLost("the peer closed the connection"))

    async def _dispatch(self, event: Event) -> None:
        stream_id = event.stream_id
        pending = self._calls.get(stream_id)
        if pending is not None:
            if isinstance(event, Response):
                pending._finish(event)
            elif isinstance(event, Broken):
                pending._finish(RemoteProtocolError(event.reason))
            return
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream._handle(event)
            await stream._inbox.room()

    def _lose(self, reason: ConnectionLost) -> None:
        if self._lost is not None:
            return
        self._lost = reason
        for call in self._calls.values():
            if call._answer is None:
                call._finish(_copy(reason))
        for stream in self._streams.values():
            stream._inbox.fail(_copy(reason))


def _copy(reason: ConnectionLost) -> ConnectionLost:
    """Each waiter raises its own, as tracebacks and notes are added to what is raised."""
    copy = ConnectionLost(str(reason))
    copy.__cause__ = reason.__cause__
    return copy


def _nanoseconds(timeout_s: float | None) -> int:
    if timeout_s is None or timeout_s == math.inf:
        return 0
    # 0 means "no timeout" on the wire, so that an expired one must not become 0.
    return min(max(int(timeout_s * 1e9), 1), _MAX_TIMEOUT_NANO)
