from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ttrpc.wire import frame, request
from ttrpc import frames
from ttrpc.connection import Connection, ConnectionState, Oversize, Role, StreamState
from ttrpc.errors import Code, LocalProtocolError, MessageTooLarge, RemoteProtocolError
from ttrpc.events import Broken, Data, Rejected, Request, Response, Status

CLOSED, OPEN, NO_DATA = frames.REMOTE_CLOSED, frames.REMOTE_OPEN, frames.NO_DATA
METADATA = st.lists(st.tuples(st.text(), st.text()), max_size=3).map(tuple)


@pytest.fixture
def server() -> Connection:
    return Connection(Role.SERVER)


@pytest.fixture
def client() -> Connection:
    return Connection(Role.CLIENT)


def rejected_code(connection: Connection, data: bytes) -> Code:
    (event,) = connection.receive_data(data)
    assert isinstance(event, Rejected)
    return event.status.code


@given(st.text(), st.text(), st.binary(), st.integers(0, 2**63 - 1), METADATA)
def test_request_arrives_as_it_was_sent(service, method, payload, timeout_nano, metadata):
    sent = Request(1, service, method, payload, timeout_nano, metadata)
    data = Connection(Role.CLIENT).send(sent)
    assert Connection(Role.SERVER).receive_data(data) == [sent]


@given(
    st.sampled_from([code for code in Code if code]),
    st.text(),
    st.lists(st.tuples(st.text(), st.binary()), max_size=2).map(tuple),
)
def test_error_arrives_as_it_was_sent(code, message, details):
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    server.receive_data(client.send(Request(1, "s", "m")))
    sent = Response(1, b"", Status(code, message, details))
    assert client.receive_data(server.send(sent)) == [sent]
    assert client.streams == server.streams == {}


def test_unknown_code_from_the_peer_is_unknown(client):
    client.send(Request(1, "s", "m"))
    answer = frame(1, frames.RESPONSE, 0, b"\x0a\x02\x08\x63")
    assert client.receive_data(answer) == [Response(1, b"", Status(Code.UNKNOWN, ""))]


def test_status_ok_is_success(client):
    client.send(Request(1, "s", "m"))
    assert client.receive_data(frame(1, frames.RESPONSE, 0, b"\x0a\x00\x12\x01x")) == [
        Response(1, b"x")
    ]


def test_stream_ids_are_odd_and_increase(client):
    assert [client.next_stream_id()] == [1]
    client.send(Request(1, "s", "m"))
    assert client.next_stream_id() == 3
    for wrong in (0, 1, 2, 4, 2**32 + 1):
        with pytest.raises(LocalProtocolError):
            client.send(Request(wrong, "s", "m"))
    assert client.next_stream_id() == 3


def test_last_stream_id_is_used_once(client):
    client.send(Request(2**32 - 1, "s", "m"))
    with pytest.raises(LocalProtocolError):
        client.next_stream_id()


def test_even_stream_id_is_rejected_and_the_connection_lives(server):
    assert rejected_code(server, request(2, "m")) is Code.INVALID_ARGUMENT
    assert isinstance(server.receive_data(request(1, "m"))[0], Request)


@pytest.mark.parametrize("again", [1, 3, 5])
def test_used_stream_id_is_rejected(server, again):
    server.receive_data(request(5, "m"))
    assert rejected_code(server, request(again, "m")) is Code.INVALID_ARGUMENT


def test_data_without_a_request_is_rejected(server):
    assert rejected_code(server, frame(1, frames.DATA, 0, b"x")) is Code.INVALID_ARGUMENT


def test_data_after_the_clients_end_is_rejected(server):
    server.receive_data(request(1, "m", flags=OPEN) + frame(1, frames.DATA, CLOSED | NO_DATA))
    assert rejected_code(server, frame(1, frames.DATA, 0, b"x")) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("flags", [0, CLOSED])
def test_data_on_a_stream_that_the_client_did_not_open_is_rejected(server, flags):
    server.receive_data(request(1, "m", flags=flags))
    assert rejected_code(server, frame(1, frames.DATA, 0, b"x")) is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\xff", b"\x0a\x01\xff", b"\x2a\x03\x0a\x01\xff"])
def test_undecodable_request_is_rejected_and_uses_its_id(server, body):
    assert rejected_code(server, frame(1, frames.REQUEST, 0, body)) is Code.INVALID_ARGUMENT
    assert server.streams == {}
    assert rejected_code(server, request(1, "m")) is Code.INVALID_ARGUMENT


