"""Status codes and the exceptions of this package.

TtrpcError
├── ProtocolError             abstract
│   ├── LocalProtocolError    this side tried something the protocol forbids
│   │   └── MessageTooLarge   nothing was sent, the connection is as before
│   └── RemoteProtocolError   the peer sent something the protocol forbids
├── ConnectionLost            the connection ended with the call unanswered
├── CallTimeout               this side stopped waiting; the peer may still finish the call
├── RemoteStatus              the peer answered with an error status
└── StatusError               raised by a handler to answer with an error status
"""

from __future__ import annotations

from enum import IntEnum

Detail = tuple[str, bytes]
"""A message of any type: its type URL and its serialized value."""


class Code(IntEnum):
    """What kind of failure a status tells. Source: google/rpc/code.proto."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def from_wire(cls, number: int) -> Code:
        """Return the code of a number from the peer; what is not in the table is UNKNOWN."""
        try:
            return cls(number)
        except ValueError:
            return cls.UNKNOWN


class TtrpcError(Exception):
    """Root of everything this package raises on purpose."""


class ProtocolError(TtrpcError):
    """The rules of the protocol were broken; see the two subclasses for by whom."""


class LocalProtocolError(ProtocolError):
    """This side tried something that the protocol forbids. Nothing was sent."""


class MessageTooLarge(LocalProtocolError):
    """A message of this side is over the limit; the peer would refuse it."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"message of {length} bytes is over the limit of {limit} bytes")
        self.length = length
        self.limit = limit


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids."""


class ConnectionLost(TtrpcError):
    """The connection ended, or never worked; every pending call gets one of these."""


class CallTimeout(TtrpcError):
    """No answer came in time. There is no cancel frame: the peer may still finish the call."""

    def __init__(self, service: str, method: str, timeout_s: float) -> None:
        super().__init__(f"{service}/{method} was not answered within {timeout_s:g} s")
        self.service = service
        self.method = method
        self.timeout_s = timeout_s


class RemoteStatus(TtrpcError):
    """The peer answered the call with an error."""

    def __init__(self, code: Code, message: str, details: tuple[Detail, ...] = ()) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = details


class StatusError(TtrpcError):
    """Raise this in a handler to answer with the given status."""

    def __init__(self, code: Code, message: str, details: tuple[Detail, ...] = ()) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = details
