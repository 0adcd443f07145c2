"""The client against an agent that hangs, lies, vanishes or sends what no agent would."""

from __future__ import annotations

import contextlib
import signal

import pytest
import trio

from agent_proto.client import MAX_MESSAGE_BYTES
from agent_proto.errors import (
    AgentError,
    AgentMisbehaved,
    AgentStatus,
    AgentTimeout,
    AgentUnreachable,
    RequestTooLarge,
    guest_text,
)
from agent_proto.limits import MAX_CHUNK_BYTES, UNLIMITED, AgentTimeouts, reply_limit
from agent_proto.pb import agent_pb2, health_pb2
from agent_proto.vsock import HybridVsock, dial
from tests.agent_proto.test_client import CALLS, connected, create
from tests.fakes.fake_process import CAT, SLEEP, Program
from tests.fakes.fake_wire import Spoil
from ttrpc.errors import Code

LIMITED = sorted(set(CALLS) - UNLIMITED)
NESTED = b"".join(b"\x1a\x02" for _ in range(5000))


@pytest.mark.parametrize("method", LIMITED)
async def test_call_that_is_not_answered_ends_at_its_deadline(method, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang(method)
        started = trio.current_time()
        with pytest.raises(AgentTimeout) as caught:
            await CALLS[method](client)
        expected = 12.0 if method == "RemoveContainer" else AgentTimeouts().of(method)
        assert trio.current_time() - started == pytest.approx(expected, abs=0.1)
        assert caught.value.method == method
        assert caught.value.deadline_s == expected


@pytest.mark.parametrize("method", sorted(UNLIMITED))
async def test_call_that_waits_for_a_process_waits_as_long(method, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang(method)
        with trio.move_on_after(86_400) as scope:
            await CALLS[method](client)
        assert scope.cancelled_caught
        await client.check()


async def test_timeouts_can_be_chosen(tmp_path, autojump_clock):
    async with connected(tmp_path, AgentTimeouts(check_s=0.5)) as (client, agent):
        agent.hang("Check")
        started = trio.current_time()
        with pytest.raises(AgentTimeout, match=r"Check within 0\.5 s"):
            await client.check()
        assert trio.current_time() - started == pytest.approx(0.5, abs=0.1)


async def test_a_deadline_of_the_guests_own_is_told_in_its_words(tmp_path):
    async with connected(tmp_path) as (client, agent):
        agent.fail("CreateSandbox", Code.DEADLINE_EXCEEDED, "no device 02/00 within 10 s")
        with pytest.raises(AgentStatus, match="no device 02/00 within 10 s") as caught:
            await client.create_sandbox(agent_pb2.CreateSandboxRequest())
        assert caught.value.code == Code.DEADLINE_EXCEEDED


async def test_late_answer_is_dropped(tmp_path, autojump_clock):
    async with connected(tmp_path, AgentTimeouts(check_s=2)) as (client, agent):
        agent.delay("GetOOMEvent", 5, agent_pb2.OOMEvent(container_id="late"))
        with trio.move_on_after(2):
            await client.get_oom_event()
        agent.delay("GetOOMEvent", 5, agent_pb2.OOMEvent(container_id="right"))
        assert await client.get_oom_event() == "right"


@pytest.mark.parametrize("method", CALLS)
async def test_lost_connection_ends_every_kind_of_call(method, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang(method)
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(AgentUnreachable):
                    await CALLS[method](client)

            nursery.start_soon(call)
            await trio.testing.wait_all_tasks_blocked()
            agent.wire.drop()


async def test_calls_after_the_loss_fail_at_once(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.wire.drop()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(2):
            with pytest.raises(AgentUnreachable, match="Check"), trio.fail_after(0.1):
                await client.check()


async def test_calls_after_close_fail_at_once(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, _):
        client.close()
        client.close()
        with pytest.raises(AgentUnreachable):
            await client.check()


async def test_close_ends_pending_calls_and_run(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang("WaitProcess")
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(AgentUnreachable):
                    await client.wait_process("c1", "c1")

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            client.close()


async def test_cancelled_call_leaves_the_connection_usable(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang("StartContainer")
        with trio.move_on_after(1):
            await client.start_container("c1")
        await client.check()


async def test_agent_can_be_dialled_again_after_a_loss(tmp_path, autojump_clock):
    async with connected(tmp_path) as (_, agent):
        agent.wire.drop()
        (await dial(HybridVsock(agent.uds_path), timeout_s=5)).close()
        assert agent.wire.connections == 2


@pytest.mark.parametrize(
    "spoil", [Spoil.TRUNCATE, Spoil.HANG_HALFWAY, Spoil.GARBAGE, Spoil.HUGE, Spoil.UNKNOWN_TYPE]
)
async def test_spoilt_frame_fails_the_call_in_bounded_time(spoil, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.hang("WaitProcess")
        agent.wire.spoil = spoil
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(AgentUnreachable):
                    await client.wait_process("c1", "c1")

            if spoil is not Spoil.UNKNOWN_TYPE:
                nursery.start_soon(wait)
            with pytest.raises((AgentUnreachable, AgentTimeout)), trio.fail_after(30):
                await client.check()


@pytest.mark.parametrize("spoil", [Spoil.OTHER_STREAM, Spoil.EVEN_STREAM])
async def test_answer_to_a_call_nobody_made_answers_no_call(spoil, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.wire.spoil = spoil
        with pytest.raises((AgentUnreachable, AgentTimeout)):
            await client.check()


async def test_answer_that_comes_twice_counts_once(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.wire.spoil = Spoil.TWICE
        for _ in range(3):
            await client.check()
        assert (await client.version()).agent == "fake-1.0"


async def test_answer_that_trickles_ends_the_connection(tmp_path, autojump_clock):
    # Not after the 60 s of the call: a frame that has begun must go on.
    async with connected(tmp_path) as (client, agent):
        agent.wire.spoil = Spoil.SLOW
        with pytest.raises(AgentUnreachable, match="not complete"), trio.fail_after(30):
            await client.get_guest_details()


@pytest.mark.parametrize("payload", [b"\xff" * 20, b"\x0a\x7f", b"\x08", NESTED, b"\x12\x01\xff"])
@pytest.mark.parametrize("method", ["Version", "StatsContainer", "ListRoutes", "WaitProcess"])
async def test_undecodable_answer_fails_only_its_call(method, payload, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.answer(method, payload)
        # Some of these bytes are a message all the same: of fields that nobody knows.
        with contextlib.suppress(AgentMisbehaved):
            await CALLS[method](client)
        await client.check()


async def test_invalid_text_in_an_answer_is_misbehaviour(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.answer("GetOOMEvent", b"\x0a\x02\xff\xfe")
        with pytest.raises(AgentMisbehaved, match="undecodable"):
            await client.get_oom_event()


@pytest.mark.parametrize("method", CALLS)
async def test_answer_over_its_methods_limit_is_misbehaviour(method, tmp_path, autojump_clock):
    limit = 10 + 16 if method in ("ReadStdout", "ReadStderr") else reply_limit(method)
    async with connected(tmp_path) as (client, agent):
        agent.answer(method, bytes(limit + 1))
        with pytest.raises(AgentMisbehaved, match=f"{limit} allowed"):
            await CALLS[method](client)


async def test_answer_over_the_message_limit_ends_the_connection(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.wire.spoil = Spoil.HUGE
        with pytest.raises(AgentUnreachable):
            await client.get_metrics()


async def test_request_that_no_message_can_hold_is_refused_locally(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, _):
        with pytest.raises(RequestTooLarge) as caught:
            await client.set_policy("x" * MAX_MESSAGE_BYTES)
        assert caught.value.size > caught.value.limit
        assert "SetPolicy" in str(caught.value)
        await client.check()


@pytest.mark.parametrize("method", ["read_stdout", "read_stderr"])
async def test_output_longer_than_asked_is_misbehaviour(method, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        for name in ("ReadStdout", "ReadStderr"):
            agent.answer(name, agent_pb2.ReadStreamResponse(data=b"x" * 11))
        with pytest.raises(AgentMisbehaved, match="11 bytes where 10"):
            await getattr(client, method)("c1", "c1", 10)


@pytest.mark.parametrize("taken", [0, 6, 0xFFFF_FFFF])
async def test_impossible_count_of_written_bytes_is_misbehaviour(taken, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.answer("WriteStdin", agent_pb2.WriteStreamResponse(len=taken))
        with pytest.raises(AgentMisbehaved, match=f"took {taken} of 5"):
            await client.write_stdin("c1", "c1", b"12345")


@pytest.mark.parametrize("status", [-1, 256, 65_280, -(1 << 31), (1 << 31) - 1])
async def test_status_no_process_can_have_is_never_success(status, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.answer("WaitProcess", agent_pb2.WaitProcessResponse(status=status))
        assert await client.wait_process("c1", "c1") == 255


@pytest.mark.parametrize("block", [1, 4096, 3 << 20, 8 << 30, (1 << 64) - 1])
async def test_memory_block_no_machine_has_is_misbehaviour(block, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        reply = agent_pb2.GuestDetailsResponse(mem_block_size_bytes=block)
        agent.answer("GetGuestDetails", reply)
        with pytest.raises(AgentMisbehaved, match="memory block"):
            await client.get_guest_details()


async def test_guests_names_are_escaped_and_cut(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        version = "v\x1b[31m" + "x" * 1000
        agent.answer("Version", health_pb2.VersionCheckResponse(agent_version=version))
        answer = await client.version()
        assert answer.agent.startswith(r"v\x1b[31m")
        assert len(answer.agent) == 64
        reply = agent_pb2.GuestDetailsResponse()
        reply.agent_details.storage_handlers.extend(["s"] * 1000)
        agent.answer("GetGuestDetails", reply)
        assert len((await client.get_guest_details()).storage_handlers) == 64


async def test_agents_error_text_is_escaped_and_cut(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.fail("Check", Code.INTERNAL, "\x1b[2J\n" + "x" * 100_000)
        with pytest.raises(AgentStatus) as caught:
            await client.check()
        assert caught.value.message.isprintable()
        assert len(str(caught.value)) < 1200


async def test_all_errors_share_one_root(tmp_path, autojump_clock):
    for kind in (AgentUnreachable, AgentTimeout, AgentStatus, AgentMisbehaved, RequestTooLarge):
        assert issubclass(kind, AgentError)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        ("é", "é"),
        ("a\nb", r"a\nb"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202e", r"\u202e"),
        (b"\xff\x00", r"\xff\x00"),
        ("\ud800", r"\ud800"),
        ("x" * 20, "x" * 9 + "…"),
    ],
)
def test_guest_text_is_printable_and_bounded(raw, shown):
    assert guest_text(raw, 10) == shown


async def test_signal_to_a_process_that_is_gone_is_not_found(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(Program(exit_status=4))
        await create(client)
        await client.start_container("c1")
        with pytest.raises(AgentStatus) as caught:
            await client.signal_process("c1", "c1", signal.SIGTERM)
        assert caught.value.code is Code.NOT_FOUND
        assert await client.wait_process("c1", "c1") == 4
        with pytest.raises(AgentStatus) as caught:
            await client.wait_process("c1", "c1")
        assert caught.value.code is Code.NOT_FOUND


async def test_many_floods_cost_one_chunk_each(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        agent.program(CAT, container="c2")
        await create(client)
        await client.start_container("c1")
        agent.process("c1").stdout.write(bytes(8 << 20))
        total = 0
        while total < 8 << 20:
            data = await client.read_stdout("c1", "c1")
            assert 0 < len(data) <= MAX_CHUNK_BYTES
            total += len(data)
