"""One connection's protocol state, without any I/O.

`receive_data` turns bytes into events, `send` turns events into bytes. Client and server share the
code; `Role` says which side this is. The caller owns the socket, the deadlines and the limits on
how much may be going on at once.

A stream from one side's view (`here` may send, `there` may send):

                     request, flags 0 or REMOTE_CLOSED
      idle ──────────────────────────────────────────────► HALF (only the server may send)
        │            request, flags REMOTE_OPEN                ▲           │
        └────────────────────────────────────────► OPEN ───────┘           │
                                                    │   client's end       │
                                                    ▼                      ▼
                                    response, or the server's end: gone (ids are never reused)

Source: ttrpc PROTOCOL.md "Streaming", "Stream State".
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ttrpc import frames
from ttrpc.errors import Code, LocalProtocolError, RemoteProtocolError
from ttrpc.events import Broken, Data, Event, Rejected, Request, Response, Status
from ttrpc.frames import Frame, FrameDecoder, OversizedFrame
from ttrpc.pb import ttrpc_pb2 as pb

MAX_STREAM_ID: Final = 2**32 - 1
MAX_METADATA_PAIRS: Final = 1024
MAX_DETAILS: Final = 64
"""Two bytes on the wire become a Python object of hundreds, so these are counted first."""


class Role(Enum):
    """Which side of the connection this is."""

    CLIENT = "client"
    SERVER = "server"


class ConnectionState(Enum):
    """Whether the connection can still be used."""

    OPEN = "open"
    CLOSED = "closed"
    """The peer ended it between two frames."""
    ERROR = "error"
    """The peer broke the framing; nothing that follows can be understood."""


class StreamState(Enum):
    """What may still come on a stream that is not over."""

    UNARY = "unary"
    """Only a response may follow."""
    HALF = "half"
    """Only the server may send."""
    OPEN = "open"
    """Both may send."""


class Oversize(Enum):
    """What a received message over the limit does."""

    DISCARD = "discard"
    """It fails its own call only; its bytes are read and thrown away."""
    CLOSE = "close"
    """It ends the connection: the way to treat a peer that is not trusted."""


_OPENED_AS: Final = {
    0: StreamState.UNARY,
    frames.REMOTE_CLOSED: StreamState.HALF,
    frames.REMOTE_OPEN: StreamState.OPEN,
}


class Connection:
    """The state of one connection.

    `ignored` counts frames that the protocol says to ignore: late answers, answers to calls that
    were never made, unknown types.
    """

    def __init__(
        self,
        role: Role,
        *,
        max_message_bytes: int = frames.MAX_MESSAGE_BYTES,
        oversize: Oversize = Oversize.DISCARD,
    ) -> None:
        self.role = role
        self.state = ConnectionState.OPEN
        self.ignored = 0
        self.streams: dict[int, StreamState] = {}
        self._oversize = oversize
        self._max_message_bytes = max_message_bytes
        self._decoder = FrameDecoder(max_message_bytes)
        self._last_stream_id = -1
        self._is_server = role is Role.SERVER

    @property
    def is_mid_frame(self) -> bool:
        """Whether a frame has begun to arrive and is not complete."""
        return self._decoder.is_mid_frame

    @property
    def missing_bytes(self) -> int:
        """How many bytes complete the frame under way; 0 when that isn't known."""
        return self._decoder.missing_bytes

    @property
    def buffered_bytes(self) -> int:
        return self._decoder.buffered_bytes

    def next_stream_id(self) -> int:
        """Return the id for the next request. Raises LocalProtocolError when ids are used up."""
        following = self._last_stream_id + 2
        if following > MAX_STREAM_ID:
            raise LocalProtocolError("all stream ids of the connection are used up")
        return following

    def forget(self, stream_id: int) -> None:
        """Give up on a stream: what still comes for it is ignored. The peer is not told."""
        self.streams.pop(stream_id, None)

    def receive_data(self, data: bytes) -> list[Event]:
        """Return what `data` means; `b""` means that the peer ended the connection.

        Raises RemoteProtocolError if the framing is broken; the connection is over then.
        """
        if self.state is not ConnectionState.OPEN:
            raise LocalProtocolError(f"data received on a connection in state {self.state.value}")
        try:
            received = self._decoder.receive_data(data)
        except RemoteProtocolError:
            self.state = ConnectionState.ERROR
            raise
        if not data:
            self.state = ConnectionState.CLOSED
        understand = self._from_client if self._is_server else self._from_server
        events: list[Event] = []
        for frame in received:
            event = understand(frame) if isinstance(frame, Frame) else self._oversized(frame)
            if event is None:
                self.ignored += 1
            else:
                events.append(event)
        return events

    def send(self, event: Request | Response | Data) -> bytes:
        """Return the bytes that tell the peer of `event`.

        Raises LocalProtocolError (the state is as before), MessageTooLarge.
        """
        if self.state is not ConnectionState.OPEN:
            raise LocalProtocolError(f"connection is {self.state.value}")
        match event:
            case Response():
                return self._send_response(event)
            case Request():
                return self._send_request(event)
            case Data():
                return self._send_data(event)

    # What the peer sent

    def _from_client(self, frame: Frame) -> Event | None:
        stream_id = frame.stream_id
        if frame.type == frames.REQUEST:
            if stream_id % 2 != 1:
                return _rejected(stream_id, "StreamID must be odd for client initiated streams")
            if stream_id <= self._last_stream_id:
                return _rejected(stream_id, "StreamID cannot be re-used and must increment")
            self._last_stream_id = stream_id
            return self._received_request(frame)
        if frame.type == frames.DATA:
            return self._data_from_client(frame)
        return None

    def _received_request(self, frame: Frame) -> Event:
        try:
            message = pb.Request.FromString(frame.data)
        except Exception as error:  # upb raises DecodeError, but also MemoryError and others
            return _rejected(frame.stream_id, f"request cannot be decoded: {error}")
        metadata = message.metadata
        if len(metadata) > MAX_METADATA_PAIRS:
            return _rejected(frame.stream_id, f"more than {MAX_METADATA_PAIRS} metadata pairs")
        if frame.flags & frames.REMOTE_OPEN:
            self.streams[frame.stream_id] = StreamState.OPEN
        else:
            # Servers tell unary from streaming by the method, so that old clients work too.
            self.streams[frame.stream_id] = StreamState.HALF
        return Request(
            frame.stream_id,
            message.service,
            message.method,
            message.payload,
            message.timeout_nano,
            tuple([(pair.key, pair.value) for pair in metadata]) if metadata else (),
            frame.flags,
        )

    def _data_from_client(self, frame: Frame) -> Event:
        state = self.streams.get(frame.stream_id)
        if state is None:
            return _rejected(frame.stream_id, "StreamID is no longer active")
        if state is not StreamState.OPEN:
            return _rejected(frame.stream_id, "data after the end of the client's data")
        event = _data(frame)
        if event.is_end:
            self.streams[frame.stream_id] = StreamState.HALF
        return event

    def _from_server(self, frame: Frame) -> Event | None:
        state = self.streams.get(frame.stream_id)
        if state is None:
            return None
        if frame.type == frames.RESPONSE:
            del self.streams[frame.stream_id]
            return _received_response(frame)
        if frame.type != frames.DATA:
            return None
        if state is StreamState.UNARY:
            del self.streams[frame.stream_id]
            return Broken(frame.stream_id, "the server sent stream data in a unary call")
        event = _data(frame)
        if event.is_end:
            del self.streams[frame.stream_id]
        return event

    def _oversized(self, frame: OversizedFrame) -> Event | None:
        reason = f"message length {frame.length} exceeds maximum of {self._max_message_bytes} bytes"
        if self._oversize is Oversize.CLOSE:
            self.state = ConnectionState.ERROR
            raise RemoteProtocolError(reason)
        if self._is_server:
            if frame.type == frames.REQUEST and frame.stream_id > self._last_stream_id:
                self._last_stream_id = frame.stream_id
            return Rejected(frame.stream_id, Status(Code.RESOURCE_EXHAUSTED, reason))
        if self.streams.pop(frame.stream_id, None) is None:
            return None
        return Broken(frame.stream_id, reason)

    # What this side sends

    def _send_response(self, event: Response) -> bytes:
        if not self._is_server:
            raise LocalProtocolError("a client sends no responses")
        if event.status is None:
            message = pb.Response(payload=event.payload)
        else:
            message = pb.Response(status=_wire_status(event.status), payload=event.payload)
        data = self._frame(event.stream_id, frames.RESPONSE, 0, message.SerializeToString())
        # Not every response belongs to a stream: rejections may name any id.
        self.streams.pop(event.stream_id, None)
        return data

    def _send_request(self, event: Request) -> bytes:
        if self._is_server:
            raise LocalProtocolError("a server sends no requests")
        if event.stream_id % 2 != 1 or not self._last_stream_id < event.stream_id <= MAX_STREAM_ID:
            raise LocalProtocolError(f"stream id {event.stream_id} is even, used or out of range")
        opened_as = _OPENED_AS.get(event.flags)
        if opened_as is None:
            raise LocalProtocolError(f"a request cannot have the flags {event.flags:#04x}")
        message = pb.Request(
            service=event.service,
            method=event.method,
            payload=event.payload,
            timeout_nano=event.timeout_nano,
            metadata=[pb.KeyValue(key=key, value=value) for key, value in event.metadata],
        )
        serialized = message.SerializeToString()
        data = self._frame(event.stream_id, frames.REQUEST, event.flags, serialized)
        self._last_stream_id = event.stream_id
        self.streams[event.stream_id] = opened_as
        return data

    def _send_data(self, event: Data) -> bytes:
        state = self.streams.get(event.stream_id)
        if state is None:
            raise LocalProtocolError(f"stream {event.stream_id} is over")
        if not self._is_server and state is not StreamState.OPEN:
            raise LocalProtocolError(f"this side of stream {event.stream_id} is closed")
        flags = frames.REMOTE_CLOSED if event.is_end else 0
        if event.payload is None:
            flags |= frames.NO_DATA
        data = self._frame(event.stream_id, frames.DATA, flags, event.payload or b"")
        if event.is_end:
            # A server's end is the end of the whole stream. Source: ttrpc server.go closeStream.
            if self._is_server:
                del self.streams[event.stream_id]
            else:
                self.streams[event.stream_id] = StreamState.HALF
        return data

    def _frame(self, stream_id: int, kind: int, flags: int, data: bytes) -> bytes:
        return frames.encode_frame(stream_id, kind, flags, data, self._max_message_bytes)