def test_unknown_types_are_ignored_and_counted(server, client):
    assert server.receive_data(frame(1, 9, 0, b"x") + frame(1, frames.RESPONSE)) == []
    client.send(Request(1, "s", "m"))
    assert client.receive_data(frame(1, 9, 0, b"x") + frame(1, frames.REQUEST)) == []
    assert (server.ignored, client.ignored) == (2, 2)


def test_unasked_repeated_and_late_answers_are_ignored_and_counted(client):
    client.send(Request(1, "s", "m"))
    client.send(Request(3, "s", "m"))
    client.forget(3)
    answers = [frame(stream_id, frames.RESPONSE) for stream_id in (1, 1, 3, 5, 2, 0)]
    assert client.receive_data(b"".join(answers)) == [Response(1)]
    assert client.ignored == 5


def test_undecodable_answer_breaks_its_call_only(client):
    client.send(Request(1, "s", "m"))
    client.send(Request(3, "s", "m"))
    data = frame(1, frames.RESPONSE, 0, b"\x0a\xff") + frame(3, frames.RESPONSE)
    broken, answered = client.receive_data(data)
    assert isinstance(broken, Broken)
    assert answered == Response(3)


def test_stream_data_in_a_unary_call_breaks_the_call(client):
    client.send(Request(1, "s", "m"))
    (event,) = client.receive_data(frame(1, frames.DATA, 0, b"x"))
    assert isinstance(event, Broken)
    assert client.streams == {}


def test_bidirectional_stream_goes_through_its_states(client, server):
    server.receive_data(client.send(Request(1, "s", "m", flags=OPEN)))
    assert client.streams[1] is server.streams[1] is StreamState.OPEN
    assert server.receive_data(client.send(Data(1, b"a"))) == [Data(1, b"a")]
    assert client.receive_data(server.send(Data(1, b""))) == [Data(1, b"")]
    assert server.receive_data(client.send(Data(1, None, is_end=True))) == [Data(1, None, True)]
    assert client.streams[1] is server.streams[1] is StreamState.HALF
    with pytest.raises(LocalProtocolError):
        client.send(Data(1, b"more"))
    assert client.receive_data(server.send(Data(1, None, is_end=True))) == [Data(1, None, True)]
    assert client.streams == server.streams == {}
    with pytest.raises(LocalProtocolError):
        server.send(Data(1, b"more"))


def test_servers_end_closes_the_stream_for_both(client, server):
    server.receive_data(client.send(Request(1, "s", "m", flags=OPEN)))
    client.receive_data(server.send(Data(1, None, is_end=True)))
    with pytest.raises(LocalProtocolError):
        client.send(Data(1, b"more"))


def test_message_and_end_may_share_a_frame(client, server):
    server.receive_data(client.send(Request(1, "s", "m", flags=OPEN)))
    assert server.receive_data(client.send(Data(1, b"x", is_end=True))) == [Data(1, b"x", True)]


@pytest.mark.parametrize("flags", [3, 4, 0x80])
def test_request_with_other_flags_is_not_sent(client, flags):
    with pytest.raises(LocalProtocolError):
        client.send(Request(1, "s", "m", flags=flags))


def test_each_side_sends_its_own_kinds_only(client, server):
    with pytest.raises(LocalProtocolError):
        client.send(Response(1))
    with pytest.raises(LocalProtocolError):
        server.send(Request(1, "s", "m"))


def test_message_over_the_limit_changes_nothing(client, server):
    with pytest.raises(MessageTooLarge):
        client.send(Request(1, "s", "m", bytes(frames.MAX_MESSAGE_BYTES)))
    assert client.next_stream_id() == 1
    server.receive_data(client.send(Request(1, "s", "m")))
    with pytest.raises(MessageTooLarge):
        server.send(Response(1, bytes(frames.MAX_MESSAGE_BYTES)))
    assert 1 in server.streams


