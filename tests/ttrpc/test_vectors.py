"""What Go's ttrpc put on the wire, replayed against both of our sides.

How the frames were recorded is written in the file itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import trio

from shimv2.pb import containerd_events_pb2, containerd_forward_pb2, containerd_task_pb2
from tests.ttrpc.wire import serving
from ttrpc import frames
from ttrpc.connection import Connection, Role
from ttrpc.errors import Code, RemoteStatus, StatusError
from ttrpc.events import Data, Rejected, Request, Response
from ttrpc.frames import Frame, FrameDecoder, encode_frame
from ttrpc.handlers import StreamHandler
from ttrpc.pb.well_known_pb2 import StringValue

VECTORS: Final = Path(__file__).parent.parent / "vectors/ttrpc/go_ttrpc_1_2_10.json"
SCENARIOS: Final = {
    scenario["name"]: [(one["from"], bytes.fromhex(one["hex"])) for one in scenario["frames"]]
    for scenario in json.loads(VECTORS.read_text())["scenarios"]
}
TEXT_IS_OURS: Final = {"oversized_request", "undecodable_request", "unary_timed_out"}
"""Where the code must be Go's and the message need not."""
WRITTEN_BY_HAND: Final = {
    "data_on_inactive_stream", "even_stream_id", "oversized_request", "reused_stream_id",
    "undecodable_request", "unknown_type",
}  # fmt: skip
"""Frames that neither client sends."""
TASK_SERVICE: Final = "containerd.task.v2.Task"


def sent_by(name: str, side: str) -> list[bytes]:
    data = [one for sender, one in SCENARIOS[name] if sender == side]
    if name == "oversized_request" and side == "client":
        data[0] += bytes(frames.MAX_MESSAGE_BYTES + 1)  # the file keeps the header only
    return data


def text(payload: bytes | None) -> str:
    return StringValue.FromString(payload or b"").value


def string(value: str) -> bytes:
    return StringValue(value=value).SerializeToString()


def missing(_context, _payload):
    raise StatusError(Code.NOT_FOUND, "container c1: not found")


def plain(_context, _payload):
    raise ValueError("plain text")


def detailed(_context, _payload):
    detail = ("type.googleapis.com/google.protobuf.StringValue", string("why"))
    raise StatusError(Code.FAILED_PRECONDITION, "not now", (detail,))


async def block(_context, _payload):
    await trio.sleep_forever()


async def add_up(_context, stream):
    return string("".join([text(message) async for message in stream]))


async def count(_context, stream):
    for character in text(await stream.receive()):
        await stream.send(string(character))


async def chat(_context, stream):
    async for message in stream:
        if text(message) == "fail":
            raise StatusError(Code.ABORTED, "as asked")
        await stream.send(string(text(message) + "!"))


SERVICES: Final = {
    "vectors.v1.Test": {
        "Echo": lambda _context, payload: payload,
        "Nothing": lambda _context, _payload: b"",
        "Missing": missing,
        "Plain": plain,
        "Detailed": detailed,
        "Block": block,
        "Sum": StreamHandler(add_up),
        "Count": StreamHandler(count),
        "Chat": StreamHandler(chat),
    }
}
OURS: Final = sorted(name for name in SCENARIOS if not name.startswith("containerd_"))


@pytest.mark.parametrize("name", OURS)
async def test_our_server_answers_gos_client_as_gos_server_does(name):
    answers = []
    with trio.fail_after(10):
        async with serving(SERVICES) as peer:
            for data in sent_by(name, "client"):
                await peer.send(data)
            for _ in sent_by(name, "server"):
                received = await peer.frame()
                assert received is not None
                answers.append(encode_frame(*received))
    recorded = sent_by(name, "server")
    if name in TEXT_IS_OURS:
        answers, recorded = ([status_code(data) for data in each] for each in (answers, recorded))
    assert answers == recorded


def status_code(data: bytes) -> tuple[int, bytes]:
    (frame,) = FrameDecoder().receive_data(data)
    assert isinstance(frame, Frame)
    client = Connection(Role.CLIENT)
    client.send(Request(frame.stream_id, "s", "m"))
    (event,) = client.receive_data(data)
    assert isinstance(event, Response)
    return (event.status.code if event.status else 0, event.payload)


