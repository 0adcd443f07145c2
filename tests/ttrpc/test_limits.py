"""What a peer can make us spend: everything it may ask for is bounded."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.ttrpc.wire import RawPeer, connected, request, serving
from ttrpc import frames
from ttrpc.errors import Code
from ttrpc.transport import WRITE_BACKLOG_BYTES


def echo(_context, payload: bytes) -> bytes:
    return payload


async def for_ever(_context, _payload):
    await trio.sleep_forever()


HANDLERS = {"test": {"Echo": echo, "ForEver": for_ever}}


async def answers_of(peer: RawPeer, count: int, into: list[int]) -> None:
    for _ in range(count):
        received = await peer.frame()
        assert received is not None
        into.append(received.stream_id)


async def test_flood_of_requests_is_answered_in_full():
    count = 10_000
    async with serving(HANDLERS) as peer, trio.open_nursery() as nursery:
        answered: list[int] = []
        nursery.start_soon(answers_of, peer, count, answered)
        await peer.send(b"".join(request(1 + 2 * index, "Echo", b"x") for index in range(count)))
    assert answered == list(range(1, 2 * count, 2))


async def test_flood_of_one_client_leaves_turns_for_another():
    async with serving(HANDLERS) as flooding, connected(HANDLERS) as client:
        flood = b"".join(request(1 + 2 * index, "Echo", b"x") for index in range(20_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flooding.send, flood)
            answered: list[int] = []
            nursery.start_soon(answers_of, flooding, 20_000, answered)
            await client.call("test", "Echo", b"x")
            assert len(answered) < 10_000


async def test_calls_with_a_task_are_bounded_and_others_are_still_answered():
    async with serving(HANDLERS, max_in_flight=10) as peer:
        await peer.send(b"".join(request(1 + 2 * index, "ForEver") for index in range(15)))
        for _ in range(5):
            assert (await peer.response()).status.code == Code.RESOURCE_EXHAUSTED
        await peer.send(request(101, "Echo", b"x"))
        assert (await peer.response()).payload == b"x"


async def test_client_that_does_not_read_stops_being_read():
    """Its requests stay in the kernel: the backlog of answers is all that we keep."""
    payload = bytes(100_000)
    async with serving(HANDLERS) as peer, trio.open_nursery() as nursery:
        count = 200
        answered: list[int] = []
        sent: list[int] = []

        async def send() -> None:
            for index in range(count):
                await peer.send(request(1 + 2 * index, "Echo", payload))
                sent.append(index)

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        assert len(sent) < count
        await answers_of(peer, count, answered)
        assert answered == list(range(1, 2 * count, 2))


async def test_client_may_close_in_the_middle_of_an_answer():
    async with serving(HANDLERS) as peer:
        await peer.send(request(1, "Echo", bytes(1 << 20)))
        await peer.socket.recv(1000)
        peer.close()
        await wait_all_tasks_blocked()


@pytest.mark.parametrize("length", [frames.MAX_MESSAGE_BYTES + 1, 2**32 - 1])
async def test_oversized_request_is_answered_before_its_end(length):
    async with serving(HANDLERS) as peer:
        await peer.send(length.to_bytes(4) + bytes.fromhex("00000001 01 00"))
        assert (await peer.response()).status.code == Code.RESOURCE_EXHAUSTED


async def test_call_after_an_oversized_one_is_answered():
    async with serving(HANDLERS) as peer, trio.open_nursery() as nursery:
        length = frames.MAX_MESSAGE_BYTES + 1
        data = length.to_bytes(4) + bytes.fromhex("00000001 01 00") + bytes(length)
        nursery.start_soon(peer.send, data + request(3, "Echo", b"x"))
        assert (await peer.response()).status.code == Code.RESOURCE_EXHAUSTED
        assert (await peer.response()).payload == b"x"


async def test_random_bytes_never_raise_out_of_the_server():
    generator = random.Random(20)
    sane = request(1, "Echo", b"x") + request(3, "ForEver") + request(5, "Echo", b"y")
    for _ in range(200):
        data = bytearray(sane + generator.randbytes(50))
        for _ in range(generator.randrange(6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        faults: list[BaseException] = []

        def report(message: str, error: BaseException | None, into: list = faults) -> None:
            if "fault of the server" in message:
                into.append(error)

        async with serving(HANDLERS, report=report) as peer:
            await peer.send(bytes(data[: generator.randrange(1, len(data))]))
            peer.socket.shutdown(1)
            while await peer.frame() is not None:
                pass
        assert faults == []


def test_backlog_is_small_beside_a_message():
    assert WRITE_BACKLOG_BYTES < frames.MAX_MESSAGE_BYTES
