"""Frames: the 10-byte header, and cutting a byte stream into frames.

Knows nothing of streams or messages. Used by `connection`.

    0        4        8     9     10
    ┌────────┬────────┬─────┬─────┬─────────┄
    │ length │ stream │type │flags│ data
    └────────┴────────┴─────┴─────┴─────────┄   numbers are big-endian; length is that of the data

Source: ttrpc PROTOCOL.md "Message Frame".
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from ttrpc.errors import MessageTooLarge, RemoteProtocolError

REQUEST: Final = 1
RESPONSE: Final = 2
DATA: Final = 3

REMOTE_CLOSED: Final = 0x01
"""The sender of this frame sends no more data on the stream."""
REMOTE_OPEN: Final = 0x02
"""On a request: data frames of the sender follow."""
NO_DATA: Final = 0x04
"""On a data frame: it carries no message, not even an empty one."""

HEADER_BYTES: Final = 10
MAX_MESSAGE_BYTES: Final = 4 << 20
"""Both reference implementations refuse more. Source: ttrpc channel.go messageLengthMax."""

_HEADER: Final = Struct(">IIBB")


class Frame(NamedTuple):
    """One frame as it is on the wire. A tuple, as one is made for every message."""

    stream_id: int
    type: int
    flags: int
    data: bytes


class OversizedFrame(NamedTuple):
    """The header of a frame over the limit; its data is thrown away as it arrives."""

    stream_id: int
    type: int
    length: int


def encode_frame(
    stream_id: int, kind: int, flags: int, data: bytes, limit: int = MAX_MESSAGE_BYTES
) -> bytes:
    """Return the bytes of a frame. Raises MessageTooLarge."""
    if len(data) > limit:
        raise MessageTooLarge(len(data), limit)
    return _HEADER.pack(len(data), stream_id, kind, flags) + data


class FrameDecoder:
    """Cuts received bytes into frames.

    Holds at most one incomplete frame of legal size, and the bytes of one `receive_data`.
    """

    def __init__(self, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._limit = max_message_bytes
        self._buffer = bytearray()
        self._to_discard = 0

    @property
    def is_mid_frame(self) -> bool:
        """Whether a frame has begun and its end has not arrived."""
        return bool(self._buffer) or self._to_discard > 0

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    @property
    def missing_bytes(self) -> int:
        """How many bytes the frame under way still lacks; 0 when that isn't known."""
        held = len(self._buffer)
        if held < HEADER_BYTES:
            return self._to_discard
        length = int.from_bytes(self._buffer[:4], "big")
        return HEADER_BYTES + length - held

    def receive_data(self, data: bytes) -> list[Frame | OversizedFrame]:
        """Return the frames that `data` completes; `b""` means that the stream ended.

        An oversized frame is reported as soon as its header is complete.

        Raises RemoteProtocolError if the stream ends within a frame.
        """
        if not data:
            return self._end()
        if self._to_discard:
            data = self._discard(data)
        if not self._buffer:
            # The common case: what arrives is whole frames, and nothing is copied twice.
            frames, consumed = self._cut(data)
            self._buffer += memoryview(data)[consumed:]
            return frames
        self._buffer += data
        frames, consumed = self._cut(self._buffer)
        del self._buffer[:consumed]
        return frames

    def _end(self) -> list[Frame | OversizedFrame]:
        if self.is_mid_frame:
            raise RemoteProtocolError("the connection ended within a frame")
        return []

    def _discard(self, data: bytes) -> bytes:
        count = min(self._to_discard, len(data))
        self._to_discard -= count
        return data[count:]

    def _cut(self, data: bytes | bytearray) -> tuple[list[Frame | OversizedFrame], int]:
        """Return the whole frames in `data`, and how many bytes are done with."""
        frames: list[Frame | OversizedFrame] = []
        position, available = 0, len(data)
        while available - position >= HEADER_BYTES:
            length, stream_id, kind, flags = _HEADER.unpack_from(data, position)
            start = position + HEADER_BYTES
            end = start + length
            if length > self._limit:
                frames.append(OversizedFrame(stream_id, kind, length))
                position = min(end, available)
                self._to_discard = end - position
            elif end <= available:
                with memoryview(data) as view:
                    frames.append(Frame(stream_id, kind, flags, bytes(view[start:end])))
                position = end
            else:
                break
        return frames, position
