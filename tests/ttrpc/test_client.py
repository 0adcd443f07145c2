from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.ttrpc.wire import calling, frame, request, response_of
from ttrpc import frames
from ttrpc.client import Call, Client
from ttrpc.connection import Oversize
from ttrpc.errors import (
    CallTimeout,
    Code,
    ConnectionLost,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    RemoteStatus,
    StatusError,
    TtrpcError,
)
from ttrpc.pb import ttrpc_pb2 as pb


def answer(stream_id: int, payload: bytes = b"", **status) -> bytes:
    message = pb.Response(payload=payload, status=status or None)
    return frame(stream_id, frames.RESPONSE, 0, message.SerializeToString())


async def outcome_of(client: Client, outcomes: list[object], **options) -> None:
    try:
        outcomes.append(await client.call("test", "m", b"", **options))
    except TtrpcError as error:
        outcomes.append(error)


async def test_call_returns_the_payload_of_the_answer():
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        sent = await peer.frame()
        assert sent is not None
        message = pb.Request.FromString(sent.data)
        assert (sent.stream_id, message.service, message.method) == (1, "test", "m")
        assert message.timeout_nano == 0
        await peer.send(answer(1, b"payload"))
        await wait_all_tasks_blocked()
        assert outcomes == [b"payload"]


async def test_error_status_is_raised_with_its_code():
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await peer.frame()
        await peer.send(answer(1, code=5, message="gone"))
        await wait_all_tasks_blocked()
        (error,) = outcomes
        assert isinstance(error, RemoteStatus)
        assert (error.code, error.message) == (Code.NOT_FOUND, "gone")


async def test_answers_out_of_order_reach_their_callers():
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[list[object]] = [[], [], []]
        for each in outcomes:
            nursery.start_soon(outcome_of, client, each)
            await wait_all_tasks_blocked()
        await peer.send(answer(5, b"c") + answer(1, b"a") + answer(3, b"b"))
        await wait_all_tasks_blocked()
        assert outcomes == [[b"a"], [b"b"], [b"c"]]


async def test_calls_that_begin_together_go_out_in_their_order_and_are_answered_in_any():
    async with calling() as (client, peer):
        first, second, third = client.begin(*(Call("test", name, b"") for name in "abc"))
        sent = [await peer.frame() for _ in range(3)]
        names = [pb.Request.FromString(one.data).method for one in sent if one is not None]
        assert names == ["a", "b", "c"]
        second.forget()
        await peer.send(answer(5, b"C") + answer(3, b"B") + answer(1, b"A"))
        assert (await first.answer(), await third.answer()) == (b"A", b"C")
        assert client.ignored_frames == 1


async def test_of_calls_that_begin_together_none_is_sent_if_one_is_too_long():
    async with calling() as (client, peer):
        long = Call("test", "long", bytes(frames.MAX_MESSAGE_BYTES))
        with pytest.raises(MessageTooLarge):
            client.begin(Call("test", "short", b""), long)
        (after,) = client.begin(Call("test", "after", b""))
        sent = await peer.frame()
        assert sent is not None
        assert pb.Request.FromString(sent.data).method == "after"
        await peer.send(answer(sent.stream_id, b"x"))
        assert await after.answer() == b"x"


async def test_timeout_is_told_to_the_peer_and_enforced_here(autojump_clock):
    async with calling() as (client, peer):
        start = trio.current_time()
        with pytest.raises(CallTimeout):
            await client.call("test", "m", b"", timeout_s=2.5)
        assert trio.current_time() - start == pytest.approx(2.5)
        sent = await peer.frame()
        assert sent is not None
        assert pb.Request.FromString(sent.data).timeout_nano == 2_500_000_000


async def test_late_answer_is_ignored_and_the_connection_lives(autojump_clock):
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        with pytest.raises(CallTimeout):
            await client.call("test", "m", b"", timeout_s=1)
        await peer.send(answer(1, b"late"))
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        await peer.send(answer(3, b"in time"))
        await wait_all_tasks_blocked()
        assert outcomes == [b"in time"]
        assert client.ignored_frames == 1


