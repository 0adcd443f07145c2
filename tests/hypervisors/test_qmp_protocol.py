"""QMP without I/O: recorded sessions at every split point, limits, and hostile input."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisors.bounded_json import MAX_DEPTH
from hypervisors.qmp_protocol import (
    MAX_LINE_BYTES,
    Disconnected,
    ErrorReply,
    Greeting,
    LocalProtocolError,
    Notification,
    QmpConnection,
    RemoteProtocolError,
    Reply,
    State,
)

VECTORS = Path(__file__).parents[1] / "vectors" / "qmp"
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, '
    b'"capabilities": ["oob"]}}\r\n'
)


def ready() -> QmpConnection:
    connection = QmpConnection()
    connection.receive_data(GREETING)
    connection.send_command("qmp_capabilities")
    connection.receive_data(b'{"return": {}, "id": 1}\r\n')
    assert connection.state is State.READY
    return connection


def session() -> bytes:
    return (VECTORS / "unplug_and_poweroff.jsonl").read_bytes()


def replay(chunks):
    connection = QmpConnection()
    events = []
    for chunk in chunks:
        for event in connection.receive_data(chunk):
            events.append(event)
            if isinstance(event, Greeting):
                connection.send_command("qmp_capabilities")
            elif isinstance(event, Reply) and event.id == 1:
                for _ in range(6):
                    connection.send_command("anything")
    return events


def test_recorded_session_reads_the_same_at_every_split_point():
    data = session()
    whole = replay([data[: data.index(b"\n") + 1], *data.splitlines(keepends=True)[1:], b""])
    assert isinstance(whole[0], Greeting)
    assert isinstance(whole[-1], Disconnected)
    assert "DEVICE_DELETED" in [e.name for e in whole if isinstance(e, Notification)]
    lines = data.splitlines(keepends=True)
    for index, line in enumerate(lines):
        for split in range(len(line)):
            parts = [*lines[:index], line[:split], line[split:], *lines[index + 1 :]]
            # Empty data is end of file, so an empty part is left out.
            assert replay([*filter(None, parts), b""]) == whole
    assert replay([*(data[i : i + 1] for i in range(len(data))), b""]) == whole


def test_commands_are_numbered_and_answers_carry_the_number():
    connection = ready()
    first, data = connection.send_command("stop")
    second, _ = connection.send_command("device_del", {"id": "x"})
    assert json.loads(data) == {"execute": "stop", "id": first}
    events = connection.receive_data(
        b'{"id": %d, "error": {"class": "DeviceNotFound", "desc": "no"}}\n{"id": %d, "return": 5}\n'
        % (second, first)
    )
    assert events == [ErrorReply(second, "DeviceNotFound", "no"), Reply(first, 5)]


def test_answers_nobody_asked_for_are_dropped_and_counted():
    connection = ready()
    number, _ = connection.send_command("stop")
    data = b'{"id": 77, "return": {}}\n{"id": "a", "return": {}}\n{"return": {}}\n'
    assert connection.receive_data(data) == []
    assert connection.dropped_replies == 3
    reply = b'{"id": %d, "return": {}}\n' % number
    assert connection.receive_data(reply) == [Reply(number, {})]
    assert connection.receive_data(reply) == []
    assert connection.dropped_replies == 4


def test_commands_are_refused_before_negotiation_and_after_the_end():
    connection = QmpConnection()
    for name in ("stop", "qmp_capabilities"):
        with pytest.raises(LocalProtocolError):
            connection.send_command(name)
    connection.receive_data(GREETING)
    with pytest.raises(LocalProtocolError):
        connection.send_command("stop")
    connection.send_command("qmp_capabilities")
    with pytest.raises(LocalProtocolError):
        connection.send_command("qmp_capabilities")
    assert connection.receive_data(b"") == [Disconnected(truncated=False)]
    for attempt in (lambda: connection.send_command("stop"), lambda: connection.receive_data(b"")):
        with pytest.raises(LocalProtocolError):
            attempt()


@pytest.mark.parametrize("state", ["greeting", "negotiating", "ready"])
def test_end_of_file_inside_a_line_is_marked(state):
    connection = ready() if state == "ready" else QmpConnection()
    if state == "negotiating":
        connection.receive_data(GREETING)
    connection.receive_data(b'{"ev')
    assert connection.receive_data(b"") == [Disconnected(truncated=True)]


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b"5",
        b"{}",
        b'{"event": 5}',
        b'{"event": "X", "data": []}',
        b'{"error": {"class": "G", "desc": "no id"}}',
        b'{"return": NaN, "id": 1}',
        b'{"event": "\xff"}',
        b'{"return": ' + b"9" * 5000 + b"}",
        b'{"event": "X", "data": ' + b'{"a":' * 100 + b"1" + b"}" * 101,
        b"[" * 200_000,
    ],
)
def test_what_is_not_qmp_ends_the_connection(line):
    connection = ready()
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(line + b"\n")
    assert connection.state is State.CLOSED


def test_malformed_error_for_a_waiting_command_ends_the_connection():
    connection = ready()
    number, _ = connection.send_command("stop")
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(b'{"id": %d, "error": "no"}\n' % number)


def test_anything_but_a_greeting_first_is_refused():
    for line in (b'{"return": {}}\n', b'{"QMP": {}}\n', b'{"QMP": {"version": {"qemu": 7}}}\n'):
        with pytest.raises(RemoteProtocolError):
            QmpConnection().receive_data(line)


def test_lines_are_bounded_whether_or_not_they_end():
    longest = b'{"event": "X", "pad": "' + b"a" * (MAX_LINE_BYTES - 25) + b'"}'
    assert len(longest) == MAX_LINE_BYTES
    assert ready().receive_data(longest + b"\n") == [Notification("X", {})]
    with pytest.raises(RemoteProtocolError):
        ready().receive_data(longest + b" \n")
    with pytest.raises(RemoteProtocolError):
        ready().receive_data(b"a" * (MAX_LINE_BYTES + 1))


def test_brackets_inside_strings_are_not_nesting():
    text = json.dumps({"event": "X", "data": {"a": '[{"\\' * 200}}).encode()
    assert len(ready().receive_data(text + b"\n")) == 1
    flat = json.dumps({"event": "X", "data": {"a": [{}] * (4 * MAX_DEPTH)}}).encode()
    assert len(ready().receive_data(flat + b"\n")) == 1


@given(st.binary(max_size=400), st.integers(0, 400))
def test_arbitrary_bytes_never_raise_anything_else(data, split):
    connection = ready()
    try:
        for part in (data[:split], data[split:]):
            if part:
                connection.receive_data(part)
    except RemoteProtocolError:
        assert connection.state is State.CLOSED


@given(st.data())
def test_mutated_sessions_never_raise_anything_else(data):
    session_bytes = bytearray(session())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(session_bytes) - 1))
        session_bytes[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(RemoteProtocolError, LocalProtocolError):
        replay([bytes(session_bytes), b""])
