"""HTTP/1.1 to a VMM's API on a unix socket, with JSON bodies: one request at a time.

The peer may have been taken over by its guest: head, body and nesting of an answer are bounded,
and every request has a deadline. A connection on which a request was given up is closed, so that a
late answer is never taken for another one's; the next request makes a new connection. That the VMM
has ended is the business of whoever watches its process, and told here by `close`.
"""

from __future__ import annotations

import contextlib
import json
import socket
from array import array
from typing import TYPE_CHECKING, Final

import h11
import trio

from .bounded_json import parse_json
from .console import escape
from .errors import CommandTimeout, ControlError, ControlLost, HttpRejected

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .bounded_json import JsonValue

RECEIVE_BYTES: Final = 65536
# Cloud Hypervisor's vm.info, the longest answer we ask for, has 10 KiB with 30 devices.
MAX_BODY_BYTES: Final = 1 << 20
MAX_HEAD_BYTES: Final = 16384
# Of an error's body, what goes into a text for people.
MAX_ERROR_CHARACTERS: Final = 600
# A VMM answers in milliseconds, except where a request makes it map a guest's memory.
REQUEST_TIMEOUT_S: Final = 5.0


class HttpApi:
    """A client of the API socket at `path`. Nothing is connected before the first request."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._protocol = _new_protocol()
        self._is_closed = False
        # Held for a whole request and its answer.
        self._lock = trio.Lock()

    async def connect(self) -> None:
        """Connect now instead of with the first request.

        Raises:
            ControlLost: nobody listens, or this client is closed.
        """
        async with self._lock:
            self._connect("connect")

    async def request(
        self,
        method: str,
        target: str,
        body: Mapping[str, JsonValue] | None = None,
        *,
        fds: Sequence[int] = (),
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> JsonValue:
        """Send a request and return the decoded body of its answer, None where that is empty.

        `fds` travel with the request's first byte and stay the caller's. The deadline includes
        waiting for earlier requests. Cancellation: safe; the request may have taken effect.

        Raises:
            HttpRejected: the VMM answered with another status than 2xx.
            CommandTimeout, ControlLost.
            ControlError: the answer is not HTTP, not JSON, or too long.
        """
        command = f"{method} {target}"
        with trio.move_on_after(timeout_s):
            async with self._lock:
                status, answer = await self._exchange(command, method, target, body, fds)
            return _value(command, method, target, status, answer)
        raise CommandTimeout(command, timeout_s)

    def close(self) -> None:
        """End the connection for good; waiting and later requests raise ControlLost. Idempotent."""
        self._is_closed = True
        self._drop()

    async def _exchange(
        self,
        command: str,
        method: str,
        target: str,
        body: Mapping[str, JsonValue] | None,
        fds: Sequence[int],
    ) -> tuple[int, bytes]:
        try:
            self._connect(command)
            await self._send(_encode(self._protocol, method, target, body), fds)
            answer = await self._receive(command)
        except h11.RemoteProtocolError as error:
            self._drop()
            raise ControlError(command, f"the answer is not HTTP: {error}") from error
        except (OSError, trio.ClosedResourceError) as error:
            self._drop()
            raise ControlLost(command) from error
        except BaseException:
            # What was sent is not answered yet: nobody may take that answer for his.
            self._drop()
            raise
        if self._protocol.our_state is h11.DONE and self._protocol.their_state is h11.DONE:
            self._protocol.start_next_cycle()
        else:
            self._drop()
        return answer

    def _connect(self, command: str) -> None:
        if self._is_closed:
            raise ControlLost(command)
        if self._socket is not None:
            return
        with contextlib.ExitStack() as undo:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.setblocking(False)
            try:
                # At once or not at all: a unix socket's backlog is its only queue.
                sock.connect(self._path)
            except OSError as error:
                why = f"{self._path} does not answer: {error.strerror}"
                raise ControlLost(command, why) from error
            undo.pop_all()
        self._socket = sock
        self._protocol = _new_protocol()

    def _drop(self) -> None:
        if self._socket is not None:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
            self._socket = None

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        ancillary = []
        if fds:
            ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds).tobytes()))
        while data:
            sock = self._open_socket()
            try:
                data = data[sock.sendmsg([data], ancillary) :]
                ancillary = []
            except BlockingIOError:
                await trio.lowlevel.wait_writable(sock)

    async def _receive(self, command: str) -> tuple[int, bytes]:
        status = 0
        body = bytearray()
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                data = await self._read()
                if not data:
                    raise ControlLost(command)
                self._protocol.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_BODY_BYTES:
                    raise ControlError(command, f"the answer has over {MAX_BODY_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(body)

    async def _read(self) -> bytes:
        while True:
            sock = self._open_socket()
            try:
                return sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise trio.ClosedResourceError
        return self._socket


def _new_protocol() -> h11.Connection:
    return h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)


def _encode(
    protocol: h11.Connection, method: str, target: str, body: Mapping[str, JsonValue] | None
) -> bytes:
    content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode("ascii")
    headers = [("Host", "localhost"), ("Accept", "application/json")]
    if body is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
    head = protocol.send(h11.Request(method=method, target=target, headers=headers))
    data = protocol.send(h11.Data(data=content)) if content else b""
    end = protocol.send(h11.EndOfMessage())
    return b"".join(part for part in (head, data, end) if part)


def _value(command: str, method: str, target: str, status: int, answer: bytes) -> JsonValue:
    """The decoded body of a success; everything else raises."""
    if not 200 <= status < 300:
        raise HttpRejected(method, target, status, _explain(answer))
    if not answer.strip():
        return None
    try:
        return parse_json(answer)
    except ValueError as error:
        raise ControlError(command, f"the answer is {error}") from error


def _explain(answer: bytes) -> str:
    """The sentences of an error's body, in order; where that is no JSON, the body itself.

    Cloud Hypervisor sends a list from the outermost error to its cause, Firecracker an object with
    one `fault_message`.
    """
    try:
        value = parse_json(answer)
    except ValueError:
        value = answer.decode("utf-8", "replace")
    text = ": ".join(_sentences(value)) or "no reason given"
    return escape(text.encode())[:MAX_ERROR_CHARACTERS]


def _sentences(value: JsonValue) -> list[str]:
    match value:
        case str():
            return [value.strip()] if value.strip() else []
        case list():
            return [text for one in value for text in _sentences(one)]
        case dict():
            return [text for one in value.values() for text in _sentences(one)]
    return []
