"""What happens on a connection, apart from how it looks on the wire.

The first three go both ways: `Connection.receive_data` returns them and `Connection.send` takes
them. The others are only received. They are tuples because a request makes several of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ttrpc.errors import Code, Detail

Metadata = tuple[tuple[str, str], ...]
"""Pairs of key and value; a key may come several times."""


class Status(NamedTuple):
    """Why a call failed."""

    code: Code
    message: str
    details: tuple[Detail, ...] = ()


class Request(NamedTuple):
    """A call begins. `flags` is 0 for unary calls, else REMOTE_CLOSED or REMOTE_OPEN."""

    stream_id: int
    service: str
    method: str
    payload: bytes = b""
    timeout_nano: int = 0
    metadata: Metadata = ()
    flags: int = 0


class Response(NamedTuple):
    """The call ends: with a payload, or with an error if `status` is set."""

    stream_id: int
    payload: bytes = b""
    status: Status | None = None


class Data(NamedTuple):
    """A message within a streaming call; `payload` is None when there is only the end."""

    stream_id: int
    payload: bytes | None
    is_end: bool = False


class Rejected(NamedTuple):
    """The client broke a rule on one stream: answer it with this status. Server side only."""

    stream_id: int
    status: Status


class Broken(NamedTuple):
    """The server broke a rule on one stream, which is closed by it. Client side only."""

    stream_id: int
    reason: str


Event = Request | Response | Data | Rejected | Broken
