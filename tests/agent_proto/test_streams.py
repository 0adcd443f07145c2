"""Process streams: order, end, backpressure and the ways to cut them off."""

from __future__ import annotations

import pytest
import trio

from agent_proto.errors import AgentMisbehaved, AgentStatus, AgentUnreachable
from agent_proto.limits import MAX_CHUNK_BYTES
from agent_proto.pb import agent_pb2
from agent_proto.streams import stderr_of, stdin_of, stdout_of
from tests.agent_proto.test_client import connected, create
from tests.fakes.fake_process import CAT, SLEEP, Exits, Program
from ttrpc.errors import Code


async def test_output_arrives_in_order_and_ends(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program(stdout=b"abcdef", stderr=b"wrong"))
        await create(client)
        await client.start_container("c1")
        out = stdout_of(client, "c1", "c1")
        assert [await out.receive_some(4) for _ in range(4)] == [b"abcd", b"ef", b"", b""]
        assert await stderr_of(client, "c1", "c1").receive_some() == b"wrong"
        # The end is known: no further call was made for the second b"".
        assert len(agent.called("ReadStdout")) == 3


async def test_reader_that_stops_leaves_the_rest_in_the_guest(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program(stdout=bytes(4 * MAX_CHUNK_BYTES)))
        await create(client)
        await client.start_container("c1")
        out = stdout_of(client, "c1", "c1")
        assert len(await out.receive_some()) == MAX_CHUNK_BYTES
        await trio.sleep(100)
        assert len(agent.called("ReadStdout")) == 1
        assert len(agent.process("c1").stdout.data) == 3 * MAX_CHUNK_BYTES


async def test_input_of_any_size_goes_in_chunks(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(CAT)
        await create(client)
        await client.start_container("c1")
        data = bytes(range(256)) * 3000
        stdin = stdin_of(client, "c1", "c1")
        await stdin.send_all(data)
        assert bytes(agent.process("c1").stdin) == data
        assert max(len(request.data) for request in agent.called("WriteStdin")) == MAX_CHUNK_BYTES
        await stdin.send_eof()
        await stdin.send_eof()
        assert len(agent.called("CloseStdin")) == 1
        assert await client.wait_process("c1", "c1") == 0


async def test_short_writes_are_continued(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program(exits=Exits.AT_EOF, takes=3))
        await create(client)
        await client.start_container("c1")
        await stdin_of(client, "c1", "c1").send_all(bytearray(b"0123456789"))
        assert bytes(agent.process("c1").stdin) == b"0123456789"
        sizes = [len(request.data) for request in agent.called("WriteStdin")]
        assert sizes == [10, 7, 4, 1]


async def test_empty_data_is_no_end_of_input(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(CAT)
        await create(client)
        await client.start_container("c1")
        await stdin_of(client, "c1", "c1").send_all(b"")
        assert not agent.called("WriteStdin")
        assert not agent.process("c1").stdin_ended


async def test_process_that_does_not_read_holds_the_writer_up(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program(exits=Exits.NEVER, takes=0))
        await create(client)
        await client.start_container("c1")
        stdin = stdin_of(client, "c1", "c1")
        with trio.move_on_after(1000) as scope:
            await stdin.send_all(bytes(MAX_CHUNK_BYTES * 4))
        assert scope.cancelled_caught
        assert len(agent.called("WriteStdin")) == 1


async def test_process_that_is_gone_ends_its_streams(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program())
        await create(client)
        await client.start_container("c1")
        await client.wait_process("c1", "c1")
        assert await stdout_of(client, "c1", "c1").receive_some() == b""
        stdin = stdin_of(client, "c1", "c1")
        with pytest.raises(trio.BrokenResourceError):
            await stdin.send_all(b"late")
        await stdin.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stdin.send_all(b"later")


async def test_other_errors_of_the_agent_pass_through(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        for method in ("ReadStdout", "WriteStdin", "CloseStdin"):
            agent.fail(method, Code.INTERNAL)
        with pytest.raises(AgentStatus):
            await stdout_of(client, "c1", "c1").receive_some()
        with pytest.raises(AgentStatus):
            await stdin_of(client, "c1", "c1").send_all(b"x")
        with pytest.raises(AgentStatus):
            await stdin_of(client, "c1", "c1").send_eof()


async def test_over_long_output_is_not_passed_on(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.answer("ReadStdout", agent_pb2.ReadStreamResponse(data=b"x" * 5))
        with pytest.raises(AgentMisbehaved):
            await stdout_of(client, "c1", "c1").receive_some(4)


async def test_lost_connection_cuts_streams_off(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        await create(client)
        await client.start_container("c1")
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(AgentUnreachable):
                    await stdout_of(client, "c1", "c1").receive_some()

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            agent.wire.drop()


async def test_second_reader_is_refused_and_closed_streams_stay_closed(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        await create(client)
        await client.start_container("c1")
        out = stdout_of(client, "c1", "c1")
        stdin = stdin_of(client, "c1", "c1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(out.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await out.receive_some()
            nursery.cancel_scope.cancel()
        await out.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await out.receive_some()
        await stdin.wait_send_all_might_not_block()
        await stdin.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await stdin.send_all(b"x")
