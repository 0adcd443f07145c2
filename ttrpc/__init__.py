"""ttrpc for Python: containerd's small RPC protocol, on trio.

ttrpc carries protobuf messages over a local stream socket with ten bytes of framing: no HTTP, no
TLS, no flow control. containerd speaks it with its shims, and Kata with the agent in the guest.
This package has both sides of protocol 1.2, streaming included, and depends on nothing but trio and
protobuf's C extension. It deals in serialized messages; what they mean is up to the caller.

Serve:

    def state(context: ttrpc.CallContext, payload: bytes) -> bytes:
        return StateResponse(pid=7).SerializeToString()         # answered inline, about 20 µs

    async def wait(context: ttrpc.CallContext, payload: bytes) -> bytes:
        await exited.wait()                                     # has a task of its own
        return WaitResponse(exit_status=0).SerializeToString()

    server = ttrpc.Server({"containerd.task.v2.Task": {"State": state, "Wait": wait}})
    await server.serve(listening_socket)

Call:

    client = ttrpc.Client(connected_socket)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        answer = await client.call("containerd.task.v2.Task", "State", payload, timeout_s=2.0)
        client.close()

Layers, each usable without those below it:

    frames, events, connection    the protocol, no I/O: bytes in, events out
    client, server                trio; `transport`, `receiver`, `streams`, `session` are theirs
    descriptors                   message classes from serialized descriptors, cheap to import

What a peer can do is bounded: messages by `max_message_bytes`, calls by `max_in_flight`, answers
that are not read by a write backlog, streams by an inbox, a frame that stalls by a deadline.

Importing this package loads none of its modules: a name is loaded when it is first used, so that a
program which needs message classes only does not pay for trio.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `descriptors`: importing typing would cost more than this module
if TYPE_CHECKING:
    from ttrpc.client import Client, ClientStream
    from ttrpc.connection import Connection, ConnectionState, Oversize, Role, StreamState
    from ttrpc.errors import (
        CallTimeout,
        Code,
        ConnectionLost,
        LocalProtocolError,
        MessageTooLarge,
        ProtocolError,
        RemoteProtocolError,
        RemoteStatus,
        StatusError,
        TtrpcError,
    )
    from ttrpc.events import Status
    from ttrpc.frames import MAX_MESSAGE_BYTES
    from ttrpc.handlers import CallContext, Handler, Services, StreamHandler, default_status
    from ttrpc.peer import PeerCredentials, is_same_user, peer_credentials
    from ttrpc.server import Server
    from ttrpc.session import ServerStream

_MODULES = {
    "client": ("Client", "ClientStream"),
    "connection": ("Connection", "ConnectionState", "Oversize", "Role", "StreamState"),
    "errors": (
        "CallTimeout",
        "Code",
        "ConnectionLost",
        "LocalProtocolError",
        "MessageTooLarge",
        "ProtocolError",
        "RemoteProtocolError",
        "RemoteStatus",
        "StatusError",
        "TtrpcError",
    ),
    "events": ("Status",),
    "frames": ("MAX_MESSAGE_BYTES",),
    "handlers": ("CallContext", "Handler", "Services", "StreamHandler", "default_status"),
    "peer": ("PeerCredentials", "is_same_user", "peer_credentials"),
    "server": ("Server",),
    "session": ("ServerStream",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MAX_MESSAGE_BYTES",
    "CallContext",
    "CallTimeout",
    "Client",
    "ClientStream",
    "Code",
    "Connection",
    "ConnectionLost",
    "ConnectionState",
    "Handler",
    "LocalProtocolError",
    "MessageTooLarge",
    "Oversize",
    "PeerCredentials",
    "ProtocolError",
    "RemoteProtocolError",
    "RemoteStatus",
    "Role",
    "Server",
    "ServerStream",
    "Services",
    "Status",
    "StatusError",
    "StreamHandler",
    "StreamState",
    "TtrpcError",
    "default_status",
    "is_same_user",
    "peer_credentials",
]


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value