@pytest.mark.parametrize("timeout_s", [0, -1, 1e-12])
async def test_expired_timeout_is_not_sent_as_no_timeout(autojump_clock, timeout_s):
    async with calling() as (client, peer):
        with pytest.raises(CallTimeout):
            await client.call("test", "m", b"", timeout_s=timeout_s)
        sent = await peer.frame()
        assert sent is not None
        assert pb.Request.FromString(sent.data).timeout_nano == 1


async def test_cancelled_call_leaves_nothing_behind():
    async with calling() as (client, peer):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.call, "test", "m", b"")
                await peer.frame()
                scope.cancel()
        assert client._calls == {}
        assert client._connection.streams == {}


@pytest.mark.parametrize("ending", ["close", "truncate", "garbage"])
async def test_every_pending_call_gets_connection_lost(ending):
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        for _ in range(5):
            nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        if ending == "truncate":
            await peer.send(answer(1, b"whole")[:-1])
        if ending == "garbage":
            await peer.send(b"\xff" * 100)
        else:
            peer.close()
        await wait_all_tasks_blocked()
        assert [type(one) for one in outcomes] == [ConnectionLost] * 5
        assert len({id(one) for one in outcomes}) == 5
        assert not client.is_open
        with pytest.raises(ConnectionLost):
            await client.call("test", "m", b"")
        with pytest.raises(ConnectionLost):
            await client.open_stream("test", "m")


async def test_close_frees_pending_calls():
    async with calling() as (client, _peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        client.close()
        await wait_all_tasks_blocked()
        assert [type(one) for one in outcomes] == [ConnectionLost]


async def test_cancelling_run_closes_the_socket_and_frees_calls():
    ours, theirs = socket.socketpair()
    client = Client(ours)
    outcomes: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outcome_of, client, outcomes)
        async with trio.open_nursery() as inner:
            await inner.start(client.run)
            inner.cancel_scope.cancel()
    assert [type(one) for one in outcomes] == [ConnectionLost]
    assert ours.fileno() == -1
    theirs.close()


async def test_frame_that_stalls_ends_the_connection(autojump_clock):
    async with calling(frame_deadline_s=10) as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await peer.frame()
        await trio.sleep(3600)  # between frames a peer may be silent
        start = trio.current_time()
        whole = answer(1, b"payload")
        for byte in whole[:-1]:
            if not client.is_open:
                break
            await peer.send(bytes([byte]))
            await trio.sleep(1.1)
        assert trio.current_time() - start == pytest.approx(11)
        assert [type(one) for one in outcomes] == [ConnectionLost]


async def test_each_frame_has_its_own_deadline(autojump_clock):
    async with calling(frame_deadline_s=10) as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[list[object]] = [[] for _ in range(4)]
        for each in outcomes:
            nursery.start_soon(outcome_of, client, each)
            await wait_all_tasks_blocked()
        stream = b"".join(answer(stream_id, b"x") for stream_id in (1, 3, 5, 7))
        step = len(stream) // 4 - 1  # so that a frame is always begun when the next chunk comes
        for start in range(0, len(stream), step):
            await peer.send(stream[start : start + step])
            await trio.sleep(6)
        assert outcomes == [[b"x"]] * 4


@pytest.mark.parametrize("length", [frames.MAX_MESSAGE_BYTES + 1, 2**32 - 1])
async def test_oversized_answer_ends_the_connection_by_default(length):
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await peer.frame()
        await peer.send(length.to_bytes(4) + answer(1)[4:10])
        await wait_all_tasks_blocked()
        assert [type(one) for one in outcomes] == [ConnectionLost]
        assert isinstance(outcomes[0].__cause__, RemoteProtocolError)


async def test_oversized_answer_fails_its_call_only_if_discarded():
    options = {"max_message_bytes": 100, "oversize": Oversize.DISCARD}
    async with calling(**options) as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        await peer.send(answer(1, bytes(200)) + answer(3, b"fine"))
        await wait_all_tasks_blocked()
        assert {type(one) for one in outcomes} == {RemoteProtocolError, bytes}


