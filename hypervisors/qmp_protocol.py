"""QMP, QEMU's control protocol, without I/O: bytes in, events out.

    GREETING --greeting--> NEGOTIATING --reply to qmp_capabilities--> READY --end of file--> CLOSED

Every line is one JSON object. A compromised VMM is the guest, so the peer is not trusted: lines,
nesting and the number of unanswered commands are bounded, and what does not fit the protocol ends
the connection.

Source: QEMU docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

from .bounded_json import JsonValue as JsonValue
from .bounded_json import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

# The longest answer we ask for, query-qmp-schema, has 160 KiB. Source: QEMU 7.2 run-time dump.
MAX_LINE_BYTES: Final = 1 << 20


class QmpProtocolError(Exception):
    """Root of violations; one of the two subclasses says whose."""


class LocalProtocolError(QmpProtocolError):
    """We used the connection in a state that does not allow it."""


class RemoteProtocolError(QmpProtocolError):
    """The peer sent something that is not QMP; the connection is useless from here on."""


class State(Enum):
    GREETING = "greeting"
    NEGOTIATING = "negotiating"
    READY = "ready"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server is there; `version` is (major, minor, micro)."""

    version: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Reply:
    """Command `id` succeeded."""

    id: int
    value: JsonValue


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Command `id` failed."""

    id: int
    error_class: str
    description: str


@dataclass(frozen=True, slots=True)
class Notification:
    """An asynchronous event of the VMM."""

    name: str
    data: Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Disconnected:
    """End of file; `truncated` when it came inside a line."""

    truncated: bool


QmpEvent: TypeAlias = Greeting | Reply | ErrorReply | Notification | Disconnected


class QmpConnection:
    """One client connection. `receive_data(b"")` is end of file."""

    def __init__(self) -> None:
        self.state = State.GREETING
        self.dropped_replies = 0
        self._buffer = bytearray()
        self._searched = 0
        self._next_id = 1
        self._waiting: set[int] = set()

    def send_command(
        self, name: str, arguments: Mapping[str, JsonValue] | None = None
    ) -> tuple[int, bytes]:
        """Encode a command; returns its id, which its reply will carry.

        Raises:
            LocalProtocolError: before the greeting, after the end, or anything but
                qmp_capabilities while negotiating.
        """
        negotiating = name == "qmp_capabilities"
        allowed = self.state is (State.NEGOTIATING if negotiating else State.READY)
        if not allowed or (negotiating and self._waiting):
            raise LocalProtocolError(f"{name} is not allowed in state {self.state.value}")
        number = self._next_id
        self._next_id += 1
        message: dict[str, object] = {"execute": name, "id": number}
        if arguments is not None:
            message["arguments"] = arguments
        self._waiting.add(number)
        return number, json.dumps(message).encode("ascii") + b"\n"

    def receive_data(self, data: bytes) -> list[QmpEvent]:
        """Take bytes as they arrive, at any split; returns what they complete.

        Raises:
            RemoteProtocolError: the connection is CLOSED afterwards.
        """
        if self.state is State.CLOSED:
            raise LocalProtocolError("data after the end of the connection")
        if not data:
            self.state = State.CLOSED
            return [Disconnected(truncated=bool(self._buffer))]
        self._buffer += data
        events: list[QmpEvent] = []
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            if len(line) > MAX_LINE_BYTES:
                self._fail(f"line of more than {MAX_LINE_BYTES} bytes")
            if line.strip() and (event := self._receive_line(line)) is not None:
                events.append(event)
        self._searched = len(self._buffer)
        if self._searched > MAX_LINE_BYTES:
            self._fail(f"line of more than {MAX_LINE_BYTES} bytes")
        return events

    def _receive_line(self, line: bytes) -> QmpEvent | None:
        message = self._parse(line)
        if self.state is State.GREETING:
            return self._receive_greeting(message)
        if "event" in message:
            name, data = message["event"], message.get("data", {})
            if not isinstance(name, str) or not isinstance(data, dict):
                self._fail("malformed event")
            return Notification(name, data)
        if "return" in message or "error" in message:
            return self._receive_reply(message)
        self._fail("message that is neither reply nor event")

    def _receive_greeting(self, message: dict[str, JsonValue]) -> Greeting:
        match message:
            case {
                "QMP": {"version": {"qemu": {"major": int(a), "minor": int(b), "micro": int(c)}}}
            }:
                self.state = State.NEGOTIATING
                return Greeting((a, b, c))
        self._fail("no greeting")

    def _receive_reply(self, message: dict[str, JsonValue]) -> Reply | ErrorReply | None:
        number = message.get("id")
        if "error" in message and "id" not in message:
            # The server could not even read the id: our own stream is damaged.
            self._fail("error without an id")
        if not isinstance(number, int) or number not in self._waiting:
            # Source: qmp-spec.txt 2.4: an answer nobody asked for is to be dropped.
            self.dropped_replies += 1
            return None
        self._waiting.discard(number)
        if "return" in message:
            if self.state is State.NEGOTIATING:
                self.state = State.READY
            return Reply(number, message["return"])
        match message["error"]:
            case {"class": str(error_class), "desc": str(description)}:
                return ErrorReply(number, error_class, description)
        self._fail("malformed error")

    def _parse(self, line: bytes) -> dict[str, JsonValue]:
        try:
            message = parse_json(line)
        except ValueError as error:
            self._fail(f"line that is {error}")
        if not isinstance(message, dict):
            self._fail("message that is not an object")
        return message

    def _fail(self, why: str) -> NoReturn:
        self.state = State.CLOSED
        self._buffer.clear()
        raise RemoteProtocolError(why)
