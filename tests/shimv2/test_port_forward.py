"""Connections that are carried to the agent, which a socket pair plays here."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from agent_proto.errors import AgentUnreachable
from netns.loopback import Steering
from shimv2.port_forward import PortForward


class Agent:
    """Takes what is dialled; a test reads and answers as the guest's agent would."""

    def __init__(self) -> None:
        self.is_there = True
        self.ends: list[socket.socket] = []
        self.dialled = trio.Event()

    async def dial(self) -> socket.socket:
        if not self.is_there:
            raise AgentUnreachable("hvsock://x:1031", "refused")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.ends.append(theirs)
        self.dialled.set()
        return ours

    async def take(self) -> trio.SocketStream:
        await self.dialled.wait()
        return trio.SocketStream(trio.socket.from_stdlib_socket(self.ends[0]))


@asynccontextmanager
async def forwarding(agent: Agent) -> AsyncIterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    port: int = listener.getsockname()[1]
    link = os.open("/dev/null", os.O_RDONLY)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(PortForward(Steering(listener.detach(), link), agent.dial).run)
        yield port
        nursery.cancel_scope.cancel()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(link)


async def test_port_is_told_and_bytes_and_ends_go_both_ways():
    agent = Agent()
    async with forwarding(agent) as port:
        client = await trio.open_tcp_stream("127.0.0.1", port)
        guest = await agent.take()
        assert await guest.receive_some(2) == port.to_bytes(2, "big")
        await guest.send_all(b"\0hello")
        assert await client.receive_some(5) == b"hello"
        await client.send_all(b"x" * 200_000)
        await client.send_eof()
        got = b"".join([part async for part in guest])
        assert got == b"x" * 200_000
        await guest.send_all(b"after the end")
        await guest.aclose()
        assert b"".join([part async for part in client]) == b"after the end"
        await client.aclose()


@pytest.mark.parametrize("answer", [b"\1", b"", None], ids=["refused", "no answer", "no agent"])
async def test_connection_to_nobody_is_reset(answer: bytes | None):
    agent = Agent()
    agent.is_there = answer is not None
    async with forwarding(agent) as port, await trio.open_tcp_stream("127.0.0.1", port) as client:
        if answer is not None:
            async with await agent.take() as guest:
                await guest.receive_some(2)
                await guest.send_all(answer)
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)


async def test_agent_that_never_answers_is_given_up(autojump_clock: trio.testing.MockClock):
    agent = Agent()
    async with forwarding(agent) as port, await trio.open_tcp_stream("127.0.0.1", port) as client:
        async with await agent.take() as guest:
            assert await guest.receive_some(2) == port.to_bytes(2, "big")
            assert await guest.receive_some(1) == b""
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some(1)