async def test_undecodable_answer_fails_its_call_only():
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        await peer.send(frame(1, frames.RESPONSE, 0, b"\x0a\xff") + answer(3, b"fine"))
        await wait_all_tasks_blocked()
        assert {type(one) for one in outcomes} == {RemoteProtocolError, bytes}


async def test_message_too_large_is_refused_here():
    async with calling() as (client, _peer):
        with pytest.raises(MessageTooLarge):
            await client.call("test", "m", bytes(frames.MAX_MESSAGE_BYTES))
        assert client._calls == {}


async def test_pending_calls_are_bounded():
    async with calling(max_pending=2) as (client, _peer), trio.open_nursery() as nursery:
        nursery.start_soon(outcome_of, client, [])
        nursery.start_soon(outcome_of, client, [])
        await wait_all_tasks_blocked()
        with pytest.raises(LocalProtocolError):
            await client.call("test", "m", b"")
        client.close()


async def test_large_messages_wait_for_a_slow_peer_and_arrive_whole():
    payload = bytes(range(256)) * 8192
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        outcomes: list[object] = []
        for _ in range(4):

            async def one() -> None:
                outcomes.append(await client.call("test", "m", payload))

            nursery.start_soon(one)
        await wait_all_tasks_blocked()
        for _ in range(4):
            sent = await peer.frame()
            assert sent is not None
            assert pb.Request.FromString(sent.data).payload == payload
            await peer.send(answer(sent.stream_id, b"ok"))
        await wait_all_tasks_blocked()
        assert outcomes == [b"ok"] * 4


async def test_peer_that_does_not_read_makes_calls_wait_and_can_be_given_up(autojump_clock):
    async with calling() as (client, _peer):
        for _ in range(3):
            with pytest.raises(CallTimeout):
                await client.call("test", "m", bytes(1 << 20), timeout_s=1)
        client.close()


async def test_unread_stream_is_failed_and_does_not_hold_up_calls(autojump_clock):
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        stream = await client.open_stream("test", "s", client_streams=False)
        await peer.send(frame(1, frames.DATA, 0, b"x") * 200)
        outcomes: list[object] = []
        nursery.start_soon(outcome_of, client, outcomes)
        await wait_all_tasks_blocked()
        await peer.send(answer(3, b"fine"))
        await trio.sleep(2)
        assert outcomes == [b"fine"]
        with pytest.raises(StatusError):
            await stream.receive()


async def test_leaving_a_stream_tells_the_peer_and_ignores_the_rest():
    async with calling() as (client, peer):
        async with await client.open_stream("test", "s") as stream:
            await stream.send(b"a")
        received = [await peer.frame() for _ in range(3)]
        assert [one.flags for one in received if one] == [
            frames.REMOTE_OPEN,
            0,
            frames.REMOTE_CLOSED | frames.NO_DATA,
        ]
        await peer.send(frame(1, frames.DATA, 0, b"more"))
        await wait_all_tasks_blocked()
        assert client.ignored_frames == 1


async def test_undecodable_end_of_a_stream_fails_it():
    async with calling() as (client, peer):
        stream = await client.open_stream("test", "s")
        await peer.send(frame(1, frames.RESPONSE, 0, b"\x0a\xff"))
        with pytest.raises(RemoteProtocolError):
            await stream.receive()


async def test_open_stream_fails_when_the_connection_ends():
    async with calling() as (client, peer), await client.open_stream("test", "s") as stream:
        await peer.send(frame(1, frames.DATA, 0, b"first"))
        await wait_all_tasks_blocked()
        peer.close()
        await wait_all_tasks_blocked()
        assert await stream.receive() == b"first"
        with pytest.raises(ConnectionLost):
            await stream.receive()
        with pytest.raises(ConnectionLost):
            await stream.send(b"x")


async def test_requests_of_a_client_are_what_a_test_peer_writes():
    async with calling() as (client, peer), trio.open_nursery() as nursery:
        nursery.start_soon(outcome_of, client, [])
        sent = await peer.frame()
        assert sent is not None
        assert frames.encode_frame(*sent) == request(1, "m")
        assert response_of(sent._replace(data=b"")) == pb.Response()
        client.close()
