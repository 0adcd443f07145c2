"""A ttrpc server on trio: accepts connections and keeps each one in a `session.Session`."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

import trio

from ttrpc import frames
from ttrpc.errors import Code, ConnectionLost, RemoteProtocolError
from ttrpc.events import Status
from ttrpc.handlers import CallContext, Services, StatusFrom, default_status
from ttrpc.peer import PeerCredentials, peer_credentials
from ttrpc.receiver import FRAME_DEADLINE_S
from ttrpc.session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

MAX_IN_FLIGHT: Final = 1024
"""Calls of one connection that have a task. Every `Wait` of a client is one of them."""

ACCEPT_OVERLOAD: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What `accept` says when the system, not the socket, is at its limits. Source: accept(2)."""
_ACCEPT_PASSING: Final = frozenset(
    {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ETIMEDOUT, errno.EINTR}
)
_OVERLOAD_PAUSE_S: Final = 0.1
SHUTDOWN_GRACE_S: Final = 10.0


def _no_report(_message: str, _error: BaseException | None) -> None:
    pass


class Server:
    """Serves `services` on any number of listeners and connections.

    - `status_from` turns what a handler raised into a status; it must not raise.
    - `report` is told, in one line, what no caller is told: broken connections, failing `accept`,
      exceptions in handlers other than StatusError.
    - `authorize` sees a peer's credentials and may turn it away; `peer.is_same_user` is one.
    """

    def __init__(
        self,
        services: Services,
        *,
        max_message_bytes: int = frames.MAX_MESSAGE_BYTES,
        max_in_flight: int = MAX_IN_FLIGHT,
        frame_deadline_s: float = FRAME_DEADLINE_S,
        status_from: StatusFrom = default_status,
        report: Callable[[str, BaseException | None], None] = _no_report,
        authorize: Callable[[PeerCredentials | None], bool] | None = None,
    ) -> None:
        self.services = services
        self.max_message_bytes = max_message_bytes
        self.max_in_flight = max_in_flight
        self.frame_deadline_s = frame_deadline_s
        self.is_closing = False
        self._status_from = status_from
        self._report = report
        self._authorize = authorize
        self._sessions: set[Session] = set()
        self._accepting: set[trio.CancelScope] = set()

    async def serve(
        self,
        listener: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections until `shutdown` or cancellation. The listener stays the caller's.

        Returns when `shutdown` was called and the last connection has ended.

        Raises OSError if `accept` fails for a reason that will not pass.
        """
        listener.setblocking(False)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                self._accepting.add(scope)
                if self.is_closing:
                    scope.cancel()
                task_status.started()
                try:
                    await self._accept_all(listener, nursery)
                finally:
                    self._accepting.discard(scope)

    async def serve_connection(self, sock: socket.socket) -> None:
        """Serve one connected stream socket until it ends, and close it.

        Never raises for what the peer does.
        """
        session = Session(self, sock)
        self._sessions.add(session)
        try:
            await session.run()
        except* ConnectionLost:
            pass  # a client may go at any time; this is how containerd ends, too
        except* RemoteProtocolError as group:
            self._report(f"connection closed: {group.exceptions[0]}", None)
        except* Exception as group:
            self._report("connection closed by a fault of the server", group)
        finally:
            self._sessions.discard(session)

    async def shutdown(self, *, grace_s: float = SHUTDOWN_GRACE_S, farewell_s: float = 0) -> None:
        """Stop accepting, let active calls finish and their answers be sent, end connections.

        Calls that begin meanwhile are answered UNAVAILABLE. After `grace_s` seconds what is left is
        cancelled, and its clients see the connection end. `farewell_s`, of these seconds, is for
        clients to hang up first: Go's may take an answer with the end right behind it for lost.
        """
        self.is_closing = True
        for scope in self._accepting:
            scope.cancel()
        with trio.move_on_after(grace_s):
            async with trio.open_nursery() as nursery:
                for session in self._sessions:
                    nursery.start_soon(session.finish, farewell_s)
        for session in self._sessions:
            session.cancel()

    def status_of(self, context: CallContext, error: Exception) -> Status:
        """Return what to answer for an exception out of a handler, and report surprises."""
        try:
            status = self._status_from(error)
        except Exception as fault:
            self._report(f"status_from failed for {context.method}", fault)
            status = Status(Code.INTERNAL, "the error cannot be described")
        if status.code in (Code.UNKNOWN, Code.INTERNAL):
            self._report(f"{context.service}/{context.method} failed", error)
        return status

    async def _accept_all(self, listener: socket.socket, nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(listener)
            except OSError as error:
                await self._accept_failed(error)
            else:
                if self._authorize is not None and not self._authorize(peer_credentials(sock)):
                    self._report("connection refused: the peer is another user", None)
                    sock.close()
                else:
                    nursery.start_soon(self.serve_connection, sock)
                # The backlog must not keep the connections that are open from their turn.
                await trio.lowlevel.checkpoint()

    async def _accept_failed(self, error: OSError) -> None:
        if error.errno in ACCEPT_OVERLOAD:
            self._report("cannot accept connections for lack of resources", error)
            await trio.sleep(_OVERLOAD_PAUSE_S)
        elif error.errno in _ACCEPT_PASSING:
            await trio.lowlevel.checkpoint()
        else:
            raise error
