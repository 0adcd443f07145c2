"""One connection of a server: reads requests, runs handlers, writes answers.

Made by `server.Server` for each accepted socket. Nothing a peer sends makes it raise: what breaks a
rule on one stream is answered there, what breaks the framing ends this connection.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Self

import trio

from ttrpc.connection import Connection, ConnectionState, Oversize, Role
from ttrpc.errors import Code, ConnectionLost, LocalProtocolError, MessageTooLarge, StatusError
from ttrpc.events import Data, Event, Rejected, Request, Response, Status
from ttrpc.frames import REMOTE_OPEN
from ttrpc.handlers import CallContext, StreamHandler
from ttrpc.peer import peer_credentials
from ttrpc.receiver import Receiver
from ttrpc.streams import Inbox
from ttrpc.transport import Transport

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable

    from ttrpc.server import Server

_BATCH_BYTES: Final = 256 * 1024
"""Answers made inline are sent together up to this size."""
_BATCH_REQUESTS: Final = 64
"""Requests answered inline before other tasks get their turn: about a millisecond."""
MAX_MESSAGE_LENGTH: Final = 64 * 1024
"""Characters of a status message; more is cut, so that an error can always be sent."""


class ServerStream:
    """A streaming call, as its handler sees it."""

    def __init__(self, session: Session, stream_id: int) -> None:
        self._session = session
        self._stream_id = stream_id
        self._inbox = Inbox()

    async def receive(self) -> bytes | None:
        """Return the client's next message, or None when it sends no more.

        Raises StatusError if the client broke a rule, which a handler should let pass.
        """
        return await self._inbox.receive()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        payload = await self._inbox.receive()
        if payload is None:
            raise StopAsyncIteration
        return payload

    async def send(self, payload: bytes) -> None:
        """Send one message; waits while too much is unsent.

        Raises MessageTooLarge, LocalProtocolError (the stream is over), ConnectionLost.
        """
        await self._session.send(Data(self._stream_id, payload))


class Session:
    """The server's side of one connection."""

    def __init__(self, server: Server, sock: socket.socket) -> None:
        self._server = server
        self._transport = Transport(sock)
        self._connection = Connection(
            Role.SERVER, max_message_bytes=server.max_message_bytes, oversize=Oversize.DISCARD
        )
        self._receiver = Receiver(
            self._transport, self._connection, frame_deadline_s=server.frame_deadline_s
        )
        self._peer = peer_credentials(sock)
        self._streams: dict[int, ServerStream] = {}
        self._in_flight = 0
        self._idle = trio.Event()
        self._idle.set()
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()

    async def run(self) -> None:
        """Serve until the connection ends. Handlers that still run then are cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._transport.run_writer)
                await self._read(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._transport.close()
            self._ended.set()

    async def finish(self, farewell_s: float = 0) -> None:
        """Wait until no call is active and every answer is sent; then end the connection.

        The peer has `farewell_s` to end it first.
        """
        while self._in_flight:
            await self._idle.wait()
        await self._transport.flush()
        with trio.move_on_after(farewell_s):
            await self._ended.wait()
        self.cancel()

    def cancel(self) -> None:
        """End the connection and whatever it runs."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def send(self, event: Data) -> None:
        """Raises ConnectionLost, MessageTooLarge, LocalProtocolError (the stream is over)."""
        if self._connection.state is not ConnectionState.OPEN:
            raise ConnectionLost("the peer closed the connection")
        self._transport.write(self._connection.send(event))
        await self._transport.drain()

    async def _read(self, nursery: trio.Nursery) -> None:
        handled = 0
        while (events := await self._receiver.receive()) is not None:
            answers: list[bytes] = []
            size = 0
            for event in events:
                answer = self._handle(nursery, event)
                if answer is not None:
                    answers.append(answer)
                    size += len(answer)
                elif type(event) is Data and event.stream_id in self._streams:
                    await self._streams[event.stream_id]._inbox.room()
                if size > _BATCH_BYTES:
                    self._transport.write(b"".join(answers))
                    await self._transport.drain()
                    answers, size = [], 0
            if answers:
                self._transport.write(answers[0] if len(answers) == 1 else b"".join(answers))
                if self._transport.is_congested:
                    await self._transport.drain()
            handled += len(events)
            if handled > _BATCH_REQUESTS:
                handled = 0
                await trio.lowlevel.checkpoint()

    def _handle(self, nursery: trio.Nursery, event: Event) -> bytes | None:
        """Act on one event; return the answer if there is one at once."""
        match event:
            case Request():
                return self._begin(nursery, event)
            case Data(stream_id, payload, is_end):
                stream = self._streams.get(stream_id)
                if stream is not None:
                    if payload is not None:
                        stream._inbox.put(payload)
                    if is_end:
                        stream._inbox.end()
                return None
            case Rejected(stream_id, status):
                stream = self._streams.get(stream_id)
                if stream is not None:
                    stream._inbox.fail(StatusError(*status))
                return self._encode(Response(stream_id, b"", status))
            case _:
                return None

    def _begin(self, nursery: trio.Nursery, request: Request) -> bytes | None:
        server = self._server
        methods = server.services.get(request.service)
        if methods is None:
            return self._refuse(request, Code.UNIMPLEMENTED, f"service {request.service}")
        handler = methods.get(request.method)
        if handler is None:
            return self._refuse(request, Code.UNIMPLEMENTED, f"method {request.method}")
        if server.is_closing:
            return self._refuse(request, Code.UNAVAILABLE, "server is shutting down")
        context = self._context(nursery, request)
        if isinstance(handler, StreamHandler):
            return self._begin_stream(nursery, context, request, handler)
        try:
            result = handler(context, request.payload)
        except Exception as error:
            return self._encode(self._failure(context, request.stream_id, error))
        if type(result) is bytes:
            return self._encode(Response(request.stream_id, result))
        if not hasattr(result, "__await__"):
            fault = TypeError(f"handler returned {type(result).__name__}, not bytes")
            return self._encode(self._failure(context, request.stream_id, fault))
        return self._start(nursery, context, request, result)

    def _begin_stream(
        self, nursery: trio.Nursery, context: CallContext, request: Request, handler: StreamHandler
    ) -> bytes | None:
        """The first message may be in the request; an empty one counts if nothing follows.

        Source: ttrpc services.go, "Empty proto messages serialized to 0 payloads".
        """
        stream = ServerStream(self, request.stream_id)
        has_more = bool(request.flags & REMOTE_OPEN)
        if request.payload or not has_more:
            stream._inbox.put(request.payload)
        if not has_more:
            stream._inbox.end()
        self._streams[request.stream_id] = stream
        try:
            work = handler.function(context, stream)
        except Exception as error:
            del self._streams[request.stream_id]
            return self._encode(self._failure(context, request.stream_id, error))
        return self._start(nursery, context, request, work)

    def _start(
        self,
        nursery: trio.Nursery,
        context: CallContext,
        request: Request,
        work: Awaitable[bytes | None],
    ) -> bytes | None:
        """Give the call a task, or refuse it if there are too many."""
        if self._in_flight >= self._server.max_in_flight:
            self._streams.pop(request.stream_id, None)
            if hasattr(work, "close"):
                work.close()
            return self._refuse(request, Code.RESOURCE_EXHAUSTED, "too many active calls")
        self._in_flight += 1
        if self._in_flight == 1:
            self._idle = trio.Event()
        nursery.start_soon(self._run_call, context, request.stream_id, work, name=context.method)
        return None

    def _context(self, nursery: trio.Nursery, request: Request) -> CallContext:
        deadline = math.inf
        if request.timeout_nano:
            deadline = trio.current_time() + request.timeout_nano / 1e9
        return CallContext(
            request.service,
            request.method,
            request.metadata,
            deadline,
            self._peer,
            nursery.cancel_scope,
        )

    async def _run_call(
        self, context: CallContext, stream_id: int, work: Awaitable[bytes | None]
    ) -> None:
        try:
            answer = await self._outcome(context, stream_id, work)
            self._transport.write(self._encode(answer))
            await self._transport.drain()
        except ConnectionLost:
            pass  # the reader notices as well and ends the session
        finally:
            self._streams.pop(stream_id, None)
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def _outcome(
        self, context: CallContext, stream_id: int, work: Awaitable[bytes | None]
    ) -> Response | Data:
        try:
            with trio.CancelScope(deadline=context.deadline) as scope:
                result = await work
        except Exception as error:
            return self._failure(context, stream_id, error)
        if scope.cancelled_caught:
            status = Status(Code.DEADLINE_EXCEEDED, f"{context.method} took too long")
            return Response(stream_id, b"", status)
        if isinstance(result, bytes):
            return Response(stream_id, result)
        if result is None and stream_id in self._streams:
            return Data(stream_id, None, is_end=True)
        fault = TypeError(f"handler returned {type(result).__name__}, not bytes")
        return self._failure(context, stream_id, fault)

    def _refuse(self, request: Request, code: Code, message: str) -> bytes:
        return self._encode(Response(request.stream_id, b"", Status(code, message)))

    def _failure(self, context: CallContext, stream_id: int, error: Exception) -> Response:
        status = self._server.status_of(context, error)
        return Response(stream_id, b"", status)

    def _encode(self, event: Response | Data) -> bytes:
        """Serialize an answer; one that cannot be sent becomes an error that can."""
        if isinstance(event, Response) and event.status is not None:
            event = event._replace(status=_sendable(event.status))
        try:
            return self._connection.send(event)
        except MessageTooLarge as error:
            status = Status(Code.RESOURCE_EXHAUSTED, str(error))
        except LocalProtocolError:
            # The stream was ended by a rejection while its handler ran.
            return b""
        return self._connection.send(Response(event.stream_id, b"", status))


def _sendable(status: Status) -> Status:
    """Cut the message, and replace what is not valid UTF-8: protobuf refuses lone surrogates."""
    message = status.message[:MAX_MESSAGE_LENGTH]
    return status._replace(message=message.encode("utf-8", "replace").decode())