@pytest.mark.parametrize("name", sorted(SCENARIOS.keys() - WRITTEN_BY_HAND))
def test_our_client_sends_the_same_bytes_as_gos_client(name):
    """What is decoded on the server's side is encoded again on the client's."""
    server, client = Connection(Role.SERVER), Connection(Role.CLIENT)
    for data in sent_by(name, "client"):
        (event,) = server.receive_data(data)
        assert isinstance(event, Request | Data)
        assert client.send(event) == data


@pytest.mark.parametrize("name", OURS)
def test_our_client_understands_gos_server(name):
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    outcomes = []
    for sender, data in SCENARIOS[name]:
        if sender == "server":
            outcomes += client.receive_data(data)
        elif name not in TEXT_IS_OURS:
            for event in server.receive_data(data):
                if isinstance(event, Request | Data) and not isinstance(event, Rejected):
                    client.send(event)
    for event in outcomes:
        assert isinstance(event, Response | Data)


def test_gos_errors_reach_our_caller():
    expected = {
        "unary_not_found": (Code.NOT_FOUND, "container c1: not found", 0),
        "unary_plain_error": (Code.UNKNOWN, "plain text", 0),
        "unary_error_with_details": (Code.FAILED_PRECONDITION, "not now", 1),
        "unary_unknown_method": (Code.UNIMPLEMENTED, "method Nowhere", 0),
        "unknown_service": (Code.UNIMPLEMENTED, "service vectors.v1.Nothing", 0),
    }
    for name, (code, message, details) in expected.items():
        client = Connection(Role.CLIENT)
        client.send(Request(1, "s", "m"))
        (event,) = client.receive_data(sent_by(name, "server")[0])
        assert isinstance(event, Response)
        assert event.status is not None
        error = RemoteStatus(*event.status)
        assert (error.code, error.message, len(error.details)) == (code, message, details)


def test_timeout_and_metadata_of_gos_client_are_read():
    def first(name: str) -> Request:
        (event,) = Connection(Role.SERVER).receive_data(sent_by(name, "client")[0])
        assert isinstance(event, Request)
        return event

    assert 29e9 < first("unary_with_timeout").timeout_nano < 30e9
    assert first("unary_with_metadata").metadata == (("containerd-namespace-ttrpc", "default"),)
    repeated = first("unary_with_repeated_metadata").metadata
    assert repeated == (("key", "one"), ("key", "two"))


def test_every_task_call_of_containerd_is_understood():
    connection = Connection(Role.SERVER)
    methods = []
    for data in sent_by("containerd_task", "client"):
        (event,) = connection.receive_data(data)
        assert isinstance(event, Request)
        assert event.service == TASK_SERVICE
        assert event.metadata == (("containerd-namespace-ttrpc", "k8s.io"),)
        name = "CreateTask" if event.method == "Create" else event.method
        message = getattr(containerd_task_pb2, f"{name}Request").FromString(event.payload)
        assert message.id == "0123456789abcdef" * 4
        assert message.SerializeToString() == event.payload
        methods.append(event.method)
    assert methods == [
        "Connect", "Create", "State", "Start", "Wait", "Kill", "Delete", "Shutdown"
    ]  # fmt: skip


def test_our_task_answers_are_the_bytes_of_gos():
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    answers = {}
    for sender, data in SCENARIOS["containerd_task"]:
        if sender == "client":
            (request,) = server.receive_data(data)
            assert isinstance(request, Request)
            client.send(request)
        else:
            (answer,) = client.receive_data(data)
            assert isinstance(answer, Response)
            answers[request.method] = answer
    state = containerd_task_pb2.StateResponse.FromString(answers["State"].payload)
    assert (state.pid, state.status, state.exited_at.seconds) == (4242, 2, -62135596800)
    assert state.SerializeToString() == answers["State"].payload
    assert answers["Kill"].status == (Code.NOT_FOUND, "process already finished", ())


def test_our_event_is_the_bytes_of_containerds_publisher():
    (event,) = Connection(Role.SERVER).receive_data(sent_by("containerd_events", "client")[0])
    assert isinstance(event, Request)
    forward = containerd_forward_pb2.ForwardRequest.FromString(event.payload)
    exited = containerd_events_pb2.TaskExit.FromString(forward.envelope.event.value)
    assert forward.envelope.topic == "/tasks/exit"
    assert (exited.container_id, exited.pid, exited.exit_status) == ("c1", 7, 137)
    assert forward.SerializeToString() == event.payload