def _rejected(stream_id: int, message: str) -> Rejected:
    return Rejected(stream_id, Status(Code.INVALID_ARGUMENT, message))


def _data(frame: Frame) -> Data:
    """The Go server refuses a message in a closing frame; the specification allows it."""
    has_message = bool(frame.data) or not frame.flags & frames.NO_DATA
    is_end = bool(frame.flags & frames.REMOTE_CLOSED)
    return Data(frame.stream_id, frame.data if has_message else None, is_end)


def _received_response(frame: Frame) -> Response | Broken:
    try:
        message = pb.Response.FromString(frame.data)
        if not message.HasField("status") or message.status.code == Code.OK:
            return Response(frame.stream_id, message.payload)
        status = Status(
            Code.from_wire(message.status.code),
            message.status.message,
            tuple(
                (detail.type_url, detail.value) for detail in message.status.details[:MAX_DETAILS]
            ),
        )
    except Exception as error:  # upb raises DecodeError, but also MemoryError and others
        return Broken(frame.stream_id, f"response cannot be decoded: {error}")
    return Response(frame.stream_id, message.payload, status)


def _wire_status(status: Status) -> pb.Status:
    message = pb.Status(code=status.code, message=status.message)
    for type_url, value in status.details:
        message.details.add(type_url=type_url, value=value)
    return message