@pytest.mark.parametrize("length", [frames.MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_server_answers_an_oversized_message_and_goes_on(server, length):
    header = length.to_bytes(4) + frame(1, frames.REQUEST)[4:]
    assert rejected_code(server, header) is Code.RESOURCE_EXHAUSTED
    assert server.state is ConnectionState.OPEN
    assert server.buffered_bytes == 0


def test_oversized_message_breaks_its_call_only_if_the_client_discards():
    client = Connection(Role.CLIENT, max_message_bytes=50, oversize=Oversize.DISCARD)
    client.send(Request(1, "s", "m"))
    client.send(Request(3, "s", "m"))
    data = frame(1, frames.RESPONSE, 0, bytes(51)) + frame(3, frames.RESPONSE)
    broken, answered = client.receive_data(data)
    assert isinstance(broken, Broken)
    assert answered == Response(3)


def test_oversized_message_ends_the_connection_if_the_client_closes():
    client = Connection(Role.CLIENT, max_message_bytes=50, oversize=Oversize.CLOSE)
    with pytest.raises(RemoteProtocolError):
        client.receive_data(frame(1, frames.RESPONSE, 0, bytes(51)))
    assert client.state is ConnectionState.ERROR


def test_end_between_frames_closes_the_connection(server):
    server.receive_data(request(1, "m"))
    assert server.receive_data(b"") == []
    assert server.state is ConnectionState.CLOSED
    with pytest.raises(LocalProtocolError):
        server.receive_data(b"x")
    with pytest.raises(LocalProtocolError):
        server.send(Response(1))


@pytest.mark.parametrize("role", Role)
def test_end_within_a_frame_is_an_error(role):
    connection = Connection(role)
    connection.receive_data(b"\0")
    with pytest.raises(RemoteProtocolError):
        connection.receive_data(b"")
    assert connection.state is ConnectionState.ERROR


def busy(role: Role) -> Connection:
    """A connection with streams in every state, so that frames for 1, 3 and 5 mean something."""
    client, server = Connection(Role.CLIENT, max_message_bytes=200), Connection(Role.SERVER)
    for stream_id, flags in ((1, 0), (3, CLOSED), (5, OPEN)):
        server.receive_data(client.send(Request(stream_id, "s", "m", flags=flags)))
    return client if role is Role.CLIENT else server


HOSTILE_FRAMES = st.builds(
    frame,
    st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)),
    st.integers(0, 5),
    st.integers(0, 15),
    st.one_of(
        st.binary(max_size=30),
        st.sampled_from([b"\x0a\x01s\x12\x01m", b"\x0a\x04\x08\x05\x12\x00", b"\x1b" * 20]),
    ),
)


@given(st.sampled_from(Role), st.lists(HOSTILE_FRAMES, max_size=30))
def test_any_frames_raise_nothing_but_protocol_errors(role, hostile):
    connection = busy(role)
    for data in hostile:
        try:
            events = connection.receive_data(data)
        except RemoteProtocolError:
            assert connection.state is ConnectionState.ERROR
            return
        for event in events:
            if isinstance(event, Rejected):
                connection.send(Response(event.stream_id, b"", event.status))
    assert len(connection.streams) <= 3 + len(hostile)


@given(st.sampled_from(Role), st.binary(max_size=400), st.data())
def test_mutated_bytes_raise_nothing_but_protocol_errors(role, noise, data):
    sane = request(7, "m", b"x" * 20) + frame(5, frames.DATA, 0, b"y") + frame(1, frames.RESPONSE)
    stream = bytearray(sane + noise)
    for _ in range(data.draw(st.integers(0, 8))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    connection = busy(role)
    connection._decoder._limit = 1000
    try:
        for start in range(0, len(stream), 7):
            connection.receive_data(bytes(stream[start : start + 7]))
            assert connection.buffered_bytes <= 1000 + frames.HEADER_BYTES
        connection.receive_data(b"")
    except RemoteProtocolError:
        assert connection.state is ConnectionState.ERROR


def test_deeply_nested_and_amplified_bodies_are_rejected_or_small(server):
    nested = b""
    for _ in range(200):
        nested = b"\x1b" + nested + b"\x1c"  # groups: legal to skip, and a classic for recursion
    assert server.receive_data(frame(1, frames.REQUEST, 0, nested * 50))
    assert rejected_code(server, frame(3, frames.REQUEST, 0, b"\x2a\x00" * 100_000))


def test_details_of_an_answer_are_cut(client):
    client.send(Request(1, "s", "m"))
    status = b"\x08\x05" + b"\x1a\x00" * 100_000
    body = b"\x0a" + bytes([len(status) & 127 | 128, len(status) >> 7 & 127 | 128])
    body += bytes([len(status) >> 14]) + status
    (event,) = client.receive_data(frame(1, frames.RESPONSE, 0, body))
    assert isinstance(event, Response)
    assert event.status is not None
    assert len(event.status.details) == 64
