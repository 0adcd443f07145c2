"""What an application writes to serve calls, and what it is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from ttrpc.errors import Code, StatusError
from ttrpc.events import Status

if TYPE_CHECKING:
    import trio

    from ttrpc.events import Metadata
    from ttrpc.peer import PeerCredentials
    from ttrpc.session import ServerStream


class CallContext:
    """What is known of a call besides its payload.

    `deadline` is on trio's clock, infinite if the client gave none; the server enforces it.
    `connection_scope` is cancelled when the client's connection ends.
    """

    __slots__ = ("connection_scope", "deadline", "metadata", "method", "peer", "service")

    def __init__(
        self,
        service: str,
        method: str,
        metadata: Metadata,
        deadline: float,
        peer: PeerCredentials | None,
        connection_scope: trio.CancelScope,
    ) -> None:
        self.service = service
        self.method = method
        self.metadata = metadata
        self.deadline = deadline
        self.peer = peer
        self.connection_scope = connection_scope

    def values(self, key: str) -> list[str]:
        """Return the values of a metadata key, in the order they came."""
        return [value for name, value in self.metadata if name == key]


UnaryHandler = Callable[[CallContext, bytes], bytes | Awaitable[bytes]]
"""A plain function is answered inline: nothing else on the connection is read meanwhile, and it
must not take long. An `async def`, or a plain function that chooses to return an awaitable, gets a
task of its own, which is cancelled when the call's deadline passes or the connection ends.

It may raise StatusError; whatever else it raises goes through `Server`'s `status_from`."""

StreamFunction = Callable[[CallContext, "ServerStream"], Awaitable[bytes | None]]


class StreamHandler:
    """Marks a function as the handler of a streaming method.

    The function takes messages with `stream.receive()` and gives some with `stream.send()`. If it
    returns bytes, they are the single answer of a method that streams only towards the server.
    """

    __slots__ = ("function",)

    def __init__(self, function: StreamFunction) -> None:
        self.function = function


Handler = UnaryHandler | StreamHandler
Services = Mapping[str, Mapping[str, Handler]]
"""Full service name, then method name: `{"containerd.task.v2.Task": {"State": state}}`."""

StatusFrom = Callable[[BaseException], Status]


def default_status(error: BaseException) -> Status:
    """Return a StatusError's own status; UNKNOWN and the text of others, as Go's server does."""
    if isinstance(error, StatusError):
        return Status(error.code, error.message, error.details)
    return Status(Code.UNKNOWN, str(error) or type(error).__name__)
